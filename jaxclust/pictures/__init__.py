"""Pictures of a run that need its network, each a file of this folder, found by the name that `report.pictures` says.

A picture is a module with one function:

    prepare(seen) -> draw

which checks all that can be wrong before any work starts, and gives back the function that writes the files of the
picture into an empty folder and says what of them a page shows. ConfigError: a setting is wrong, nothing is drawn.
DataError: this run has not what the picture is made from, it alone is left out.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxclust import plugins
from jaxclust.data.source import Source
from jaxclust.methods.base import TrainState
from jaxclust.report.gallery import Gallery
from jaxclust.train.stage import Stage

Draw = Callable[[Path], Gallery]


class Seen(NamedTuple):
    """What pictures are made from."""

    stage: Stage  # the last of the run, or the one that `report.stage` names; its split holds no images
    state: TrainState  # its newest checkpoint
    source: Callable[[], Source]  # the images; DataError where they are no longer there


def load(config: ConfigDict) -> dict[str, ModuleType]:
    """The pictures of `config.report.pictures` by name; ConfigError, which lists what there is, if one is unknown."""
    names = [name.strip() for name in config.report.pictures.split(",") if name.strip()]
    return {name: plugins.load("jaxclust.pictures", name, "config.report.pictures", "prepare") for name in names}
