"""Several hosts on this machine: processes that find each other on loopback, each with a few CPU devices of its own.

They are forked from a process that has imported everything and begun nothing, which saves each of them seconds.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
# One thread for each process and library: all share the cores of one machine.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
ENVIRONMENT = {
    **os.environ,
    **{name: "1" for name in THREADS},
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
CONNECT = """
import sys
import jax
port, count, index, devices = map(int, sys.argv.pop(1).split())
jax.config.update("jax_num_cpu_devices", devices)
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
"""
MAIN = """
from jaxclust.main import main
sys.exit(main(["jaxclust", *sys.argv[1:]]))
"""


_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["host_imports"])


class Process:
    """A process of its own that runs a Python program, with the methods of subprocess.Popen."""

    def __init__(self, code: str, arguments: Sequence[str], out: Path, err: Path):
        with mock.patch.dict(os.environ, ENVIRONMENT):
            multiprocessing.forkserver.ensure_running()
        self._process = _forks.Process(target=_play, args=(code, arguments, out, err))
        self._process.start()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode


def _play(code: str, arguments: Sequence[str], out: Path, err: Path) -> None:
    """What `python -c code` does."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(ROOT)
    sys.argv = ["-c", *arguments]
    try:
        exec(code, {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()


class Ended(NamedTuple):
    """What a host left: its exit code (negative: the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str


class Hosts:
    """Processes that run, host i at `processes[i]`; what they wrote so far is `out(i)` and `err(i)`.

    They are `programs`, each its code and its arguments.
    """

    def __init__(self, programs: Sequence[tuple[str, Sequence[str]]], folder: Path):
        self._files = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(len(programs))]
        self.processes = []
        for (code, arguments), files in zip(programs, self._files, strict=True):
            for file in files:
                file.touch()
            self.processes.append(Process(code, arguments, *files))

    def out(self, index: int) -> str:
        return self._files[index][0].read_text(errors="replace")

    def err(self, index: int) -> str:
        return self._files[index][1].read_text(errors="replace")

    def wait_for(self, index: int, pattern: str, timeout: float = 120) -> None:
        """Returns once host `index` has written to its stdout what a regular expression finds."""
        until = time.monotonic() + timeout
        while not re.search(pattern, self.out(index), re.DOTALL):
            ended = self.processes[index].poll() is not None
            assert not ended and time.monotonic() < until, f"no {pattern!r}: {self.out(index)}\n{self.err(index)}"
            time.sleep(0.05)

    def finish(self, timeout: float = 240) -> list[Ended]:
        """Waits for all of them; those that still run after `timeout` seconds are killed and have code -9."""
        until = time.monotonic() + timeout
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
        return [Ended(process.wait(), self.out(i), self.err(i)) for i, process in enumerate(self.processes)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextmanager
def snippet(code: str, *arguments: object, count: int = 2, devices: int = 2) -> Iterator[Hosts]:
    """Starts `count` hosts of `devices` devices that run `code`, which finds `arguments` from sys.argv[1] on.

    JAX knows of all of them by then. Whatever still runs when the block ends is killed.
    """
    port = free_port()
    words = [str(argument) for argument in arguments]
    with started([(CONNECT + code, [f"{port} {count} {index} {devices}", *words]) for index in range(count)]) as hosts:
        yield hosts


@contextmanager
def jaxclust(*arguments: object, count: int = 2, devices: int = 2) -> Iterator[Hosts]:
    """Starts `count` hosts of the command line, like `snippet`."""
    with snippet(MAIN, *arguments, count=count, devices=devices) as hosts:
        yield hosts


def all_well(hosts: Hosts, timeout: float = 240) -> list[Ended]:
    """Waits for the hosts, all of which must end with exit code 0."""
    ended = hosts.finish(timeout)
    words = "\n".join(f"--- host {i}: {host.code}\n{host.out}\n{host.err}" for i, host in enumerate(ended))
    assert [host.code for host in ended] == [0] * len(ended), words
    return ended


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def started(programs: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Hosts]:
    """Starts a host for each program, which is its code and its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Hosts(programs, Path(folder))
        try:
            yield hosts
        finally:
            hosts.kill()
