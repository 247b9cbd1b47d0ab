"""`config.groups`: two groups of classes, which are all that a method with labels="group" learns of labels."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import ConfigError

MOST = 1_000_000  # classes, so that a slip of the finger does not fill the memory
NAMED = 10  # in an error
EXAMPLE = "'0-4,5-9', or '0+2-4,1+5-9' where classes are not in a row"


def classes(text: str) -> tuple[list[int], list[int]]:
    """The classes of both groups of a text such as "0-4,5-9": of the first, P, and of the second, N.

    ConfigError if it cannot be read, or does not have two groups.
    """
    try:
        groups = [[label for part in group.split("+") for label in _span(part)] for group in text.split(",")]
    except ValueError:
        raise ConfigError(f"config.groups={text!r} must be two groups of class numbers, such as {EXAMPLE}") from None
    if len(groups) != 2:
        swept = "; in config.sweep in brackets: groups=(0-4,5-9)" if len(groups) == 1 else ""  # which parts at commas
        raise ConfigError(
            f"config.groups={text!r} has {len(groups)} groups and must have two, such as {EXAMPLE}{swept}"
        )
    return groups[0], groups[1]


def _span(part: str) -> range:
    first, _, last = part.strip().partition("-")
    if not int(first) <= int(last or first) < MOST:
        raise ValueError(part)
    return range(int(first), int(last or first) + 1)


def groups_of(text: str, num_classes: int) -> NDArray[np.int32]:
    """The group of each class, int32 [num_classes]: 1 for the first group, P, and 0 for the second, N.

    ConfigError unless each class is in one of them.
    """
    positive, negative = classes(text)
    found = Counter(positive + negative)
    wrong = {
        "are in both": set(positive) & set(negative),
        "are there twice": {label for label, count in found.items() if count > 1},
        "are in none": set(range(num_classes)) - set(found),
        "do not exist": set(found) - set(range(num_classes)),
    }
    for what, labels in wrong.items():
        if labels:
            named = ", ".join(map(str, sorted(labels)[:NAMED])) + ", …" * (len(labels) > NAMED)
            raise ConfigError(
                f"config.groups={text!r}: of the classes 0 to {num_classes - 1} each must be in one of two groups, and "
                f"these {what}: {named}"
            )
    of_class = np.zeros(num_classes, np.int32)
    of_class[positive] = 1
    return of_class
