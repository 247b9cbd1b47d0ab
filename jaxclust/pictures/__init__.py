"""Pictures of a run or of a sweep's runs, each a file of this folder, found by the name that `report.pictures` says.

A picture is a module with at least one of these functions:

    prepare(seen) -> draw
        of a run, from its network or its images;
    read(net) -> draw
        of a run, from files of its workdir alone, so that it is drawn at the end of a training too;
    compare(nets) -> draw
        of all runs of a sweep side by side, from files of their workdirs, after what they have of their own; also
        of a single run, if it is the only one of these functions.

Each checks all that can be wrong before any work starts, and gives back the function that writes the files of the
picture into an empty folder and says what of them a page shows. ConfigError: a setting is wrong, nothing is drawn.
DataError: this run has not what the picture is made from, it alone is left out; the drawing may say so too.
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

KINDS = ("prepare", "read", "compare")


class Seen(NamedTuple):
    """What pictures of a network are made from."""

    stage: Stage  # the last of the run, or the one that `report.stage` names; its split holds no images
    state: TrainState  # its newest checkpoint
    source: Callable[[], Source]  # the images; DataError where they are no longer there


def load(config: ConfigDict) -> dict[str, ModuleType]:
    """The pictures of `config.report.pictures` by name; ConfigError, which lists what there is, if one is unknown."""
    names = [name.strip() for name in config.report.pictures.split(",") if name.strip()]
    return {name: plugins.load("jaxclust.pictures", name, "config.report.pictures", KINDS) for name in names}
