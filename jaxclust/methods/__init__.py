"""Methods, one file per paper, each with `make(config, info) -> Method` found by its name."""

from ml_collections import ConfigDict

from jaxclust import plugins
from jaxclust.methods.base import DataInfo, Method


def get(config: ConfigDict, info: DataInfo) -> Method:
    """The method that `config.method` names; ConfigError lists what there is."""
    return plugins.load("jaxclust.methods", config.method, "config.method", "make").make(config, info)
