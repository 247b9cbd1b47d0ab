"""Train step and feature pass of each network against a plain PyTorch version of the same network and batch.

Ours is the program that a run of DeepCluster trains with, on one CPU device and on one for each core. The peer is
PyTorch on the CPU as people use it: channels_last, no compilation, all cores. Both get the same uint8 batch, bring it
to the network's scale, and take the same step: batch norm over the whole batch, dropout, cross-entropy over k clusters,
SGD with momentum and weight decay on every parameter. Neither loads data. Turns of a few steps alternate between them.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from benchmarks import results, sides
from jaxclust import config as config_lib

Run = Callable[[str], float]
"""Seconds of a turn of "train" or "features", or the number of "parameters"."""

LR, MOMENTUM, DECAY = 0.05, 0.9, 1e-5  # DeepCluster's


class Case(NamedTuple):
    """What is trained."""

    network: str
    side: int  # pixels
    channels: int
    batch: int
    k: int
    steps: int  # in a turn
    width: int = 0  # 0: the network's own


CASES = (
    Case("convnet", 28, 1, 128, 10, 60),
    Case("resnet18", 32, 3, 128, 10, 4),
    Case("alexnet", 224, 3, 64, 10_000, 2),
    Case("vgg16", 224, 3, 32, 10, 1),
)
HEAD = ("", "", "PyTorch", "ours, 1 device", "ratio", "ours, device per core", "ratio", "peak memory of each")
QUICK = (Case("convnet", 8, 1, 8, 4, 2, 4),)


def main() -> None:
    """Measures every network and writes the section."""
    parser = results.arguments(__doc__)
    parser.add_argument("--networks", default="", help="only these, separated by commas")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side")
    options = results.parse(parser)
    names = [name for name in options.networks.split(",") if name]
    cases = [case for case in (QUICK if options.quick else CASES) if not names or case.network in names]
    rows = [row for case in cases for row in measure(case, 1 if options.quick else options.turns)]
    text = f"Images per second, {options.turns} turns.\n\n{results.table(HEAD, rows)}"
    results.publish(options, "Train step and feature pass", "python -m benchmarks.train_step", text)


def measure(case: Case, turns: int) -> list[list[object]]:
    """Two rows of the table: the train step and the feature pass."""
    makers: dict[str, tuple[Any, ...]] = {"one": (ours, case, 1), "all": (ours, case, os.cpu_count())}
    if results.has_torch():
        makers = {"torch": (peer, case), **makers}
    with sides.sides(makers) as asks:
        sizes = {name: ask("parameters").value for name, ask in asks.items()}
        if len(set(sizes.values())) > 1:
            raise RuntimeError(f"{case.network}: the sides differ in the number of parameters, {sizes}")
        rows = []
        for what in ("train", "features"):
            sides.take_turns(asks, 1, what)  # warms up, and compiles
            rows.append(row(case, what, sides.take_turns(asks, turns, what)))
            print(*rows[-1], sep=" | ", flush=True)
        return rows


def row(case: Case, what: str, answers: dict[str, list[sides.Answer]]) -> list[object]:
    """A row of the table."""
    seconds = {name: [answer.value for answer in of_side] for name, of_side in answers.items()}
    rates = {name: results.spread(case.batch * case.steps / s for s in of_side) for name, of_side in seconds.items()}
    ratios = {name: results.ratio(seconds["torch"], seconds[name]) if "torch" in seconds else "-" for name in seconds}
    peaks = ", ".join(results.gigabytes(of_side[-1].peak) for of_side in answers.values())
    title = f"{case.network}, {case.side} px, batch {case.batch}, k {case.k:,}"
    return [title, what, rates.get("torch", "-"), rates["one"], ratios["one"], rates["all"], ratios["all"], peaks]


def ours(case: Case, devices: int) -> Run:
    """The program of a run of DeepCluster, on so many CPU devices."""
    import jax

    from jaxclust import runtime
    from jaxclust.data.split import Split
    from jaxclust.methods.base import DataInfo
    from jaxclust.train.loop import IN_FLIGHT
    from jaxclust.train.stage import example_batch, prepare

    config = config_of(case, devices)
    runtime.start(config)
    shape, size = (case.side, case.side, case.channels), max(case.k, 1000)
    split = Split(size, shape, str, load=lambda id: id)  # no image is ever asked for
    stage = prepare(config, "deepcluster", split, DataInfo(size, shape), Path())
    state, key = stage.first().state, runtime.key(0, "step")
    images, targets = batch_of(case)
    example = example_batch(stage.method, DataInfo(size, shape), case.batch)
    batch = runtime.put_batch({**example, "views": {"train": images}, "target": targets}, stage.mesh)

    def train() -> None:
        nonlocal state
        in_flight = deque[jax.Array]()
        for _ in range(case.steps):
            state, _, done = stage.step(state, batch, key)
            in_flight.append(done)
            if len(in_flight) > IN_FLIGHT:
                jax.block_until_ready(in_flight.popleft())
        jax.block_until_ready(state)

    def features() -> None:
        waiting = None
        for _ in range(case.steps):
            waiting, done = stage.embed(state.params, state.extra, batch["views"]["train"]), waiting
            jax.device_get(done)
        jax.device_get(waiting)

    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return timed(train, features, parameters)


def config_of(case: Case, devices: int) -> ConfigDict:
    """DeepCluster with the network and the optimiser of a case."""
    config = config_lib.base()
    config.model.name, config.model.width, config.model.stem = case.network, case.width, "small"
    config.batch_size = config.eval_batch_size = case.batch
    config.cluster.k = case.k
    config.runtime.devices = devices
    for group in config.optimizer.values():
        group.name, group.lr, group.momentum, group.weight_decay = "sgd", LR, MOMENTUM, DECAY
    return config_lib.validate(config)


def peer(case: Case) -> Run:
    """Plain PyTorch."""
    import torch

    from benchmarks import torch_networks

    width = {"width": case.width} if case.width else {}
    model = getattr(torch_networks, case.network)(case.channels, case.k, side=case.side, **width)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    images, targets = (torch.from_numpy(array) for array in batch_of(case))
    images, targets = images.permute(0, 3, 1, 2), targets.long()  # the strides are those of channels_last

    def standardized() -> torch.Tensor:
        return (images.float() / 255 - 0.5) / 0.5

    def train() -> None:
        model.train()
        for _ in range(case.steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(standardized()), targets).backward()
            optimizer.step()

    @torch.inference_mode()
    def features() -> None:
        model.eval()
        for _ in range(case.steps):
            model.body(standardized()).numpy()

    return timed(train, features, sum(p.numel() for p in model.parameters()))


def timed(train: Callable[[], None], features: Callable[[], None], parameters: int) -> Run:
    """What a side answers."""
    turns = {"train": train, "features": features}

    def run(what: str) -> float:
        if what == "parameters":
            return parameters
        start = time.perf_counter()
        turns[what]()
        return time.perf_counter() - start

    return run


def batch_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [B, S, S, C] and targets int32 [B] of noise, the same for every side."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (case.batch, case.side, case.side, case.channels), np.uint8)
    return images, rng.integers(0, case.k, case.batch, np.int32)


if __name__ == "__main__":
    main()
