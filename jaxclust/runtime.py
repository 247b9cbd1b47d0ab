"""Devices, hosts, seeds and signals: everything that depends on where the program runs."""

import functools
import logging
import os
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxclust import hosts
from jaxclust.errors import ConfigError, Stopped

AXIS = "data"  # the one axis of the one mesh


def start(config: ConfigDict) -> None:
    """Sets JAX up for `config.runtime`; to be called before anything runs on a device."""
    jax.config.update("jax_enable_x64", config.runtime.dtype == "float64")
    if os.environ.get("TPU_SKIP_MDS_QUERY") and "TPU_WORKER_HOSTNAMES" not in os.environ:
        # JAX has found no TPU: libtpu, if installed to plan for one, complains.
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    if config.runtime.cpu_devices or jax.config.values["jax_num_cpu_devices"] < 0:  # negative: nobody has decided yet
        jax.config.update("jax_num_cpu_devices", config.runtime.cpu_devices or cores())
    if not jax.config.values["jax_compilation_cache_dir"]:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "jaxclust" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def tensorflow() -> ModuleType:
    """TensorFlow, for tf.data and file formats only: it never sees an accelerator."""
    with _silent_stderr(), _without_keras():  # its start-up lines about missing GPUs obey no log level
        import tensorflow as tf

        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
        # Rewritten graphs of one and of two copies of an image would differ in last bits.
        tf.config.optimizer.set_experimental_options({"constant_folding": False, "arithmetic_optimization": False})
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    return tf


@contextmanager
def _without_keras() -> Iterator[None]:
    """TensorFlow imports Keras 3, which nothing here uses and which takes a quarter of its time, unless told so."""
    name = "TF_USE_LEGACY_KERAS"
    before = os.environ.get(name)
    os.environ[name] = before or "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


@contextmanager
def _silent_stderr() -> Iterator[None]:
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def require_equal_hosts(devices: Sequence[jax.Device]) -> None:
    """ConfigError unless each host has as many of the `devices` as the others; every host with the same message.

    A mesh over them splits batches evenly over devices, and what hosts tell each other goes around over all of them.
    """
    counts = Counter(device.process_index for device in devices)
    if len(set(counts.values())) <= 1:
        return
    having = {count: [str(host) for host in sorted(counts) if counts[host] == count] for count in counts.values()}
    there = "; ".join(f"host {', '.join(those)}: {count}" for count, those in sorted(having.items()))
    raise ConfigError(
        f"all hosts must have equally many devices, and these have ({there}). Give each process as many GPUs or TPU "
        "chips as the others; CPUs are split alike by config.runtime.cpu_devices, which counts cores if it is 0"
    )


def mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.runtime.devices` of the `devices` (0: all), with batch sizes checked against it.

    They are this job's own, unless others are given to compile for; those of a host stand together.
    """
    devices = sorted(jax.devices() if devices is None else devices, key=lambda device: device.process_index)
    many = len({device.process_index for device in devices})
    count = config.runtime.devices or len(devices)
    if many > 1 and count != len(devices):
        raise ConfigError(
            f"config.runtime.devices={count} on {many} hosts with {len(devices)} devices: several hosts use all of "
            "them, leave it at 0"
        )
    if count > len(devices):
        raise ConfigError(
            f"config.runtime.devices={count}, but there are {len(devices)} {devices[0].platform} devices; "
            "a CPU can be split with config.runtime.cpu_devices"
        )
    for field in ("batch_size", "eval_batch_size"):
        size = config[field]
        if size % count:
            low = size // count * count
            nearest = ", ".join(str(n) for n in (low, low + count) if n)
            on = f"{count} devices" + (f" on {many} hosts" if many > 1 else "")
            raise ConfigError(f"config.{field}={size} must divide by {on}; nearest: {nearest}")
    return Mesh(np.array(devices[:count]), (AXIS,))


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Arrays onto the devices, split over them along their first axis; scalars whole.

    On several hosts each has its part of the rows, in the order of hosts.
    """
    split, whole = NamedSharding(mesh, P(AXIS)), NamedSharding(mesh, P())
    if hosts.count() == 1:
        return jax.device_put(tree, jax.tree.map(lambda x: split if np.ndim(x) else whole, tree))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(split, x) if np.ndim(x) else put_replicated(x, mesh), tree
    )


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Arrays onto every device, whole. Every host must have the same, which is not checked."""
    sharding = NamedSharding(mesh, P())
    if hosts.count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda _: array)  # device_put would compare hosts

    return jax.tree.map(put, tree)


def local_rows(tree: Any) -> Any:
    """This host's rows of arrays that are split over the devices along their first axis, as NumPy arrays."""
    if hosts.count() == 1:
        return jax.device_get(tree)

    def fetch(array: jax.Array) -> np.ndarray:
        parts = sorted(array.addressable_shards, key=lambda part: part.index[0].start or 0)
        return np.concatenate(jax.device_get([part.data for part in parts]))

    return jax.tree.map(fetch, tree)


def compute_dtype(config: ConfigDict) -> Any:
    """The dtype that networks compute in."""
    return jnp.dtype(config.runtime.dtype)


def param_dtype(config: ConfigDict) -> Any:
    """The dtype of parameters and statistics: float64 where asked for, else float32."""
    return jnp.dtype("float64" if config.runtime.dtype == "float64" else "float32")


def key(seed: int, *names: str | int) -> jax.Array:
    """A PRNG key from the seed and a path of names, the same on every host."""
    made = jax.random.key(seed)
    for name in names:
        made = jax.random.fold_in(made, zlib.crc32(name.encode()) if isinstance(name, str) else name)
    return made


class StopSignal:
    """Remembers that SIGTERM or SIGINT came; the loop asks, saves and stops.

    On several hosts SIGTERM belongs to JAX, which agrees with all of them on where to stop; `agreed` is what it says.
    """

    def __init__(self, agreed: Callable[[int], bool] | None = None) -> None:
        self.received: signal.Signals | None = None
        self._agreed, self._looks, self._stopping = agreed, 0, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        print(f"{self.received.name} received: saving, then stopping (once more ends at once)", flush=True)
        if self._agreed:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self) -> bool:
        """Whether to save and stop here; every host asks as often, and all get the same answer at the same time."""
        if not self._agreed:
            return self.received is not None
        self._looks += 1
        self._stopping = self._stopping or self._agreed(self._looks)
        return self._stopping

    def error(self) -> Stopped:
        """What to raise once the state is saved."""
        name = self.received.name if self.received else "a signal to one of the hosts"
        return Stopped(f"stopped by {name} with everything saved; the same command goes on from here")


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Catches SIGTERM and SIGINT within the block; a block inside another one shares what that one caught."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    outer = [handler for handler in map(signal.getsignal, numbers) if isinstance(handler, StopSignal)]
    if outer:
        yield outer[0]
        return
    with hosts.preemption() as agreed:
        stop = StopSignal(agreed)
        previous = {number: signal.signal(number, stop) for number in (numbers[1:] if agreed else numbers)}
        try:
            yield stop
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
