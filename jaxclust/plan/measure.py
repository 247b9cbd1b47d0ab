"""The programs of a stage, compiled for a topology: the very ones that training and feature extraction run."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxclust import methods, runtime
from jaxclust.data.split import Split
from jaxclust.errors import ConfigError
from jaxclust.methods.base import DataInfo
from jaxclust.plan.program import Program, compiled, nbytes
from jaxclust.plan.topology import Topology
from jaxclust.train.loop import IN_FLIGHT
from jaxclust.train.stage import Stage, batch_of_step, of_pass, prepare

COMPILES = 5  # sizes that are tried to find the largest batch
MULTIPLE = 8  # of which batches of a chip are
CLOSE = 1.03  # how much larger a batch must be to be worth trying
FASTER = 32  # how much larger the next one is where memory did not grow


def stage_on(topology: Topology, config: ConfigDict, name: str, info: DataInfo, batch_size: int) -> Stage:
    """Stage `name` as it would be prepared on `topology`; ConfigError as there."""
    config = ConfigDict(config.to_dict())
    config.batch_size, config.runtime.devices, config.init_from = batch_size, 0, ""
    split = Split(info.size, info.image_shape, str, load=lambda id: id)  # no image is read
    return prepare(config, name, split, info, Path(), topology.devices)


def train_program(stage: Stage) -> Program:
    """The train step on a full batch; of a frozen body on the features that stand for the images."""
    return compiled(stage.step, *_of_step(stage))


def feature_program(stage: Stage) -> Program:
    """The pass over all images before a refresh, on a full batch."""
    state = _whole(stage.shapes, stage.mesh)
    return compiled(stage.look, state.params, state.extra, _split(of_pass(stage)[2], stage.mesh))


def feature_dim(stage: Stage) -> int:
    """Length of what a refresh sees of an image."""
    return int(jax.eval_shape(stage.look, *of_pass(stage)).shape[1])


def train_memory(stage: Stage, program: Program) -> dict[str, int]:
    """Bytes on a chip while it trains, by what they are for.

    The loop keeps batches waiting for the step, and what steps say of their images until the round ends.
    """
    state = stage.shapes
    batch = max(0, program.arguments - nbytes(state))
    _, rows, _ = jax.eval_shape(stage.step, *_of_step(stage))
    return {
        "parameters": nbytes(state.params),
        "optimizer": nbytes(state.opt_state),
        "statistics": nbytes((state.extra, state.sums, state.step)),
        "batches": (1 + IN_FLIGHT) * (batch + program.outputs),
        "rows": stage.lengths.round * nbytes(rows) // stage.mesh.size,
        "temporaries": program.temporaries,
        "program": program.code,
    }


def feature_memory(stage: Stage, program: Program) -> int:
    """Bytes on a chip during the feature pass: the state of the training stays, and two batches are under way."""
    images = max(0, program.arguments - nbytes((stage.shapes.params, stage.shapes.extra)))
    return nbytes(stage.shapes) + 2 * (images + program.outputs) + program.temporaries + program.code


def takes(config: ConfigDict, info: DataInfo, batch_size: int) -> bool:
    """Whether the method of `config` works with such a batch, of which MoCo's queue is a multiple, say."""
    config = ConfigDict(config.to_dict())
    config.batch_size, config.init_from = batch_size, ""
    try:
        methods.get(config, info)
    except ConfigError:
        return False
    return True


def largest(
    needed: Callable[[int], float],
    limit: float,
    start: int,
    fixed: float,
    most: int,
    hint: int = 0,
    taken: Callable[[int], bool] = lambda batch: True,
) -> tuple[int, float]:
    """The largest batch of a chip, up to `most`, that fits into `limit` bytes, and what it needs; 0 if no image does.

    `needed` compiles for a batch and says its bytes (inf: refused), which without images are about `fixed`. After
    `start` and `hint` each size is where the line through the last two would reach the limit, or half-way to one that
    is too large. From there it goes down to one that may be `taken`.
    """
    best, before, over = (0, fixed), (0, fixed), math.inf
    guess = start
    for turn in range(COMPILES):
        used = needed(guess)
        if used <= limit:
            before, best = best, (guess, used)
        else:
            over = guess
        slope = (best[1] - before[1]) / max(1, best[0] - before[0])
        reach = best[0] + (limit - best[1]) / slope if slope > 0 else FASTER * best[0] or math.inf
        guess = _round(reach if reach < over or over == math.inf else (best[0] + over) / 2)
        if turn == 0 and best[0] < hint < over:
            guess = hint
        guess = min(guess, max(most, start))
        guess = next((size for size in range(guess, best[0], -MULTIPLE) if taken(size)), 0)
        if guess <= best[0] * CLOSE or guess >= over:
            break
    return best


def _round(batch: float) -> int:
    """Down to a multiple of what fills the lanes of a chip."""
    return int(batch) // MULTIPLE * MULTIPLE if batch >= MULTIPLE else int(batch)


def _of_step(stage: Stage) -> tuple[Any, Any, Any]:
    """Shapes of the state, a batch and the key."""
    batch = jax.eval_shape(lambda: batch_of_step(stage))
    return _whole(stage.shapes, stage.mesh), _split(batch, stage.mesh), jax.eval_shape(lambda: runtime.key(0))


def _whole(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(lambda x: x.update(sharding=NamedSharding(mesh, P())), tree)


def _split(tree: Any, mesh: Mesh) -> Any:
    """Like `runtime.put_batch`."""
    spec = NamedSharding(mesh, P(runtime.AXIS)), NamedSharding(mesh, P())
    return jax.tree.map(lambda x: x.update(sharding=spec[0] if x.ndim else spec[1]), tree)
