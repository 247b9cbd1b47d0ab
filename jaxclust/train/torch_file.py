"""A body from a file of weights of torchvision or timm: every copy of it in a first state is filled."""

import csv
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts
from jaxclust.errors import ConfigError
from jaxclust.files import replacing
from jaxclust.methods.base import Method, TrainState
from jaxclust.models import pretrained
from jaxclust.models.pretrained import COUNTER, TORCH, Matched, Weights
from jaxclust.train.checkpoint import Snapshot

COPY = re.compile(r"(?:params|extra)\.(?:.*\.)?(?:body|batch_stats)\.(.+)")
"""Where leaves of a body are: its own, its batch statistics, and both once more in averages and key encoders."""


class File(NamedTuple):
    """A file and the stage that it is for."""

    weights: Weights
    config: ConfigDict  # of the stage
    stage: str
    workdir: Path

    def check(self, like: Snapshot, method: Method) -> None:
        """ConfigError unless the file is of the body of `like`, and the method needs no more than that."""
        if method.given:
            raise ConfigError(
                f"config.init_from={TORCH}{self.weights.path} is a body, and stage {self.stage!r} begins with "
                f"{' and '.join(method.given)} too: train them first, or name a run, --config.init_from=WORKDIR"
            )
        self._match(like)

    def give(self, like: Snapshot) -> Snapshot:
        """`like` with the body and batch statistics of the file, which is said, with a table weights-<stage>.csv."""
        leaves, matched = self._match(like)
        arrays = pretrained.load(self.config.model.name, self.weights, matched, leaves)
        if hosts.is_first():
            write(self.workdir / f"weights-{self.stage}.csv", self.weights, matched)
            print(summary(self.config, self.weights, matched), flush=True)

        def fill(path: tuple[Any, ...], leaf: Any) -> Any:
            array = arrays.get(_leaf(path))
            return leaf if array is None or array.shape != leaf.shape else _like(array, leaf)

        filled: TrainState = jax.tree_util.tree_map_with_path(fill, like.state)
        return like._replace(state=filled)

    def _match(self, like: Snapshot) -> tuple[dict[str, tuple[int, ...]], Matched]:
        if "body" not in like.state.params:
            raise ConfigError(
                f"config.init_from: config.data.source={self.config.data.source!r} holds vectors, which pass through "
                f"no body that {str(self.weights.path)!r} could fill"
            )
        parts = like.state.params["body"], like.state.extra.get("batch_stats", {})
        named = [found for part in parts for found in jax.tree_util.tree_leaves_with_path(part)]
        leaves = {_name(path): tuple(leaf.shape) for path, leaf in named}
        return leaves, pretrained.match(self.config, self.weights, leaves)


def _leaf(path: tuple[Any, ...]) -> str:
    """The name "<layer>.<leaf>" of a leaf of a body, empty for others."""
    found = COPY.fullmatch(_name(path))
    return found[1] if found else ""


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _like(array: np.ndarray, leaf: jax.Array) -> jax.Array:
    array = array.astype(leaf.dtype)
    return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])


def write(path: Path, weights: Weights, matched: Matched) -> None:
    """Every tensor of the file and every leaf of ours: tensor, its shape, the leaf that it fills, used or not."""
    of = {tensor: leaf for leaf, tensor in matched.used.items()}
    rows = [
        (weights.names[tensor], "x".join(map(str, shape)), of.get(tensor, ""), "used" if tensor in of else "unused")
        for tensor, shape in weights.shapes.items()
    ]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("tensor", "shape", "fills", "state"))
        writer.writerows([*rows, *(("", "", leaf, "missing") for leaf in matched.missing)])


def summary(config: ConfigDict, weights: Weights, matched: Matched) -> str:
    """What was used, in words, and a note if images are standardised otherwise than published weights know them."""
    name, counters = config.model.name, sum(tensor.endswith(COUNTER) for tensor in matched.unused)
    unused = [tensor for tensor in matched.unused if not tensor.endswith(COUNTER)]
    said = [
        f"{len(matched.used)} of its {len(weights.shapes)} tensors fill {name}",
        f"unused: {_listed(unused)}" + (f", and {counters} counters of batches" if counters else ""),
    ]
    if matched.missing:
        said.append(f"as it was drawn: {_listed(matched.missing)}")
    mean, std = pretrained.MEANS.get(name, pretrained.IMAGENET)
    words = f"{weights.path}: {'; '.join(said)}"
    if _same(config.data.mean, mean) and _same(config.data.std, std):
        return words
    return (
        f"{words}\nnote: published weights of {name} know images with config.data.mean={mean} and "
        f"config.data.std={std}, and here they have {config.data.mean} and {config.data.std}"
    )


def _same(numbers: tuple[float, ...], expected: tuple[float, ...]) -> bool:
    three = np.broadcast_to(numbers, 3) if len(numbers) in (1, 3) else np.full(3, np.nan)
    return bool(np.allclose(three, np.broadcast_to(expected, 3), atol=1e-3))


def _listed(names: list[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "nothing"
