"""RESULTS.md: a section for each benchmark, replaced when it runs again."""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxclust.files import replacing

HERE = Path(__file__).parent
BUSY = 0.1  # more than the system itself needs
PACKAGES = ("jax", "tensorflow-cpu", "faiss-cpu", "torch", "scikit-learn", "Pillow", "numpy")
HEAD = """# Results

Made by `make bench`. Every figure stands beside that of a peer in the same run: the sides take turns (A B A B …), each
in a process of its own, and a ratio is the median over the turns with the least and the greatest in brackets. A ratio
above 1 means that jaxclust is faster. The sections on UAD and SPICE are made by the commands that
stand in them.
"""


class Spread(NamedTuple):
    """The median of a few figures, and their range."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(self.low)}–{number(self.high)})"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Iterable[float]) -> Spread:
    """Median, least and greatest."""
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times as fast we are, from the seconds of the same turns."""
    return spread(a / b for a, b in zip(theirs, ours, strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def gigabytes(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.2f} GB"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    summary = (doc or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--results", type=Path, default=HERE / "RESULTS.md", help="file whose section is replaced")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, and in `busy` the share of the processor that others use before the measurement begins."""
    options = parser.parse_args()
    options.busy = 0.0 if options.quick else busy()
    if options.busy > BUSY:
        print(_warning(options.busy), flush=True)
    return options


def publish(options: argparse.Namespace, title: str, command: str, text: str) -> None:
    """Prints the section `title` and puts it into the file, in place of the one that is there."""
    path: Path = options.results
    warning = f"\n\n**{_warning(options.busy)}**" if options.busy > BUSY else ""
    section = f"## {title}\n\n`{command}`, {datetime.date.today()}. {machine()}{warning}\n\n{text.strip()}\n"
    print(section, flush=True)
    known = path.read_text(encoding="utf-8") if path.exists() else HEAD
    head, *sections = re.split(r"^(?=## )", known, flags=re.MULTILINE)
    kept = [s for s in sections if not s.startswith(f"## {title}\n")]
    pieces = [head, *sorted([*kept, section])]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(piece.strip() + "\n" for piece in pieces), encoding="utf-8")


def machine() -> str:
    """Processor, memory and versions."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if installed(name))
    return (
        f"{_processor()}, {os.cpu_count()} cores, {gigabytes(memory)}; Python {platform.python_version()}, {versions}."
    )


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def busy(seconds: float = 2.0) -> float:
    """Share of all cores that was in use during a few seconds; 0 where the system does not tell."""

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)  # idle and waiting, all

    if not Path("/proc/stat").exists():
        return 0.0
    idle, everything = ticks()
    time.sleep(seconds)
    idle_later, everything_later = ticks()
    return 1 - (idle_later - idle) / max(everything_later - everything, 1)


def _warning(share: float) -> str:
    return (
        f"Others used {share:.0%} of the processor when this began: threads that wait for each other (PyTorch, faiss) "
        "suffer from it out of proportion, and the ratios are not to be trusted."
    )


def installed(distribution: str) -> bool:
    """Whether a package is there."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def has_torch() -> bool:
    """Whether the PyTorch side can run; says so once where it cannot."""
    found = importlib.util.find_spec("torch") is not None
    if not found:
        print("PyTorch is not installed (pip install 'jaxclust[bench]'): only our side is measured", flush=True)
    return found
