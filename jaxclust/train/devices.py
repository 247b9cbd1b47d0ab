"""How many devices a CPU is used as, found by trying.

XLA is faster with a device to each core than with one that splits its operations over them, but not always: with
large dense layers the sum of the gradients eats the gain.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from jaxclust import hosts, runtime
from jaxclust.errors import ConfigError
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.stage import Stage, batch_of_step

QUICK_STEP = 0.04  # seconds: nothing worth a second compilation is gained below
TIMED = 0.5  # seconds of steps that a measurement takes, though at least one step


def choose(config: ConfigDict, workdir: Path, prepare: Callable[[ConfigDict], Stage]) -> ConfigDict:
    """`config` with `runtime.devices` for a CPU that nobody said how to use.

    `prepare` makes the stage whose train step is timed. A run that was begun goes on with its number, since another
    would change its last bits. Several hosts use all their devices.
    """
    if hosts.count() > 1 or config.runtime.devices or config.runtime.cpu_devices or jax.default_backend() != "cpu":
        return config
    used = workdir_lib.devices_used(workdir)
    if used is not None and used <= len(jax.devices()):
        return with_devices(config, used)
    seconds: dict[int, float] = {}
    for count in counts(config, len(jax.devices())):
        try:
            stage = prepare(with_devices(config, count))
        except ConfigError:
            if seconds:  # so many are too many for the method
                break
            raise
        seconds[count] = seconds_of_step(stage)
        if seconds[count] < QUICK_STEP or seconds[count] > min(seconds.values()):
            break
    best = min(seconds, key=lambda count: seconds[count])
    if len(seconds) > 1:
        tried = ", ".join(f"{1000 * s:,.0f} ms as {_words(count)}" for count, s in seconds.items())
        print(f"a train step takes {tried}: the CPU is used as {_words(best)} (config.runtime.devices)", flush=True)
    return with_devices(config, best)


def counts(config: ConfigDict, available: int) -> list[int]:
    """1, 2, 4, ... up to all devices, as far as the batches divide by them."""
    powers = {2**i for i in range(available.bit_length()) if 2**i <= available} | {available}
    return [n for n in sorted(powers) if config.batch_size % n == 0 and config.eval_batch_size % n == 0]


def with_devices(config: ConfigDict, count: int) -> ConfigDict:
    """`config` on `count` devices."""
    config = ConfigDict(config.to_dict())
    config.runtime.devices = count
    return config


def seconds_of_step(stage: Stage) -> float:
    """Median time of a train step on a batch of zeros, compilation aside."""
    state, _ = stage.first()
    batch, key = runtime.put_batch(batch_of_step(stage), stage.mesh), runtime.key(0)
    times: list[float] = []
    while sum(times[1:]) < TIMED:
        start = time.perf_counter()
        state, _, done = stage.step(state, batch, key)
        jax.block_until_ready((state, done))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _words(count: int) -> str:
    return "one device" if count == 1 else f"{count} devices"
