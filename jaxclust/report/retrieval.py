"""retrieval.md: R@K and NMI of every read-out, before and after training, as papers print them."""

import re
from collections.abc import Mapping
from typing import Any

from jaxclust.report import scores

CARS196 = {  # R@1, R@2, R@4 and R@8 in percent: section 11 of the specification of DSCL
    "the original repository's own run": (45.91, 58.60, 70.74, 80.88),
    "the paper's DSCL": (67.54, 77.77, 85.74, 90.95),
    "the paper's DSCL, spectral (quoted from memory)": (73.07, 82.19, 89.01, 93.06),
}
AT = ("r@1", "r@2", "r@4", "r@8")
LAST = ("map@r", "r-precision", "nmi")  # columns behind those of recall


def table(results: Mapping[str, float], config: Mapping[str, Any]) -> str:
    """A Markdown table of the read-outs in results.json, in percent; "" if there are none.

    Where the test is that of CARS196, published figures stand below it.
    """
    found = scores.readouts(results)
    if not found:
        return ""
    names = {name for values in found.values() for name in values}
    recalls = sorted(names - {*LAST}, key=lambda name: int(name.removeprefix("r@")))
    columns = [*recalls, *(name for name in LAST if name in names)]
    rows = {_title(key): values for key, values in sorted(found.items(), key=lambda item: _order(item[0]))}
    if config["data"]["source"].startswith(("cars196:", "tfds:cars196")) and results.get("test/queries") == 8131:
        rows |= {f"{name} | test | ": dict(zip(AT, values, strict=True)) for name, values in _shares().items()}
    lines = [f"| network | images | read-out | {' | '.join(columns)} |", "|---" * (3 + len(columns)) + "|"]
    lines += [
        f"| {row} | {' | '.join(_percent(values.get(name)) for name in columns)} |" for row, values in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _shares() -> dict[str, tuple[float, ...]]:
    return {name: tuple(value / 100 for value in values) for name, values in CARS196.items()}


def _parts(key: str) -> tuple[bool, str, str]:
    """Whether the network is trained, the split and the read-out of a key such as "untrained/test/spectral"."""
    match = re.fullmatch(r"(untrained/)?(\w+)(?:/(\w+))?", key)
    assert match is not None
    return match[1] is None, match[2], match[3] or "l2"


def _order(key: str) -> tuple[str, str, bool]:
    """One read-out after the other, in the order of names; the untrained network first."""
    trained, split, readout = _parts(key)
    return split, readout, trained


def _title(key: str) -> str:
    trained, split, readout = _parts(key)
    return f"{'trained' if trained else 'untrained'} | {split} | {readout}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
