"""When a host dies, hangs or fails, all hosts end and say which one it was.

A collective waits forever for a host that is gone, and JAX notices late and without a name. So a thread of each host
looks at the heartbeats of the others, and ends the process when one is missing.
"""

import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from jaxclust.errors import HostError, JaxclustError, Stopped
from jaxclust.heartbeats import End, Heartbeats, Place

LAST_WORDS = 0.1  # seconds between talks of a host that is about to end, and so hears soon who else does
A_WEEK = 7 * 24 * 3600 * 1000  # milliseconds; who waits so long is ended by the watch


@contextmanager
def together(place: Place, store: Any, heartbeat: float, patience: float = math.inf) -> Iterator[None]:
    """Runs the block on all hosts: each waits for the others at its end, and ends when one of them does not get there.

    `store` has the methods of JAX's distributed client; `heartbeat` and `patience` are seconds without a sign of life
    of a host, and without work on any of them (see `Heartbeats`). An error ends the process here, so that nothing
    waits for hosts that are gone; only Stopped, which all hosts raise after the same step, passes.
    """
    watch = _Watch(place, store, heartbeat, patience)
    watch.start()
    try:
        yield
    except Stopped:
        watch.meet()
        raise
    except BaseException as error:
        watch.fail(error)
    watch.meet()


def connect(address: str, seconds: float) -> None:
    """OSError unless somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()


class _Watch:
    def __init__(self, place: Place, store: Any, heartbeat: float, patience: float):
        self._place, self._store, self._heartbeat = place, store, heartbeat
        self._beats = Heartbeats(place, store, heartbeat, patience)
        self._over, self._wake, self._leaving = threading.Event(), threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._guard)]

    def start(self) -> None:
        """Begins to talk and to look."""
        if self._place.process:
            _sleep_before_aborting()
        for thread in self._threads:
            thread.start()

    def meet(self) -> None:
        """Waits until every host is here, then stops watching."""
        try:
            self._store.wait_at_barrier(f"{self._beats.folder}end", A_WEEK)
        except Exception as error:
            self.fail(error)
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._beats.interval)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all hosts because of an error on this one, unless another host turns out to be its cause."""
        if isinstance(error, HostError) or not isinstance(error, JaxclustError | KeyboardInterrupt):
            time.sleep(self._heartbeat + 4 * self._beats.interval)  # if it is another host, the watch ends us here
        if isinstance(error, JaxclustError):
            code, said, words = error.exit_code, str(error), str(error)
        else:
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            words = "".join(traceback.format_exception(error))
            said = words.splitlines()[-1]
        self._leave(End(code, self._place.process, f"ended: {said}"), words)

    def _talk(self) -> None:
        while not self._over.is_set():
            with suppress(Exception):  # of any kind: what counts is that there is no answer
                self._beats.talk()
            self._wake.wait(LAST_WORDS if self._beats.end else self._beats.interval)
            self._wake.clear()

    def _guard(self) -> None:
        interval, before = self._beats.interval, time.monotonic()
        while not self._over.wait(interval / 2):
            now = time.monotonic()
            if now - before > self._heartbeat:
                self._print(f"this process was suspended for {now - before:.0f} s; others may have ended without it")
            # Who was suspended itself has heard nobody, and gives the others their time again.
            if end := self._beats.look(min(now - before, 2 * interval)):
                time.sleep(min(interval, 1.0))  # this host may be about to say the same of itself
                self._leave(end, f"{self._beats.name(end.host)} {end.said}")
            if self._place.process and self._beats.mute > 1.5 * interval and _refuses(self._place.address, interval):
                end = End(1, 0, f"at {self._place.address} has ended")
                self._leave(end, f"{self._beats.name(0)} {end.said}")
            before = now

    def _leave(self, end: End, words: str) -> NoReturn:
        """Tells the others of `end`, says `words` and ends the process; host 0, which keeps the store, goes last."""
        self._leaving.acquire()  # who comes second waits here for the end of the process
        own, beats = self._place.process, self._beats
        beats.end = end
        self._wake.set()
        if beats.mute <= beats.interval:
            _until(lambda: beats.ended(own) is not None, 2 * beats.interval)
        if own and end.host == own:
            _until(lambda: beats.ended(0) is not None, 2 * beats.interval)
        if not own or end.host != own or beats.ended(0) != end._replace(host=0):
            self._print(words)  # an error that all hosts have is left to the first
        if not own:
            living = beats.living()
            _until(lambda: all(beats.ended(host) for host in living), self._heartbeat)
            time.sleep(10 * LAST_WORDS)  # who ended before hears it too
        sys.stdout.flush()
        os._exit(end.code)

    def _print(self, words: str) -> None:
        own = f"host {self._place.process}: " if self._place.process else ""
        print(f"jaxclust: {own}{words}", file=sys.stderr, flush=True)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _refuses(address: str, seconds: float) -> bool:
    """Whether nobody listens any more; the store itself no longer answers when JAX has seen that, nor says why."""
    try:
        connect(address, seconds)
    except ConnectionRefusedError:
        return True
    except OSError:
        pass  # it may only be slow
    return False


def _sleep_before_aborting() -> None:
    """Lets an abort wait for sleep(SIGABRT), six seconds: JAX aborts as soon as host 0 is gone, and the watch says so.

    No Python runs there, since an abort may come at any place.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
