"""Who is alive: each host writes a heartbeat into the key-value store of the job, and reads those of the others.

Beside it stands how far the host has got, since one that hangs may go on beating.
"""

import json
import math
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

BEATS, SECONDS_BETWEEN_BEATS = 6, 2.0  # at least so many until a silent host is lost, at least so often
_done = 0  # pieces of work of this process, see `tick`


class Place(NamedTuple):
    """Where a process stands among those of its job."""

    address: str  # HOST:PORT of host 0, which keeps the store
    processes: int
    process: int
    launcher: str = ""  # who says so, if not the command line


class End(NamedTuple):
    """Why the job ends: the exit code of all hosts, the host that is the cause, and what is said of it."""

    code: int
    host: int
    said: str


class Record(NamedTuple):
    """What a host tells of itself."""

    beat: int = 0
    machine: str = ""
    end: End | None = None
    done: int = 0


def tick() -> None:
    """Counts a piece of work that is done, on every host alike."""
    global _done
    _done += 1


@contextmanager
def uncounted() -> Iterator[None]:
    """What is done within the block, which other hosts do not do, does not count."""
    global _done
    before = _done
    try:
        yield
    finally:
        _done = before


class Heartbeats:
    """What the hosts tell each other. One thread talks, which may hang in it; another one looks and so counts time."""

    def __init__(self, place: Place, store: Any, seconds: float, patience: float = math.inf):
        """`store` has the methods of JAX's distributed client; a host is lost that is silent for so many seconds.

        After `patience` seconds in which no host gets any further the one that is behind the others hangs.
        """
        self.interval = min(seconds / BEATS, SECONDS_BETWEEN_BEATS)
        self.folder = f"jaxclust/{_token(place, store)}/"  # a host that slept through a restart of the job is not heard
        self.end: End | None = None  # of this host
        self.mute = 0.0  # seconds since the store last answered, as far as they were counted
        self._place, self._store, self._seconds, self._patience = place, store, seconds, patience
        self._work, self._still = list[int](), 0.0  # of all hosts, and for how long it has been so much
        self._talks, self._records = 0, dict[int, Record]()  # what the first thread heard
        self._heard = 0
        self._known = {host: Record() for host in range(place.processes) if host != place.process}
        self._silent = dict.fromkeys(self._known, 0.0)

    def talk(self) -> None:
        """Writes what this host tells of itself, and reads what the others do."""
        own = Record(self._talks + 1, socket.gethostname(), self.end, _done)
        self._store.key_value_set(f"{self.folder}host/{self._place.process}", json.dumps(own), allow_overwrite=True)
        found = self._store.key_value_dir_get(f"{self.folder}host/")
        self._records = {int(key.rpartition("/")[2]): _record(text) for key, text in found}
        self._talks += 1

    def look(self, passed: float) -> End | None:
        """Why this host must end, None while all is well; `passed` are the seconds since the last look."""
        self.mute = self.mute + passed if self._talks == self._heard else 0.0
        self._heard = self._talks
        for host, before in self._known.items():
            record = self._records.get(host, before)
            if record.beat != before.beat:
                self._silent[host] = 0.0
            elif self.mute <= 2 * self.interval:  # else nobody can be heard
                self._silent[host] += passed
            self._known[host] = record
        ends = [record.end for record in self._known.values() if record.end]
        if ends:
            return ends[0]
        silence = f"no sign of life for {self._seconds:g} s"
        if self.mute >= self._seconds:
            return End(1, 0, f"at {self._place.address} does not answer: {silence}")
        lost = [host for host in self._known if host not in self.living()]
        if lost:
            more = "".join(f", and so is {self.name(host)}" for host in lost[1:])
            return End(1, lost[0], f"is lost{more}: {silence}")
        return self._hanging(passed)

    def _hanging(self, passed: float) -> End | None:
        work = [self._records.get(host, Record()).done for host in range(self._place.processes)]
        self._still = self._still + passed if work == self._work else 0.0
        self._work = work
        if self._still < self._patience:
            return None
        behind = [host for host, done in enumerate(work) if done == min(work)]
        others = "like all others" if len(behind) == len(work) else "and the others wait for it"
        silence = f"nothing done for {self._patience:g} s (config.runtime.deadline)"
        return End(1, behind[0], f"hangs, {others}: {silence}")

    def living(self) -> list[int]:
        """The other hosts that are not lost."""
        return [host for host, seconds in self._silent.items() if seconds < self._seconds]

    def ended(self, host: int) -> End | None:
        """How `host` says that the job ends."""
        return self._records.get(host, Record()).end

    def name(self, host: int) -> str:
        """A host with its machine, if that is known."""
        machine = self._records.get(host, Record()).machine
        return f"host {host} ({machine})" if machine else f"host {host}"


def _token(place: Place, store: Any) -> str:
    """A word of this start of the job, the same on all hosts."""
    if place.process == 0:
        store.key_value_set("jaxclust/token", f"{time.time_ns():x}")
    token: str = store.blocking_key_value_get("jaxclust/token", 60_000)
    return token


def _record(text: str) -> Record:
    beat, machine, end, done = json.loads(text)
    return Record(beat, machine, End(*end) if end else None, done)
