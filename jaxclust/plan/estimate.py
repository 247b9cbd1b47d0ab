"""Times from published peaks. They are estimates: each constant here is an assumption that a plan prints."""

import math
from typing import NamedTuple

from jaxclust.plan.program import Collective, Program
from jaxclust.plan.topology import Topology

COMPUTE, TRAFFIC = 0.5, 0.8  # shares of the peak FLOP/s and of the memory's bandwidth that programs reach
HOP = 1e-6  # seconds from a chip to its neighbour
CORE = 40e9  # FLOP/s of one of a host's many cores in PCA and faiss; each of two does 72 and 88 (benchmarks/RESULTS.md)
EXACT = 12  # passes of kmeans_jax: six of bfloat16 for a float32 product, for the distances and for the sums
HOSTS = 1e9  # bytes per second that arrive at a host from all others

ASSUMPTIONS = (
    f"programs reach {COMPUTE:.0%} of the chip's peak FLOP/s or {TRAFFIC:.0%} of its memory's bandwidth, whichever is "
    f"slower; collectives run after it, over all links at once, with {1e6 * HOP:.0f} µs a hop; PCA and faiss reach "
    f"{CORE / 1e9:.0f} GFLOP/s on each core of a host; {HOSTS / 1e9:.0f} GB/s arrive at a host"
)


class Times(NamedTuple):
    """Seconds of one call of a program."""

    compute: float
    traffic: float
    collectives: float

    @property
    def total(self) -> float:
        """The slower of compute and memory, then the collectives: nothing of them is hidden behind the work."""
        return max(self.compute, self.traffic) + self.collectives


def times(program: Program, topology: Topology) -> Times | None:
    """Times of a program on a topology, None where no figures of its chip are published."""
    chip = topology.chip
    if chip is None:
        return None
    exchanged = sum(collective(one, topology) for one in program.collectives)
    return Times(program.flops / (COMPUTE * chip.flops), program.traffic / (TRAFFIC * chip.bandwidth), exchanged)


def collective(one: Collective, topology: Topology) -> float:
    """Seconds of a collective over all chips.

    Each chip sends (n - 1) / n of the bytes over all of its links at once, and waits for the farthest chip; an
    all-reduce does both twice (scatter and gather).
    """
    assert topology.chip is not None
    count = math.prod(topology.shape)
    if count == 1:
        return 0.0
    rings = [(side, side % topology.chip.ring == 0) for side in topology.shape if side > 1]
    bandwidth = topology.chip.link * sum(2 if ring else 1 for _, ring in rings)
    hops = sum(side // 2 if ring else side - 1 for side, ring in rings)
    passes = 2 if one.kind == "all-reduce" else 1
    return passes * (one.bytes * (count - 1) / count / bandwidth + HOP * hops)


class Kmeans(NamedTuple):
    """A k-means of `rows` x `dim` float32."""

    rows: int
    dim: int
    k: int
    searches: int  # passes over all rows: the iterations of all restarts, and the last assignment of each

    @property
    def flops(self) -> float:
        """Of all products of a row and a centroid."""
        return 2.0 * self.rows * self.dim * self.k * self.searches


def to_every_host(size: int, topology: Topology) -> float | None:
    """Seconds to bring so many bytes, of which each host has a part, to all hosts; None where there is but one."""
    return size / HOSTS if topology.chip and topology.hosts > 1 else None


def on_first_host(kmeans: Kmeans, topology: Topology) -> tuple[float, float] | None:
    """Seconds to bring the rows to host 0, and of faiss there."""
    if topology.chip is None:
        return None
    arriving = 4 * kmeans.rows * kmeans.dim / HOSTS if topology.hosts > 1 else 0.0
    return arriving, kmeans.flops / (CORE * topology.chip.cores)


def reduction(rows: int, width: int, dim: int, topology: Topology) -> float | None:
    """Seconds of PCA and projection of rows [N, width] to `dim`, each host with its own: moments, then products."""
    if topology.chip is None:
        return None
    return 2.0 * rows * width * (width + dim) / topology.hosts / (CORE * topology.chip.cores)


def on_all_chips(kmeans: Kmeans, topology: Topology) -> float | None:
    """Seconds of k-means sharded over the chips: the products, and a sum of the centroids after each pass."""
    if topology.chip is None:
        return None
    work = EXACT * kmeans.flops / len(topology.devices) / (COMPUTE * topology.chip.flops)
    return work + kmeans.searches * collective(Collective("all-reduce", 4 * kmeans.k * (kmeans.dim + 1)), topology)
