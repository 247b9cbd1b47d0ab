"""Several hosts as one: how they find each other, and the few things that they tell each other.

A host is a process of `jax.distributed`. Images are dealt out by id, host h has those with id % count() == h. What
goes around here are NumPy arrays as bytes, so that float64 stays float64 and every host ends with the same bits. These
functions are collective: every host calls them in the same order. With one host they are identities.
"""

import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax._src import clusters, distributed  # launchers, and the key-value store of the job, have no public name
from jax._src.lib import _jax  # nor has the preemption sync point without the service that Orbax asks too
from jax.experimental import multihost_utils

from jaxclust import watch
from jaxclust.errors import HostError
from jaxclust.heartbeats import Place, tick, uncounted

BLOCK_BYTES = 64 * 2**20  # what goes around at once, over all hosts
WAIT_SECONDS = 7 * 24 * 3600  # a barrier ends earlier only because a host is lost, which the watcher sees
LAUNCHERS = (clusters.OmpiCluster, clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
JOIN_HEARTBEATS = 10  # so many times config.runtime.heartbeat hosts wait for each other at the start
_calls = itertools.count()  # numbers the keys of the store; every host makes the same calls


def place(given: Place | None) -> Place | None:
    """Where this process stands, as `given` or as its launcher says; None if it is alone.

    Starts no device. Kubernetes says it by variables that our manifest sets, so that nobody needs to ask its API.
    """
    if given is None:
        launcher = next((one for one in LAUNCHERS if one.is_env_present()), None)
        if launcher is None or launcher.get_process_count() == 1:
            return None
        address = launcher.get_coordinator_address(300, os.environ.get("JAX_COORDINATOR_PORT"))
        given = Place(address, launcher.get_process_count(), launcher.get_process_id(), launcher.name)
    return given if given.processes > 1 else None


def join(place: Place, heartbeat: float) -> None:
    """Makes this process one host of its job, before anything runs on a device.

    HostError if host 0 cannot be reached or not all hosts are there after JOIN_HEARTBEATS times `heartbeat` seconds.
    """
    seconds = JOIN_HEARTBEATS * heartbeat
    deadline = time.monotonic() + seconds
    if place.process:
        _await_answer(place.address, seconds)
    jax.config.update("jax_enable_preemption_service", False)  # see preemption
    given_up = threading.Timer(deadline - time.monotonic(), _give_up, (place, seconds))
    given_up.daemon = True
    given_up.start()
    try:
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            cluster_detection_method=None if place.launcher else "deactivate",  # which may pick one GPU of several
            initialization_timeout=math.ceil(seconds) + 60,  # ours comes first, with a message
            heartbeat_timeout_seconds=max(20, math.ceil(4 * heartbeat)),
            shutdown_timeout_seconds=max(20, math.ceil(heartbeat)),
        )
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise HostError(f"cannot join the {place.processes} hosts of {place.address}: {why}") from None
    finally:
        given_up.cancel()


def leave() -> None:
    """Ends being one of several, once all are done."""
    with suppress(jax.errors.JaxRuntimeError):  # nothing is left to lose
        jax.distributed.shutdown()


@contextmanager
def preemption() -> Iterator[Callable[[int], bool] | None]:
    """Whether to stop at the n-th look, agreed by all hosts after a SIGTERM on any; None where there is one host.

    JAX's own sync point, but not the one that is there for all: Orbax asks that one with its own numbers.
    """
    if count() == 1:
        yield None
        return
    manager = _jax.create_preemption_sync_manager()
    manager.initialize(store())
    try:
        yield manager.reached_sync_point
    finally:
        manager.shutdown()


