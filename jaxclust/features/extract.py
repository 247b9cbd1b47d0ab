"""Runs a function of images over a whole split: every id exactly once, in order, on the host that it belongs to."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxclust import hosts, runtime
from jaxclust.data.pipeline import exact_batches
from jaxclust.data.source import Split
from jaxclust.features.rows import Rows
from jaxclust.progress import progress

Program = Callable[[Any, Any, jax.Array], Any]


def compile_for(function: Program, mesh: Mesh) -> Program:
    """`function(params, extra, images) -> tree of [B, ...]`, jitted and mapped over the mesh.

    To be made once for a stage, so that later passes compile nothing.
    """
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(), P(), P(runtime.AXIS)), out_specs=P(runtime.AXIS))
    return jax.jit(mapped)


def extract(
    program: Program, params: Any, extra: Any, split: Split, config: ConfigDict, mesh: Mesh, folder: Path, title: str
) -> dict[str, Rows]:
    """What `program` gives for every image of `split`: {name: Rows [N, ...]}.

    An array result is named "features". Rows too large for `config.features.memory_bytes` lie under `folder`. On
    several hosts each gets those of its own ids.
    """
    rows: dict[str, Rows] = {}
    for mask, found in outputs(program, params, extra, split, config, mesh, title):
        for name, values in found.items():
            if name not in rows:
                memory = config.features.memory_bytes
                rows[name] = Rows(split.size, values.shape[1:], values.dtype, memory, folder)
            rows[name].append(values[mask])
    return {name: matrix.finish() for name, matrix in rows.items()}


def outputs(
    program: Program, params: Any, extra: Any, split: Split, config: ConfigDict, mesh: Mesh, title: str
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(which rows count bool [B], {name: [B, ...]}) of each batch of this host, in the order of ids.

    The device works on one batch while the host has the one before.
    """
    size = config.eval_batch_size
    batches = exact_batches(split, size, host=hosts.index(), hosts=hosts.count())
    waiting = None
    for batch in progress(batches, -(-split.size // size), title, "batches"):
        result = program(params, extra, runtime.put_batch(batch["image"], mesh))
        if waiting is not None:
            yield waiting[0], runtime.local_rows(waiting[1])
        waiting = batch["mask"], result if isinstance(result, dict) else {"features": result}
    if waiting is not None:
        yield waiting[0], runtime.local_rows(waiting[1])
