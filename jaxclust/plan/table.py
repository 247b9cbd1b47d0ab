"""Plans as a table with a column for each topology."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Plan = Mapping[str, Any]
"""Figures by name, None where there is none: bytes, seconds, FLOPs and counts."""


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def time(value: float) -> str:
    """Seconds in the unit that reads best."""
    for unit, scale, least in (("h", 3600.0, 7200.0), ("min", 60.0, 120.0), ("s", 1.0, 1.0), ("ms", 1e-3, 1e-3)):
        if value >= least:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs" if value else "0 s"


def work(value: float) -> str:
    """FLOPs."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP"


def count(value: float) -> str:
    """A whole number, or one of three digits."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


class Row(NamedTuple):
    """A figure: its name in a plan, in words, how it is shown, and where it comes from."""

    name: str
    words: str
    show: Callable[[float], str]
    origin: str = "compiled"


ROWS = (
    Row("chips", "chips", count, ""),
    Row("hosts", "hosts", count, ""),
    Row("train/batch", "images a step", count, "config"),
    Row("train/batch_per_chip", "images a step and chip", count, "config"),
    Row("memory/parameters", "parameters", size),
    Row("memory/optimizer", "optimiser state", size),
    Row("memory/statistics", "statistics, whitening, centroids", size),
    Row("memory/batches", "batches under way", size),
    Row("memory/rows", "what steps say of images, for a round", size),
    Row("memory/temporaries", "activations and temporaries", size),
    Row("memory/program", "program", size),
    Row("memory/train", "**memory of a chip in training**", size),
    Row("memory/features", "memory of a chip in the feature pass", size),
    Row("memory/chip", "memory that a chip has", size, "machine"),
    Row("largest/batch_per_chip", "**largest batch of a chip that fits**", count),
    Row("largest/memory", "its memory", size),
    Row("train/flops", "FLOPs of a step, a chip", work),
    Row("train/traffic", "bytes read and written in a step, a chip", size),
    Row("train/collectives", "collectives in a step", count),
    Row("train/collective_bytes", "their bytes", size),
    Row("train/compute_seconds", "time for the FLOPs", time, "estimated"),
    Row("train/traffic_seconds", "time for the bytes", time, "estimated"),
    Row("train/collective_seconds", "time for the collectives", time, "estimated"),
    Row("train/seconds", "**a step**", time, "estimated"),
    Row("train/images_per_second", "**images/s of all chips**", count, "estimated"),
    Row("train/images_per_second_host", "images/s that a host must decode for that", count, "estimated"),
    Row("round/steps", "steps of a round", count, "config"),
    Row("round/train_seconds", "training of a round", time, "estimated"),
    Row("round/feature_seconds", "feature pass", time, "estimated"),
    Row("round/feature_bytes_host", "features on a host", size, "counted"),
    Row("round/bank_bytes", "memory bank on every host", size, "counted"),
    Row("round/bank_seconds", "time to bring it there", time, "estimated"),
    Row("round/reduce_seconds", "PCA of the features, on all hosts", time, "estimated"),
    Row("round/point_bytes", "points of a clustering, all images", size, "counted"),
    Row("round/gather_seconds", "k-means by faiss: they reach host 0", time, "estimated"),
    Row("round/faiss_seconds", "k-means by faiss on host 0", time, "estimated"),
    Row("round/sharded_seconds", "k-means by JAX on all chips", time, "estimated"),
    Row("round/label_bytes", "labels and distances to every host", size, "counted"),
    Row("round/label_seconds", "time for them", time, "estimated"),
)


def table(plans: Mapping[str, Plan]) -> str:
    """A Markdown table of plans by their topology."""
    lines = [["a chip", *plans, "origin"], ["---"] + ["---:"] * len(plans) + ["---"]]
    for row in ROWS:
        values = [plan.get(row.name) for plan in plans.values()]
        if any(value is not None for value in values):
            shown = ["-" if value is None else row.show(value) for value in values]
            lines.append([row.words, *shown, row.origin])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("| " + " | ".join(map(_padded, line, widths)) + " |" for line in lines) + "\n"


def _padded(text: str, width: int) -> str:
    if text.startswith("---"):
        return "-" * (width - 1) + text[-1]
    return text.ljust(width)
