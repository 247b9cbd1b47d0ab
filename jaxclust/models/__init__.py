"""Networks, each a file with `make(config) -> Flax module` found by its name.

A network maps standardised images [B, H, W, C] to features [B, D] *before* their last ReLU, and records the
map of each block (after ReLU, before pooling) under its name, `conv1` and so on, with `sow("maps", ...)`.
"""

from flax import linen as nn
from ml_collections import ConfigDict

from jaxclust import plugins


def get(config: ConfigDict) -> nn.Module:
    """The network that `config.model.name` names; ConfigError lists what there is."""
    return plugins.load("jaxclust.models", config.model.name, "config.model.name", "make").make(config)
