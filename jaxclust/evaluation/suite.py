"""Runs the evaluations that a config names.

An evaluation is a module of this folder; its name is that by which `evaluate.suite` asks for it. It has one of two
functions:

    measure(predictions, labels, config, rows) -> {name: value}
        judges what was predicted for one split, of every split and after every round of a training;
    compare(images, config) -> {name: value}
        judges the features by the labels, once, when the training is over; training and test images are there
        together, and linear probes of the network can be asked for. One that learns classes of the training images
        says so, `LEARNS_CLASSES = True`, and is refused where the test has none of these.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jaxclust import plugins
from jaxclust.cluster import Chunked
from jaxclust.cluster.reduce import Matrix
from jaxclust.errors import ConfigError, DataError, JaxclustError


class Seen(NamedTuple):
    """A split as a comparison sees it, by image id."""

    rows: Callable[[], Matrix]  # makes the features [N, D], of which each host has its own
    labels: NDArray[np.int32]  # [N], negative where unknown


class Images(NamedTuple):
    """What is compared: the training images, those of the test if there are any, and probes of the network."""

    train: Seen
    test: Seen | None
    probes: Callable[[], Mapping[str, Sequence[Mapping[str, float]]]]
    """Trains linear classifiers: {layer: [{"top1": ..., "top5": ..., "loss": ...} of each epoch]} on the test images,
    or without such on training images that are held out."""


def evaluate(
    predictions: Mapping[str, ArrayLike], labels: ArrayLike | None, config: Any, rows: Callable[[], Chunked]
) -> dict[str, float]:
    """Runs every `measure` of `config.evaluate.suite` (comma separated) and joins the results.

    Args:
      predictions: arrays by image id, at least `cluster` int [N].
      labels: int [N], negative where unknown, or None; without a single known label only what
        needs none is evaluated.
      rows: makes the features [N, D] of the images; called once at most, and only if an evaluation needs them.

    Raises:
      ConfigError: an evaluation is unknown.
      DataError: predictions and labels do not fit each other; the message names the evaluation.
      RuntimeError: an evaluation failed otherwise; the message names it and the cause.
    """
    labels = labels if has_labels(labels) else None
    rows = functools.cache(rows)
    results: dict[str, float] = {}
    for name, module in load(config).items():
        if hasattr(module, "measure"):
            results |= _run(name, module.measure, predictions, labels, config, rows)
    return results


def run_comparisons(images: Images, config: Any) -> dict[str, float]:
    """Runs every `compare` of `config.evaluate.suite` and joins the results; errors as `evaluate`.

    Features are made once for each split, and only if an evaluation needs them.
    """
    train = images.train._replace(rows=functools.cache(images.train.rows))
    test = images.test and images.test._replace(rows=functools.cache(images.test.rows))
    results: dict[str, float] = {}
    for name, module in _comparing(config).items():
        results |= _run(name, module.compare, Images(train, test, images.probes), config)
    return results


def load(config: Any) -> dict[str, ModuleType]:
    """The evaluations of `config.evaluate.suite` by name; ConfigError if one is unknown."""
    names = [name.strip() for name in config.evaluate.suite.split(",") if name.strip()]
    field, kinds = "config.evaluate.suite", ("measure", "compare")
    return {name: plugins.load("jaxclust.evaluation", name, field, kinds) for name in names}


def compares(config: Any) -> bool:
    """Whether `config.evaluate.suite` names an evaluation with `compare`."""
    return bool(_comparing(config))


def check(config: Any, labels: Mapping[str, ArrayLike | None]) -> None:
    """ConfigError if an evaluation is unknown or wants what is not there: labels of the training images (`labels` by
    split), or where it learns from these, a class of theirs in the test."""
    names = _comparing(config)
    if not names:
        return
    if not has_labels(labels["train"]):
        there = ", ".join(f"{split}: {_known(values):,} known" for split, values in labels.items())
        others = plugins.providing("jaxclust.evaluation", "measure")
        compare = "compare" if len(names) > 1 else "compares"
        raise ConfigError(
            f"config.evaluate.suite asks for {', '.join(names)}, which {compare} with class labels of the training "
            f"images, and config.data.source={config.data.source!r} has none ({there}). Two class folders or more are "
            f"labels, an .npz or a feature file has an array 'labels'. Without labels there is: {', '.join(others)}"
        )
    learning = [name for name, module in names.items() if getattr(module, "LEARNS_CLASSES", False)]
    if learning and has_labels(labels.get("test")) and not _classes(labels["train"]) & _classes(labels["test"]):
        raise ConfigError(
            f"config.evaluate.suite asks for {', '.join(learning)}, which learn classes from training images, and the "
            "test has none of these classes (config.data.train_classes). Classes that were never seen are judged by "
            "readouts or retrieval"
        )


def has_labels(labels: ArrayLike | None) -> bool:
    """Whether a single label is known."""
    return _known(labels) > 0


def _classes(labels: ArrayLike | None) -> set[int]:
    return set(np.unique(np.asarray(labels)).tolist()) - {-1}


def _known(labels: ArrayLike | None) -> int:
    return 0 if labels is None else int(np.count_nonzero(np.asarray(labels) >= 0))


def _comparing(config: Any) -> dict[str, ModuleType]:
    return {name: module for name, module in load(config).items() if hasattr(module, "compare")}


def _run(name: str, function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    try:
        return function(*arguments)
    except (ConfigError, DataError) as error:  # keep the type: it decides the exit code
        raise type(error)(f"evaluation {name!r}: {error}") from error
    except JaxclustError:  # stopped by a signal, a lost host, a loss that is not finite: nothing of the evaluation's
        raise
    except Exception as error:
        raise RuntimeError(f"evaluation {name!r} failed: {error!r}") from error
