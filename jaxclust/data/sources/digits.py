"""scikit-learn's digits: 1,797 grey images of 8 x 8 pixels, in its wheel; all are `train`, but for those that are asked
for as `test`."""

import numpy as np
from ml_collections import ConfigDict

from jaxclust.data.arrays import check, make_source
from jaxclust.data.split import Source
from jaxclust.errors import ConfigError

SIZE = 1797


def read(where: str, settings: ConfigDict) -> Source:
    """The digits with their values 0 … 16 scaled to 0 … 255; of "digits:N" always the same N random ones are `test`."""
    held = int(where) if where.isdecimal() and where.isascii() else 0
    if where and not 0 < held < SIZE:
        raise ConfigError(
            f"config.data.source='digits:{where}': after digits comes how many of the {SIZE:,} images are the test, "
            "such as 'digits:397', or nothing: all are trained on"
        )
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    test, train = np.split(np.random.RandomState(0).permutation(SIZE), [held])
    ids = {"train": np.sort(train), "test": np.sort(test)} if held else {"train": np.arange(SIZE)}
    splits = {name: check(images[of], digits.target[of], "digits", settings.max_pixels) for name, of in ids.items()}
    return make_source("digits", splits, settings)
