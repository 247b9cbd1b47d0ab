"""Classes are numbered from 0 on, whatever a source calls them."""

import logging
from collections.abc import Sequence

_logger = logging.getLogger(__name__)


def say_renumbered(place: object, classes: Sequence[int]) -> None:
    """Warns where the labels of `place`, of which these are all in rising order, are not 0, 1, … themselves."""
    if list(classes) != list(range(len(classes))):
        _logger.warning(
            "%s: labels from %d to %d, of %d classes, are numbered from 0 on",
            place,
            classes[0],
            classes[-1],
            len(classes),
        )
