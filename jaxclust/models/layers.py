"""The pieces that networks share, so that each constant stands in one place."""

from typing import Any

from flax import linen as nn

from jaxclust.runtime import AXIS

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""N(0, sqrt(2 / (k * k * C_out))) (He et al. 2015, fan-out)."""

dense_init = nn.initializers.normal(0.01)
"""N(0, 0.01^2), as DeepCluster draws every dense layer."""


def batch_norm(train: bool, **kwargs: Any) -> nn.BatchNorm:
    """Batch norm over all devices; epsilon 1e-5, running statistics keep 0.9 (PyTorch's 0.1)."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, axis_name=AXIS, **kwargs)
