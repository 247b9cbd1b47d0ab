"""What the processes of test_hosts.py do: each takes part and saves what it saw, for the test to judge."""

import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from small import few_digits, small_config, trained

from jaxclust import hosts, runtime
from jaxclust.data.split import from_array
from jaxclust.errors import DataError, HostError
from jaxclust.evaluation import silhouette
from jaxclust.features.extract import compile_for, extract
from jaxclust.features.rows import Rows
from jaxclust.features.store import write_npy
from jaxclust.main import main
from jaxclust.methods.base import Targets
from jaxclust.report import figures
from jaxclust.train.image_rows import ImageRows
from jaxclust.train.refresh import std_of_unit_rows

SIZES = (1, 5, 12)
DTYPES = ("float64", "float32", "uint8")
ROUNDS = 3


def table(size, dtype, width=3):
    """Rows of which no two are alike."""
    return (np.random.default_rng(size).random((size, width)) * 200 - (dtype[0] != "u") * 100).astype(dtype)


def summand(host, dtype):
    return table(7 + host, dtype)[:7]


def made():
    """What host 0 makes for all."""
    rng = np.random.default_rng(0)
    return {
        "exact": rng.standard_normal((5, 4)),
        "labels": rng.integers(0, 9, 11).astype(np.int32),
        "scalar": np.float64(np.pi),
        "empty": np.zeros((0, 3), np.float32),
        "turned": np.arange(6, dtype=np.int16).reshape(2, 3).T,
        "large": rng.integers(0, 255, 1000).astype(np.uint8),
    }


def talk(workdir):
    """The functions of hosts.py, with blocks so small that everything takes several."""
    hosts.BLOCK_BYTES = 100
    seen = {}
    for dtype in DTYPES:
        seen[f"total {dtype}"] = hosts.total(summand(hosts.index(), dtype))
        for size in SIZES:
            mine = table(size, dtype)[hosts.own_ids(size)]
            seen[f"whole {dtype} {size}"] = hosts.whole(mine, size)
            chunks = np.split(mine, range(hosts.index() + 1, len(mine), 2 + hosts.index()))
            seen[f"in order {dtype} {size}"] = np.concatenate(list(hosts.in_order(chunks, size)))
    seen["total of a number"] = hosts.total(np.float64(0.1))
    seen["agreed"] = hosts.agreed(7 + hosts.index())
    seen |= {f"made {name}": array for name, array in hosts.from_first(make_here, "a test", 60).items()}
    hosts.BLOCK_BYTES = 64 * 2**20
    began = time.monotonic()
    time.sleep(1.0 if hosts.is_first() else 0.0)
    hosts.wait("the late host 0")
    seen["waited"] = time.monotonic() - began
    np.savez(workdir / f"talk-{hosts.index()}.npz", **seen)


def make_here():
    assert hosts.is_first()
    return made()


def errors(workdir):
    """What each host says of errors of host 0, and of settings that do not fit."""
    said = []

    def failing(seconds, error):
        assert hosts.is_first()
        time.sleep(seconds)
        raise error

    tries = (
        partial(hosts.from_first, partial(failing, 0, DataError("row 3 holds NaN")), "the clustering", 60),
        partial(hosts.from_first, partial(failing, 1.5, DataError("too late")), "the slow clustering", 0.5),
        partial(hosts.require_same, "the settings", b"a"),
        partial(hosts.require_same, "the settings", b"a" if hosts.index() < hosts.count() - 1 else b"b"),
        partial(hosts.whole, np.zeros(3 - hosts.index()), 2 * hosts.count()),
        partial(runtime.mesh, small_config(runtime__devices=1)),
        partial(runtime.mesh, small_config(runtime__devices=0, batch_size=100 + hosts.count())),
    )
    for attempt in tries:
        try:
            attempt()
            said.append("fine")
        except (HostError, ValueError) as error:
            said.append(f"{type(error).__name__} {getattr(error, 'exit_code', '')}: {error}")
    (workdir / f"errors-{hosts.index()}.txt").write_text("\n".join(said))


