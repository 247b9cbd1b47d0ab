"""Runs the evaluations that a config names.

An evaluation is a module of this folder with `measure(predictions, labels, config, rows) -> {name: value}`; its
module name is the name by which `evaluate.suite` asks for it.
"""

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxclust import plugins
from jaxclust.cluster.reduce import Chunked
from jaxclust.errors import ConfigError, DataError


def evaluate(
    predictions: Mapping[str, ArrayLike], labels: ArrayLike | None, config: Any, rows: Callable[[], Chunked]
) -> dict[str, float]:
    """Runs every evaluation of `config.evaluate.suite` (comma separated) and joins the results.

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
    chosen = load(config)
    if labels is not None and not (np.asarray(labels) >= 0).any():
        labels = None
    rows = functools.cache(rows)
    results: dict[str, float] = {}
    for name, module in chosen.items():
        results |= _run(name, module, predictions, labels, config, rows)
    return results


def load(config: Any) -> dict[str, ModuleType]:
    """The evaluations of `config.evaluate.suite` by name; ConfigError if one is unknown."""
    names = [name.strip() for name in config.evaluate.suite.split(",") if name.strip()]
    field = "config.evaluate.suite"
    return {name: plugins.load("jaxclust.evaluation", name, field, "measure") for name in names}


def _run(
    name: str,
    module: ModuleType,
    predictions: Mapping[str, ArrayLike],
    labels: ArrayLike | None,
    config: Any,
    rows: Callable[[], Chunked],
) -> dict[str, float]:
    try:
        return module.measure(predictions, labels, config, rows)
    except (ConfigError, DataError) as error:  # keep the type: it decides the exit code
        raise type(error)(f"evaluation {name!r}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"evaluation {name!r} failed: {error!r}") from error