def _await_answer(address: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            watch.connect(address, 5.0)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostError(
                    f"host 0 does not answer at {address} after {seconds:g} s ({error}): is it running, is the address "
                    "right, and is the port open?"
                ) from None
        time.sleep(0.5)


def _give_up(place: Place, seconds: float) -> None:
    own = f"host {place.process}: " if place.process else ""
    print(
        f"jaxclust: {own}not all {place.processes} hosts came to {place.address} within {seconds:g} s: each has to be "
        f"started, with a --process_id of its own from 0 to {place.processes - 1}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(HostError.exit_code)


def index() -> int:
    """Number of this host; host 0 decides and writes. Starts no device where there is only one."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    """Number of hosts."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the host that writes."""
    return index() == 0


def store() -> Any:
    """The key-value store of the job, which every host reads and writes; only where there are several."""
    return distributed.global_state.client


def own_ids(size: int) -> np.ndarray:
    """The ids of this host among `size`, int64 and rising."""
    return np.arange(index(), size, count())


def wait(name: str) -> None:
    """Returns once every host is here."""
    if count() > 1:
        store().wait_at_barrier(f"jaxclust/wait/{next(_calls)}/{name}", 1000 * WAIT_SECONDS)


def agreed(value: int) -> int:
    """What host 0 says, on every host; to be used where a look at the disk decides, which hosts take at different
    times."""
    return value if count() == 1 else int(total(np.asarray(value if is_first() else 0, np.int64)))


def require_same(what: str, data: bytes | np.ndarray) -> None:
    """HostError if `data` is not the same on every host; `what` begins the message."""
    if count() == 1:
        return
    digest = hashlib.sha256(data if isinstance(data, bytes) else np.ascontiguousarray(data).data).digest()
    digests = whole(np.frombuffer(digest, np.uint8)[None], count())
    others = [str(host) for host, theirs in enumerate(digests) if (theirs != digests[0]).any()]
    if others:
        raise HostError(f"{what} of host {', '.join(others)} differ from those of host 0")


def total(array: np.ndarray) -> np.ndarray:
    """The sum over all hosts of an array that has one shape everywhere, added in the order of hosts."""
    array = np.asarray(array)
    if count() == 1:
        return array
    flat = np.ascontiguousarray(array).reshape(-1)
    out = np.empty_like(flat)
    step = max(1, BLOCK_BYTES // (count() * flat.itemsize))
    for start in range(0, len(flat), step):
        parts = _all(flat[start : start + step])
        out[start : start + step] = np.add.reduce(parts, axis=0, dtype=flat.dtype)
    return out.reshape(array.shape)


def in_order(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The rows of all hosts by id, in blocks [n, ...] that together are [size, ...].

    `chunks` are this host's rows in the order of its ids, at least one chunk, be it without rows. Every host must take
    every block. ValueError if the rows are not as many as the ids.
    """
    if count() == 1:
        yield from chunks
        return
    arriving = iter(chunks)
    first = np.asarray(next(arriving))
    row_shape = first.shape[1:]
    row_bytes = int(np.prod(row_shape, dtype=np.int64)) * first.itemsize
    longest, given = -(-size // count()), 0
    step = max(1, min(longest, BLOCK_BYTES // (count() * max(1, row_bytes))))
    mine = _regrouped(itertools.chain([first], arriving), step)
    for start in range(0, longest, step):
        rows = next(mine, first[:0])
        block = np.zeros((min(step, longest - start), *row_shape), first.dtype)
        block[: len(rows)] = rows
        given += len(rows)
        yield np.swapaxes(_all(block), 0, 1).reshape(-1, *row_shape)[: size - start * count()]
    given += sum(map(len, mine))
    if given != len(own_ids(size)):
        raise ValueError(f"{given} rows for the {len(own_ids(size))} ids of host {index()}")


def whole(rows: np.ndarray, size: int) -> np.ndarray:
    """The rows [n, ...] of all hosts by id, [size, ...], on every host."""
    return rows if count() == 1 else np.concatenate([rows[:0], *in_order([rows], size)])


def from_first(make: Callable[[], dict[str, np.ndarray]], what: str, deadline: float) -> dict[str, np.ndarray]:
    """What `make` returns on host 0, on every host; the others do not call it.

    HostError on the others if host 0 has not done `what` after `deadline` seconds, or if it fails, then with the exit
    code of its error.
    """
    if count() == 1:
        return make()
    key = f"jaxclust/first/{next(_calls)}"
    tick()
    if is_first():
        try:
            with uncounted():
                arrays = {name: np.asarray(array, order="C") for name, array in make().items()}
        except Exception as error:
            said = {"error": str(error) or repr(error), "exit_code": getattr(error, "exit_code", 1)}
            store().key_value_set(key, json.dumps(said))
            raise
        about = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        store().key_value_set(key, json.dumps({"arrays": about}))
    else:
        about = _awaited(key, what, deadline)
        arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in about.items()}
    for array in arrays.values():
        _send(array)
    return arrays


def _awaited(key: str, what: str, deadline: float) -> dict[str, Any]:
    try:
        said = json.loads(store().blocking_key_value_get(key, int(1000 * deadline)))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise HostError(f"host 0 does not answer during {what}: {str(error).splitlines()[0]}") from None
        raise HostError(
            f"host 0 did not finish {what} within {deadline:,g} s (config.runtime.deadline); raise it if {what} only "
            "takes longer"
        ) from None
    if "error" in said:
        failed = HostError(f"host 0 could not finish {what}: {said['error']}")
        failed.exit_code = said["exit_code"]
        raise failed
    about: dict[str, Any] = said["arrays"]
    return about


def _regrouped(chunks: Iterable[np.ndarray], step: int) -> Iterator[np.ndarray]:
    """The same rows in blocks of `step`, the last one shorter; a block is good until the next."""
    block, filled = np.empty(0), 0
    for chunk in map(np.asarray, chunks):
        if not len(block):
            block = np.empty((step, *chunk.shape[1:]), chunk.dtype)
        while len(chunk):
            taken = chunk[: step - filled]
            block[filled : filled + len(taken)] = taken
            chunk, filled = chunk[len(taken) :], filled + len(taken)
            if filled == step:
                yield block
                filled = 0
    if filled:
        yield block[:filled]


def _all(block: np.ndarray) -> np.ndarray:
    """[count(), *block.shape] of the blocks of all hosts."""
    tick()
    flat = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    parts = np.ascontiguousarray(multihost_utils.process_allgather(flat))
    return parts.view(block.dtype).reshape(count(), *block.shape)


def _send(array: np.ndarray) -> None:
    """Fills `array` with what it holds on host 0."""
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, len(flat), BLOCK_BYTES):
        sent = multihost_utils.broadcast_one_to_all(flat[start : start + BLOCK_BYTES], is_source=is_first())
        if not is_first():
            flat[start : start + BLOCK_BYTES] = sent
