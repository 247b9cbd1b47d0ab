"""Classes that are trained on, and others that only the test has: retrieval of what was never seen."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from jaxclust.data.split import Source, Split
from jaxclust.data.subset import joined, subset
from jaxclust.errors import ConfigError
from jaxclust.hints import did_you_mean

_logger = logging.getLogger(__name__)

FORMS = "'0,2,5-9' (places of classes in their order, from 0), names, 'first:98', or a share such as '0.5'"


def disjoint(source: Source, text: str, first: Sequence[str]) -> Source:
    """`source` with all images of some classes as "train" and those of the others as "test", whatever split has them.

    `text` is `config.data.train_classes`, see `places`. The splits called `first` come first, then the others, each in
    the order of its ids. Classes are numbered anew: 0 to `source.trained` - 1 are trained on and the others follow,
    both in their old order, so that a label still is the place of its class in `class_names`. An image without a label
    is of no class and is left out. ConfigError if there are no labels, a class does not exist, or either side has no
    class or no image.
    """
    if source.class_names is None:
        raise ConfigError(
            f"config.data.train_classes={text!r} needs images with classes, and {source.name} has no labels. Class "
            "folders are labels, an .npz or a feature file has an array 'labels'"
        )
    trained = np.zeros(len(source.class_names), bool)
    trained[places(text, source.class_names)] = True
    splits = {name: source.splits[name] for name in (*first, *(n for n in source.splits if n not in first))}
    order = np.argsort(~trained, kind="stable")
    number = np.argsort(order).astype(np.int32)
    labels = {name: np.full(s.size, -1) if s.labels is None else s.labels for name, s in splits.items()}
    kept = {name: (found >= 0) & trained[found] for name, found in labels.items()}
    left = {name: (found >= 0) & ~trained[found] for name, found in labels.items()}
    sizes = [sum(int(of.sum()) for of in side.values()) for side in (kept, left)]
    if not all(sizes):
        raise ConfigError(
            f"config.data.train_classes={text!r} takes {trained.sum()} of {len(trained)} classes of {source.name} with "
            f"{sizes[0]:,} images to train on, and leaves {sizes[1]:,} images for the test; both need some"
        )
    if lost := sum(split.size for split in splits.values()) - sum(sizes):
        _logger.warning("%d images without a label are of no class: data.train_classes leaves them out", lost)
    return source._replace(
        splits={name: _part(splits, side, number) for name, side in (("train", kept), ("test", left))},
        class_names=tuple(source.class_names[i] for i in order),
        parts={name: int(of.sum()) for name, of in kept.items()},
        trained=int(trained.sum()),
    )


def places(text: str, names: Sequence[str]) -> list[int]:
    """The classes of a text such as "0,2,5-9", "cat,dog", "first:98" or "0.5", as places in `names`.

    A number is a place in the order of the classes, whatever they are called. A share is of the classes in their order,
    rounded. ConfigError on anything else and on a class that does not exist.
    """
    if share := re.fullmatch(r"0?\.\d+", text.strip()):
        return list(range(round(float(share[0]) * len(names))))
    if head := re.fullmatch(r"first:(\d+)", text.strip()):
        _check_place(text, int(head[1]) - 1, names)
        return list(range(int(head[1])))
    return [place for part in text.split(",") for place in _span(text, part.strip(), names)]


def _span(text: str, part: str, names: Sequence[str]) -> Iterable[int]:
    numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
    if numbers is None:
        if part not in names:
            hint = did_you_mean(part, names)
            raise ConfigError(f"config.data.train_classes={text!r}: there is no class {part!r}{hint} Give {FORMS}.")
        return [names.index(part)]
    low, high = int(numbers[1]), int(numbers[2] or numbers[1])
    if high < low:
        raise ConfigError(f"config.data.train_classes={text!r}: {part!r} ends before it begins. Give {FORMS}.")
    _check_place(text, high, names)
    return range(low, high + 1)


def _check_place(text: str, place: int, names: Sequence[str]) -> None:
    if not 0 <= place < len(names):
        raise ConfigError(
            f"config.data.train_classes={text!r}: there are {len(names)} classes, 0 ({names[0]!r}) to "
            f"{len(names) - 1} ({names[-1]!r}). Give {FORMS}."
        )


def _part(splits: Mapping[str, Split], of: Mapping[str, NDArray[np.bool_]], number: NDArray[np.int32]) -> Split:
    """The images that `of` says, bool by id, of all splits as one; class c is then called number[c]."""
    made = joined([subset(split, np.flatnonzero(of[name])) for name, split in splits.items() if of[name].any()])
    assert made.labels is not None
    return replace(made, labels=number[made.labels])
