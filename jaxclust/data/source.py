"""`config.data.source` to a `Source`."""

from pathlib import Path

from ml_collections import ConfigDict

from jaxclust import plugins
from jaxclust.data.split import Skipped, Source, Split

__all__ = ["Skipped", "Source", "Split", "files_of", "open_source"]


def open_source(config: ConfigDict) -> Source:
    """Opens `config.data.source`, KIND or KIND:PLACE, and fixes which images there are.

    ConfigError on an unknown kind; DataError if the data are missing, malformed or worse than
    `config.data.max_skipped` allows.
    """
    kind, _, where = config.data.source.partition(":")
    module = plugins.load("jaxclust.data.sources", kind, "config.data.source", "read")
    source: Source = module.read(where, config.data)
    return source


def files_of(config: ConfigDict) -> Path | None:
    """The folder that the images of `config.data.source` are files in, None if they are not."""
    kind, _, where = config.data.source.partition(":")
    return Path(where).expanduser() if kind == "folder" else None
