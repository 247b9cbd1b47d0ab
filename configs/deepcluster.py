"""DeepCluster.

python -m jaxclust.main --config=configs/deepcluster.py
python -m jaxclust.main --config=configs/deepcluster.py:mnist --config.data.source=idx:FOLDER
python -m jaxclust.main --config=configs/deepcluster.py:folder --config.data.source=folder:PHOTOS --config.cluster.k=20
python -m jaxclust.main --config=configs/deepcluster.py:smoke
"""

from ml_collections import ConfigDict

from jaxclust import config as c


def get_config(variant: str = "") -> ConfigDict:
    """The default clusters scikit-learn's 8 x 8 digits; variants are separated by commas and apply in order."""
    config = c.base()
    config.batch_size = 64
    config.cluster.pca_dim = 16  # about the number of directions in which ten clusters of features differ
    config.cluster.runs = 20
    config.optimizer.body.schedule = "cosine"
    config.optimizer.top.lr = 1e-2  # the head begins anew every round and has one pass to learn
    view = config.views.train
    view.rotate, view.scale, view.shear, view.translate = 15.0, 0.2, 12.0, 0.125
    return c.apply_variants(config, variant, {"mnist": mnist, "folder": folder, "smoke": smoke})


def mnist(config: ConfigDict) -> None:
    """The 60,000 training digits of MNIST; the 10,000 test digits are only predicted."""
    config.data.source = "idx:data/mnist"
    config.batch_size = 128
    config.rounds = 18
    config.cluster.runs = 10
    config.cluster.whiten_power = 0.5


def folder(config: ConfigDict) -> None:
    """Photos of any size, seen at 64 x 64."""
    config.data.source = "folder:photos"
    config.data.image_size = 64
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.batch_size = 128
    config.cluster.pca_dim = 32
    view = config.views.train
    view.crop_area, view.flip = 0.35, 0.5
    view.brightness, view.contrast, view.saturation = 0.3, 0.3, 0.3
    view.rotate, view.scale, view.shear, view.translate = 0.0, 0.0, 0.0, 0.0


def smoke(config: ConfigDict) -> None:
    """Two short rounds of a tiny network."""
    config.rounds = 2
    config.refresh_every = "20 steps"
    config.model.width = 8
    config.model.dim = 32
    config.cluster.runs = 3
