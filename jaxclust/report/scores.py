"""The figures of results.json as tables: agreement with the labels, and what each evaluation of features found."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxclust import plugins

AGREEMENT = {
    "acc": "share of images whose cluster stands for their class, after the best matching",
    "nmi": "normalised mutual information",
    "ari": "adjusted Rand index",
    "ami": "mutual information adjusted for chance",
    "purity": "share of images that belong to the commonest class of their cluster",
}
MEANINGS = {
    **AGREEMENT,
    "top1": "share of images whose class comes first; of linear probes after the last epoch",
    "top5": "share of images whose class is among the first five",
    "top1_best": "the best of all epochs, chosen by these very images",
    "top1_std": "standard deviation over the draws of labels",
    "best_epoch": "the epoch of top1_best",
    "loss": "mean of -ln of the probability of the class, after the last epoch",
    "map@r": "mean average precision among as many images as there are of the class",
    "r-precision": "share of as many most similar images as there are of the class that are of it",
}
READ_OUT = re.compile(r"((?:untrained/)?(?:train|test)(?:/\w+)?)/(r@\d+|map@r|r-precision|nmi)")


class Agreement(NamedTuple):
    """How far the clusters of a stage are the classes of a split, by the names of AGREEMENT."""

    stage: str
    split: str
    values: dict[str, float]


class Table(NamedTuple):
    """One evaluation: the cells of each row by column; a single row may have no name."""

    name: str
    columns: list[str]
    rows: dict[str, dict[str, str]]


def agreement(results: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Agreement with the labels by split and name; of an earlier stage by "<stage>/<split>"."""
    table: dict[str, dict[str, float]] = {}
    others, judged = (*_evaluations(), "untrained"), readouts(results)
    for key, value in results.items():
        split, _, name = key.rpartition("/")
        if name in AGREEMENT and split.partition("/")[0] not in others and split not in judged:
            table.setdefault(split, {})[name] = value
    return table


def by_stage(results: Mapping[str, float], stages: Sequence[str]) -> list[Agreement]:
    """Agreement with the labels of each of `stages`, in order; that of the last one has plain names in results.json."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, values in sorted(agreement(results).items(), key=lambda item: "/" not in item[0]):  # plain ones are newer
        stage, _, split = key.rpartition("/")
        found[stage or stages[-1], split] = values
    order = {stage: number for number, stage in enumerate(stages)}
    rows = [Agreement(stage, split, values) for (stage, split), values in found.items()]
    return sorted(rows, key=lambda row: order.get(row.stage, len(order)))


def comparisons(results: Mapping[str, float]) -> list[Table]:
    """A table for each evaluation that compares features: "<evaluation>/<row>/<column>" or "<evaluation>/<column>".

    That of `readouts`, whose keys begin with the split, comes first.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    for name, values in readouts(results).items():
        found.setdefault("readouts", {})[name] = {column: _shown(column, value) for column, value in values.items()}
    for key, value in results.items():
        name, _, rest = key.partition("/")
        row, _, column = rest.rpartition("/")
        if name in _evaluations():
            found.setdefault(name, {}).setdefault(row, {})[column] = _shown(column, value)
    return [
        Table(name, list(dict.fromkeys(column for cells in rows.values() for column in cells)), rows)
        for name, rows in found.items()
    ]


def readouts(results: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Retrieval and NMI of each read-out of features: "test", "test/spectral", "untrained/test" and so on."""
    found: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        if match := READ_OUT.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = value
    return {name: values for name, values in found.items() if any(column.startswith("r@") for column in values)}


def _evaluations() -> list[str]:
    return plugins.names("jaxclust.evaluation")  # of which none is imported


def _shown(column: str, value: float) -> str:
    return f"{value:,.0f}" if column in ("best_epoch", "queries", "left_out", "k") else f"{value:.4f}"
