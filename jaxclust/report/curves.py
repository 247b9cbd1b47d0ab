"""The plots of what a run logged, round after round."""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxclust.report.figures import Line, Panel
from jaxclust.report.workdir import Metrics

PSEUDO_ACCURACY = "train/accuracy"  # logged where the loss is a cross-entropy over the clusters
SHARE = (-0.03, 1.06)  # limits of what lies between 0 and 1


class Family(NamedTuple):
    """A metric of each of several heads, "{}" in place of its number, and their mean."""

    title: str
    each: str
    mean: str
    limits: tuple[float, float] | None = None


HEADS = (
    Family("loss of each head in training", "train/loss/head{}", "train/loss"),
    Family("loss of each head's own labels, which selects one", "heads/loss{}", "heads/loss"),
    Family("ACC of each head", "train/head{}_acc", "train/heads_acc", SHARE),
    Family("NMI of each head", "train/head{}_nmi", "train/heads_nmi", SHARE),
)


def panels(metrics: Metrics, k: int) -> list[Panel]:
    """The plots for which the run has logged something; `k` clusters are asked for, 0: as many as are found."""
    last = metrics.last()
    found = last.get("clusters/found", 0)
    guess = (math.log(found), "guessing") if found > 1 and PSEUDO_ACCURACY in last else None
    k = k or int(found) or 1
    spread = [
        line._replace(y=line.y / k, end=f"{line.y[-1]:.0f} of {k}") for line in _lines(metrics, found="clusters/found")
    ]
    largest = _lines(metrics, largest="clusters/largest_share")
    plots = [
        Panel("loss", _lines(metrics, loss="train/loss"), None, guess),
        Panel("collapse: shares of clusters found and of the largest", spread + largest, SHARE),
        Panel("NMI to the previous round", _lines(metrics, NMI="clusters/nmi_prev"), SHARE),
        Panel("agreement with the labels", _lines(metrics, ACC="train/acc", NMI="train/nmi", ARI="train/ari"), SHARE),
        *(_of_heads(metrics, family) for family in HEADS),
    ]
    return [panel for panel in plots if panel.lines]


def _lines(metrics: Metrics, **names: str) -> list[Line]:
    series = {label: metrics.series(name) for label, name in names.items()}
    return [Line(label, x, y) for label, (x, y) in series.items() if len(x)]


def _of_heads(metrics: Metrics, family: Family) -> Panel:
    """A thin line for each head, their mean, and the head that was selected, with a dot where it was."""
    number = re.compile(re.escape(family.each).replace(re.escape("{}"), r"(\d+)"))
    logged = {name for row in metrics.rows for name in row}
    each = {int(met[1]): metrics.series(name) for name in logged if (met := number.fullmatch(name))}
    rounds = {x for series in each.values() for x in series[0].tolist()}
    x, y = metrics.series(family.mean)
    of_heads = np.array([at in rounds for at in x.tolist()], bool)  # other stages have a loss too
    lines = [Line("mean", x[of_heads], y[of_heads])] if of_heads.any() else []
    at, head = _selection(metrics)
    dot = None
    if head in each:
        lines.append(Line(f"selected: {head}", *each[head]))
        dot = next(((x, y) for x, y in zip(*each[head], strict=True) if x == at), None)
    return Panel(family.title, lines, family.limits, None, [Line("", *each[head]) for head in sorted(each)], dot)


def _selection(metrics: Metrics) -> tuple[float, int]:
    """The round of the newest selection of a head, and the head; -1: none was."""
    rounds, losses = metrics.series("selected/loss")
    if not len(rounds):
        return -1.0, -1
    at = float(rounds[losses.argmin()])  # each selection lowers it
    return at, int(dict(zip(*metrics.series("selected/head"), strict=True)).get(at, -1))