def passes(workdir):
    """Extraction and what reads its rows."""
    config = small_config(runtime__devices=0, batch_size=24, eval_batch_size=24)
    mesh = runtime.mesh(config)
    program = compile_for(lambda params, extra, images: {"row": images * params, "first": images[:, 0]}, mesh)
    scale = runtime.put_replicated(np.float32(2), mesh)
    seen = {}
    for size in (1, 24, 49):
        split = from_array(vectors(size), (5,), str)
        for memory in (10**9, 0):
            config.features.memory_bytes = memory
            found = extract(program, scale, {}, split, config, mesh, workdir / "tmp", "test")
            name = f"{size} {memory}"
            seen[f"ids {name}"], seen[f"own {name}"] = found["row"].ids(), found["row"].array()
            seen[f"row {name}"], seen[f"first {name}"] = found["row"].whole(), found["first"].whole()
            seen[f"std {name}"] = std_of_unit_rows(found["row"])
    rows: Rows = found["row"]
    seen["taken"] = silhouette.take(rows, np.array([0, 3, 4, 5, 47, 48]))
    if hosts.is_first():
        write_npy(workdir / "rows.npy", rows)
    else:
        list(rows.in_order())
    collected = ImageRows(workdir / "rows", None)
    for step in range(2):
        mine = 24 * step + 24 // hosts.count() * hosts.index() + np.arange(24 // hosts.count())
        batch = {"position": mine.astype(np.int32), "gate": np.stack([mine, -mine], 1).astype(np.int32)}
        collected.add(runtime.put_batch(batch, mesh))
    collected.flush(2)
    seen["memory"] = remembered(workdir / "memory", mesh)
    np.savez(workdir / f"passes-{hosts.index()}.npz", **seen)


def remembered(folder, mesh):
    """What is kept of 48 rows of 49 images, in the order of ids turned around."""
    rows = ImageRows(folder, None, memory="row")
    for step in range(2):
        mine = 24 * step + 24 // hosts.count() * hosts.index() + np.arange(24 // hosts.count())
        said = {"position": mine.astype(np.int32), "id": (48 - mine).astype(np.int32), "row": vectors(48)[mine]}
        rows.add(runtime.put_batch(said, mesh))
    nothing = np.zeros(49, np.int32)
    kept = rows.remember(Targets(nothing, nothing, nothing, nothing, memory=np.zeros((49, 5), np.float32)))
    rows.flush(2)
    assert not folder.exists()
    return kept.memory


def vectors(size):
    return np.random.default_rng(size).standard_normal((size, 5)).astype(np.float32)


def settings(dtype, **fields):
    """Three rounds that 1, 4, 6 and 8 devices can do."""
    fields = {"batch_size": 96, "eval_batch_size": 96, "rounds": ROUNDS, "cluster__backend": "faiss", **fields}
    config = small_config(runtime__dtype=dtype, model__blocks=1, **fields)
    # A cosine would depend on how many rounds there will be.
    config.optimizer.body.schedule = "none"
    return config


def train(workdir, dtype, digits=301, **fields):
    jax.config.update("jax_enable_x64", dtype == "float64")
    trained(settings(dtype, **fields), workdir, few_digits(digits))
    jax.config.update("jax_enable_x64", False)


def every_check(workdir):
    talk(workdir)
    errors(workdir)
    passes(workdir)


def trainings(workdir):
    """Two rounds in float64, which one process goes on with, and in float32: the command line on two hosts."""
    train(workdir / "float64", "float64", runtime__devices=0, rounds=2)
    if hosts.count() == 2:
        figures.DPI = 48  # they are drawn sooner
        return main(["jaxclust", *COMMAND, f"--workdir={workdir / 'command'}"])
    return train(workdir / "float32", "float32", runtime__devices=0, rounds=2, **SGD)


SGD = {"optimizer__body__name": "sgd", "optimizer__body__lr": 1e-2, "optimizer__top__lr": 1e-2}
COMMAND = (
    "--config=configs/deepcluster.py:smoke", "--config.batch_size=96", "--config.eval_batch_size=96",
    "--config.optimizer.body.name=sgd", "--config.optimizer.body.lr=1e-2", "--config.optimizer.top.lr=1e-2",
    "--config.cluster.backend=faiss", "--config.evaluate.suite=clustering,silhouette", "--config.model.blocks=1",
    "--config.refresh_every=5 steps",
)  # fmt: skip


if __name__ == "__main__":
    every_check(Path(sys.argv[1]))
    sys.exit(trainings(Path(sys.argv[1])))
