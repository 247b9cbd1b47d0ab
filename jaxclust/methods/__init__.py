"""Methods, one file per paper, each with `make(config, info) -> Method` found by its name.

A file may also have `solves(config) -> bool`: whether a training without steps learns something from labels.
"""

from ml_collections import ConfigDict

from jaxclust import plugins
from jaxclust.methods.base import DataInfo, Method


def get(config: ConfigDict, info: DataInfo) -> Method:
    """The method that `config.method` names; ConfigError lists what there is."""
    return plugins.load("jaxclust.methods", config.method, "config.method", "make").make(config, info)


def solves(config: ConfigDict) -> bool:
    """Whether the method of `config` learns although its training has no steps, as a closed form does."""
    module = plugins.load("jaxclust.methods", config.method, "config.method", "make")
    return bool(getattr(module, "solves", lambda config: False)(config))
