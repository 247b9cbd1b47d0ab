"""The plots of what a run logged, round after round."""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxclust.evaluation import clustering
from jaxclust.report.figures import Line, Panel
from jaxclust.report.workdir import Metrics

REFERENCE = "train/reference"  # the loss of random embeddings, logged where it is that of deep spectral clustering
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
    Family("ARI of each head", "train/head{}_ari", "train/heads_ari", SHARE),
)


def panels(metrics: Metrics, k: int | None) -> list[Panel]:
    """The plots for which the run has logged something; `k` clusters are asked for, 0 or None: as many as are found."""
    last = metrics.last()
    found = last.get("clusters/found", 0)
    among = clustering.outputs(*metrics.newest_loss(), None) or 0
    guess = (math.log(among), "guessing") if among > 1 else None
    k = k or int(found) or 1
    spread = [
        line._replace(y=line.y / k, end=f"{line.y[-1]:.0f} of {k}") for line in _lines(metrics, found="clusters/found")
    ]
    largest = _lines(metrics, largest="clusters/largest_share")
    plots = [
        Panel("loss", _lines(metrics, loss="train/loss", random=REFERENCE), None, guess),
        Panel("collapse: shares of clusters found and of the largest", spread + largest, SHARE),
        Panel("NMI to the previous round", _lines(metrics, NMI="clusters/nmi_prev"), SHARE),
        Panel("agreement with the labels", _lines(metrics, ACC="train/acc", NMI="train/nmi", ARI="train/ari"), SHARE),
        *(_of_heads(metrics, family) for family in HEADS),
        *_of_embeddings(metrics),
    ]
    return [panel for panel in plots if panel.lines]


def _of_embeddings(metrics: Metrics) -> list[Panel]:
    """What tells whether embeddings learn (DSCL, section 9): none of a run that logs no loss of random ones."""
    if REFERENCE not in metrics.last():
        return []
    logged = sorted({name for row in metrics.rows for name in row})
    rates = {name.removeprefix("lr/"): name for name in logged if name.startswith("lr/")}
    recalls = {name.removesuffix("/r@1"): name for name in logged if name.endswith("/r@1")}
    return [
        Panel("rank of the embeddings", _lines(metrics, effective="train/effective_rank", rank="train/rank")),
        Panel("condition number, power of ten", _powers(metrics, condition="train/condition")),
        Panel("length of the gradient, power of ten", _powers(metrics, gradient="train/gradient_norm")),
        Panel("steps that were skipped", _lines(metrics, skipped="train/skipped_steps")),
        Panel("learning rate, power of ten", _powers(metrics, **rates)),
        Panel("R@1", _lines(metrics, **recalls), SHARE),
    ]


def _powers(metrics: Metrics, **names: str) -> list[Line]:
    """Logarithms of what is over zero; the end of a line says the number itself."""
    lines = [line._replace(x=line.x[line.y > 0], y=line.y[line.y > 0]) for line in _lines(metrics, **names)]
    return [line._replace(y=np.log10(line.y), end=f"{line.y[-1]:.3g}") for line in lines if len(line.x)]


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
