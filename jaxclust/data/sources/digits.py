"""scikit-learn's digits: 1,797 grey images of 8 x 8 pixels, in its wheel; all are `train`."""

import numpy as np
from ml_collections import ConfigDict

from jaxclust.data.arrays import check, make_source
from jaxclust.data.split import Source
from jaxclust.errors import ConfigError


def read(where: str, settings: ConfigDict) -> Source:
    """The digits with their values 0 … 16 scaled to 0 … 255."""
    if where:
        raise ConfigError(f"config.data.source='digits:{where}': digits takes no place; write 'digits'")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return make_source("digits", {"train": check(images, digits.target, "digits", settings.max_pixels)}, settings)
