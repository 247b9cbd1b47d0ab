"""How well nets tell the groups apart, and their experts the classes of each, epoch after epoch (--acc_evol).

Section 2.9 of our specification of ClustNet; the accuracies are those of section 2.7.
"""

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxclust.errors import DataError
from jaxclust.features.score_file import Scores
from jaxclust.pictures import Draw
from jaxclust.pictures._plots import ROOM, SHARE, Bars, Line, Panel, bars, lines, save
from jaxclust.report import experiment
from jaxclust.report.experiment import Net
from jaxclust.report.gallery import Gallery

Epochs = Mapping[int, Mapping[str, float]]  # the measures of each epoch

CURVES = {"binary": ("binary accuracy", "--"), "acc_p": ("accuracy of P", "-"), "acc_n": ("accuracy of N", ":")}


def compare(nets: Sequence[Net]) -> Draw:
    """DataError where no net has scores."""
    if not any(experiment.files(net.workdir, experiment.of_split(net.config)) for net in nets):
        raise DataError(experiment.missing(nets[0]))
    return partial(draw, experiment.by_field(nets))


def draw(nets: Sequence[Net], folder: Path) -> Gallery:
    """accuracy.png, variation.png, and metrics.csv with all numbers."""
    found, skipped = measures(nets)
    split = experiment.of_split(nets[0].config)
    shown = [net for net in nets if net.number in found]
    write(folder / "metrics.csv", shown, found)
    images = [
        save(partial(lines, _panels(shown, found), 2), folder, "accuracy"),
        save(partial(bars, [_variation(shown, found)]), folder, "variation"),
    ]
    caption = (
        f"By the files of {split} in scores/: the share of right groups (dashed), and for P (solid) and N (dotted) "
        "the share of images whose expert stands for their class under the best pairing. Bars: the total variation, "
        "the sum of |a(t+1) - a(t)| over the epochs that a net has, without epoch 0, the untrained network. "
        "metrics.csv has the numbers."
    )
    return Gallery("Accuracy over epochs", caption, images, skipped=skipped)


def measures(nets: Sequence[Net]) -> tuple[dict[int, Epochs], tuple[str, ...]]:
    """The measures of all epochs of each net that has any by its number, and what was skipped."""
    found: dict[int, Epochs] = {}
    skipped: tuple[str, ...] = ()
    for net in nets:
        try:
            found[net.number], damaged = experiment.of_epochs(net, partial(_measured, net.config))
        except DataError as error:
            damaged = (f"{net.name}: {error}",)
        skipped += damaged
    if not found:
        raise DataError("; ".join(skipped))
    return found, skipped


def _measured(config: ConfigDict, _: int, scores: Scores) -> dict[str, float]:
    return experiment.measured(config, scores)


def _panels(nets: Sequence[Net], found: Mapping[int, Epochs]) -> list[Panel]:
    """The curves of all nets, each with the colour of its place."""
    panels = [
        Panel(title, _lines(nets, found, measure, style), SHARE)
        for measure, (title, style) in CURVES.items()
        if any(measure in values for net in nets for values in found[net.number].values())
    ]
    wrong = [line._replace(y=[1 - value for value in line.y], style="-") for line in _lines(nets, found, "binary", "-")]
    return [*panels, Panel("error: share of wrong groups", wrong)]


def _lines(nets: Sequence[Net], found: Mapping[int, Epochs], measure: str, style: str) -> list[Line]:
    return [Line(net.legend, *series(found[net.number], measure), place, style) for place, net in enumerate(nets)]


def series(epochs: Epochs, measure: str) -> tuple[list[int], list[float]]:
    """The epochs that have a measure, rising, and its values."""
    there = sorted(epoch for epoch, values in epochs.items() if measure in values)
    return there, [epochs[epoch][measure] for epoch in there]


def _variation(nets: Sequence[Net], found: Mapping[int, Epochs]) -> Bars:
    heights = [[variation(found[net.number], measure) for net in nets] for measure in CURVES]
    titles, names = [title for title, _ in CURVES.values()], [net.legend for net in nets]
    if len(names) * max(map(len, names)) > ROOM:
        names = [str(net.number) for net in nets]
    return Bars("total variation", np.array(heights), titles, names, False, xlabel="net")


def variation(epochs: Epochs, measure: str) -> float:
    """The total variation of a measure over epochs, from 1 on: files of train have no epoch 0."""
    trained = {epoch: values for epoch, values in epochs.items() if epoch > 0}
    return experiment.total_variation(series(trained, measure)[1])


def write(path: Path, nets: Sequence[Net], found: Mapping[int, Epochs]) -> None:
    """A row for each net and epoch: net, the settings that are swept, epoch, every measure."""
    measures = list(dict.fromkeys(m for epochs in found.values() for values in epochs.values() for m in values))
    with path.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("net", *nets[0].values, "epoch", *measures))
        for net in nets:
            for epoch, values in sorted(found[net.number].items()):
                cells = [f"{values[m]:.10g}" if m in values else "" for m in measures]
                writer.writerow((net.number, *net.values.values(), epoch, *cells))
