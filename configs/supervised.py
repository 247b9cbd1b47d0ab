"""Training with class labels, for comparison and for `init_from` of other methods.

python -m jaxclust.main --config=configs/supervised.py
python -m jaxclust.main --config=configs/supervised.py:imagenette --config.data.source=folder:imagenette2
python -m jaxclust.main --config=configs/deepcluster.py:imagenette --config.init_from=RUN --config.freeze_body=True \
    --workdir=runs/frozen
"""

from ml_collections import ConfigDict

from jaxclust import config as c


def get_config(variant: str = "") -> ConfigDict:
    """The default learns the classes of scikit-learn's 8 x 8 digits; variants are separated by commas."""
    config = c.base()
    config.method = config.stages = "supervised"
    config.sampler = "uniform_image"
    config.batch_size = 64
    config.rounds = 20
    config.optimizer.body.schedule = config.optimizer.top.schedule = "cosine"
    config.optimizer.top.lr = 1e-2
    view = config.views.train
    view.rotate, view.scale, view.shear, view.translate = 15.0, 0.2, 12.0, 0.125
    return c.apply_variants(config, variant, {"folder": folder, "imagenette": imagenette, "smoke": smoke})


def folder(config: ConfigDict) -> None:
    """Photos in class folders, seen at 64 x 64."""
    config.data.source = "folder:photos"
    config.data.image_size, config.data.channels = 64, 3
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    view = config.views.train
    view.crop_area, view.flip = 0.35, 0.5
    view.rotate, view.scale, view.shear, view.translate = 0.0, 0.0, 0.0, 0.0


def imagenette(config: ConfigDict) -> None:
    """Ten classes of ImageNet with a VGG16, Adam for the body and SGD for the top."""
    folder(config)
    config.data.source = "folder:imagenette2"
    config.data.image_size = 224
    config.views.train.crop_area = 0.08
    config.model.name = "vgg16"
    config.batch_size = config.eval_batch_size = 64
    config.rounds = 40
    config.optimizer.body.lr = 1e-4
    config.optimizer.top.name, config.optimizer.top.lr = "sgd", 0.01


def smoke(config: ConfigDict) -> None:
    """Two short rounds of a tiny network on tiny images."""
    config.rounds = 2
    config.refresh_every = "20 steps"
    config.data.image_size = min(config.data.image_size, 32)
    config.model.width = 8
    config.model.dim = 32
