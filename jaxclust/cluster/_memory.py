"""Whether work on one host fits into its memory, asked before it starts."""

from pathlib import Path

import numpy as np

from jaxclust import hosts
from jaxclust.errors import ConfigError

_REMEDY = (
    "Lower config.cluster.pca_dim or take a host with more memory; or set config.cluster.method=kmeans with "
    "config.cluster.backend=jax, which divides the points among the devices of all hosts, or "
    "config.cluster.method=minibatch, which streams them from disk."
)


def require(needed: int, what: str) -> None:
    """ConfigError on every host if host 0 cannot have `needed` bytes; every host must call it."""
    free = available()
    mine = needed if free is None else free
    there = int(hosts.total(np.asarray(mine if hosts.is_first() else 0)))
    if needed > there:
        raise ConfigError(
            f"{what} needs about {_gigabytes(needed)} of memory on one host, and {_gigabytes(there)} are available. "
            f"{_REMEDY}"
        )


def available(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still have: the machine's, or what its control groups leave; None if not known."""
    found = [_machine(root / "proc/meminfo"), *_groups(root)]
    return min((free for free in found if free is not None), default=None)


def _machine(path: Path) -> int | None:
    for line in _lines(path):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(root: Path) -> list[int | None]:
    """What each control group of this process leaves, version 1 and 2, from its own up to the root."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        own = base / name.lstrip("/")
        # In a container the group is often mounted as the root, whatever its name.
        for folder in dict.fromkeys([own, *(p for p in own.parents if p.is_relative_to(base)), base]):
            found.append(_group(folder, *names))
    return found


def _group(folder: Path, limit: str, usage: str) -> int | None:
    """Limit less usage, where pages of files do not count, since they can be dropped."""
    limits, usages = _lines(folder / limit), _lines(folder / usage)
    if not limits or not usages or limits[0] == "max":
        return None
    stat = dict(line.split() for line in _lines(folder / "memory.stat"))
    cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(int(limits[0]) - int(usages[0]) + cached, 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
