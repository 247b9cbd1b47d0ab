"""Memory of DSCL's gradient: a large batch in two passes of small batches, against the same in one shot.

Both sides are the train step of a run, compiled and run once, in a process of its own; only `small_batch_size` differs.
Memory is what the compiled program needs beside its arguments, and the most that its process held.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from benchmarks import results, sides
from jaxclust import config as config_lib

Run = Callable[[], tuple[int, float, float]]
"""Bytes of temporaries, seconds of a step, and L."""


class Case(NamedTuple):
    """A large batch of images, and how it is passed through."""

    rows: int
    small: int
    side: int
    width: int
    classes: int


CASE, QUICK = Case(6000, 60, 16, 8, 98), Case(240, 24, 8, 4, 10)


def main() -> None:
    """Measures and writes the section."""
    options = results.parse(results.arguments(__doc__))
    case = QUICK if options.quick else CASE
    answers: dict[str, sides.Answer] = {}
    for name, small in {ONE: case.rows, TWO: case.small}.items():  # one after the other, each with all of the memory
        with sides.side(step, case, small) as ask:
            answers[name] = ask()
    results.publish(options, "Memory of DSCL", "python -m benchmarks.dscl_memory", describe(case, answers))


def describe(case: Case, answers: Mapping[str, sides.Answer]) -> str:
    """The table."""
    rows = [
        [name, results.gigabytes(temporaries), results.gigabytes(answer.peak), results.number(seconds), f"{loss:.4f}"]
        for name, answer in answers.items()
        for temporaries, seconds, loss in [answer.value]
    ]
    one, two = (answers[name].value for name in (ONE, TWO))
    return (
        f"{case.rows:,} images of {case.side} x {case.side}, a ConvNet of width {case.width}, embeddings of "
        f"{case.classes} numbers, small batches of {case.small}. One shot / two passes: temporaries "
        f"**{one[0] / two[0]:.1f}**, peak memory {answers[ONE].peak / answers[TWO].peak:.1f}.\n\n"
        f"{results.table(('', 'temporaries', 'peak memory', 'seconds', 'L'), rows)}"
    )


def step(case: Case, small: int) -> Run:
    """A train step on images of noise."""
    import jax

    from jaxclust import runtime
    from jaxclust.methods.base import DataInfo
    from jaxclust.train.stage import example_batch, prepare

    config = config_lib.from_file(Path(__file__).parents[1] / "configs" / "dscl.py", "digits")
    config.runtime.devices = config.runtime.cpu_devices = 1
    config.batch_size, config.dscl.small_batch_size, config.dscl.vector_size = case.rows, small, case.classes
    config.dscl.bn, config.model.width, config.data.train_classes = "frozen", case.width, ""
    runtime.start(config)
    shape = (case.side, case.side, 3)
    info = DataInfo(case.rows, shape, case.classes)
    split: Any = SimpleNamespace(size=case.rows, image_shape=shape, labels=None, path=str)
    with tempfile.TemporaryDirectory() as folder:
        stage = prepare(config, "dscl", split, info, Path(folder) / "run")
        state, _ = stage.first()
    rng = np.random.default_rng(0)
    batch = example_batch(stage.method, info, case.rows, config.views)
    batch["views"]["train"] = rng.integers(0, 256, (case.rows, *shape), np.uint8)
    batch["target"] = np.arange(case.rows, dtype=np.int32) % case.classes
    batch, key = runtime.put_batch(batch, stage.mesh), runtime.key(0)
    compiled = stage.step.lower(state, batch, key).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes

    def run() -> tuple[int, float, float]:
        start = time.perf_counter()
        new, _, _ = jax.block_until_ready(compiled(state, batch, key))
        return temporaries, time.perf_counter() - start, float(new.sums["loss"])

    return run


ONE, TWO = "one shot", "two passes"


if __name__ == "__main__":
    main()
