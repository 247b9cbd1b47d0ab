"""DSCL: embeddings learnt from some classes, by which images of other classes are found.

python -m jaxclust.main --config=configs/dscl.py
python -m jaxclust.main --config=configs/dscl.py:tiny --config.data.source=folder:TINYNET
python -m jaxclust.main --config=configs/dscl.py:cars196 --config.data.source=cars196:FOLDER \
    --config.init_from=torch:inception_v3.pth
python -m jaxclust.main --config=configs/dscl.py:cars196,closed_form --config.data.source=cars196:FOLDER \
    --config.init_from=torch:inception_v3.pth
python -m jaxclust.main --config=configs/dscl.py:seed --config.data.source=cars196:FOLDER \
    --config.init_from=torch:inception_v3.pth
python -m jaxclust.main --config=configs/dscl.py:smoke

Weights of Inception v3 trained on ImageNet (docs/pretrained.md) are what the last layer of cars196 and seed stands on.
`--job=report --workdir=RUN` draws what is seen and what is found.
"""

from ml_collections import ConfigDict

from jaxclust import config as c


def get_config(variant: str = "") -> ConfigDict:
    """The default is `digits`; variants are separated by commas and apply in order."""
    config = c.base()
    config.method = config.stages = "dscl"
    config.sampler = "pk"
    config.evaluate.suite, config.evaluate.untrained = "readouts", True
    config.evaluate.readouts = "raw,l2,spectral,njw"
    config.report.pictures = "batch,neighbours,spectral,projector"
    config.rounds = 0
    digits(config)
    variants = {
        "digits": digits, "tiny": tiny, "cars196": cars196, "end_to_end": end_to_end, "closed_form": closed_form,
        "paper_aug": paper_aug, "seed": seed, "smoke": smoke,
    }  # fmt: skip
    return c.apply_variants(config, variant, variants)


def digits(config: ConfigDict) -> None:
    """Digits 0 to 4 of scikit-learn's 8 x 8 are learnt from, by a small network; 5 to 9 are searched."""
    config.data.source, config.data.train_classes = "digits", "0-4"
    config.batch_size, config.dscl.small_batch_size, config.dscl.vector_size = 500, 500, 5
    config.dscl.bn, config.dscl.ridge = "small_batch", 0.1
    config.runtime.devices = 1  # of which one has the whole small batch
    config.optimizer.body.lr, config.optimizer.top.lr = 5e-4, 1e-3
    config.optimizer.body.schedule = config.optimizer.top.schedule = "cosine"
    config.steps, config.refresh_every, config.log_every = 200, "20 steps", "5 steps"
    config.eval_every = "20 steps"
    view = config.views.train
    view.rotate, view.scale, view.shear, view.translate = 15.0, 0.2, 12.0, 0.125


def tiny(config: ConfigDict) -> None:
    """The first 20 classes of a part of Tiny-ImageNet, seen at 32 x 32 by a ResNet-18; 19 others are searched.

    Embeddings of 64 numbers find images of other classes better than those of 20, one for each class learnt from.
    """
    config.data.source, config.data.train_classes = "folder:tinynet", "first:20"
    config.data.image_size, config.data.channels = 32, 3
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.model.name, config.model.stem, config.model.width = "resnet18", "small", 16
    config.batch_size, config.dscl.small_batch_size, config.dscl.vector_size = 400, 400, 64
    config.optimizer.body.lr, config.optimizer.top.lr = 1e-3, 1e-3
    config.steps, config.refresh_every, config.log_every = 200, "20 steps", "5 steps"
    config.eval_every = "100 steps"
    config.optimizer.body.schedule = config.optimizer.top.schedule = "cosine"
    view = config.views.train
    view.rotate, view.scale, view.shear, view.translate = 0.0, 0.0, 0.0, 0.0
    view.crop_area, view.flip = 0.4, 0.5


def cars196(config: ConfigDict) -> None:
    """The last layer on features of cars, cropped to their boxes: classes 1 to 98 are learnt from (section 6)."""
    config.data.source, config.data.train_classes = "cars196:data/cars196", "first:98"
    config.data.image_size, config.data.channels, config.data.num_images = 299, 3, 8_054
    config.data.stretch = True
    config.data.cache_bytes = 6 * 2**30  # all crops of 342 x 342
    config.data.mean, config.data.std = (0.5,), (0.5,)
    config.model.name = "inception_v3"
    config.freeze_body, config.frozen_views, config.runtime.devices = True, 4, 0
    config.batch_size, config.eval_batch_size, config.dscl.vector_size = 6000, 64, 98
    config.dscl.small_batch_size, config.dscl.bn, config.dscl.ridge = 60, "frozen", 0.0
    config.steps, config.refresh_every, config.log_every = 400, "10 steps", "1 step"
    config.eval_every = "50 steps"
    config.optimizer.top.name, config.optimizer.top.lr = "adam", 1e-3
    config.optimizer.body.schedule = config.optimizer.top.schedule = "none"
    view = config.views.train
    view.rotate, view.scale, view.shear, view.translate = 0.0, 0.0, 0.0, 0.0
    view.crop_area, view.crop_area_max, view.flip = 0.4, 0.95, 0.5


def end_to_end(config: ConfigDict) -> None:
    """The body learns too, slowly."""
    config.freeze_body, config.frozen_views = False, 0
    config.batch_size = 1260
    config.dscl.small_batch_size = 70
    config.optimizer.body.name, config.optimizer.body.lr = "adam", 1e-5
    config.optimizer.top.name, config.optimizer.top.lr = "adam", 1e-4


def closed_form(config: ConfigDict) -> None:
    """The last layer is solved for, without a step, on all images."""
    config.freeze_body, config.frozen_views = True, 0
    config.rounds = config.steps = 0
    config.dscl.solver, config.dscl.ridge = "closed_form", 1e-2


def paper_aug(config: ConfigDict) -> None:
    """Crops of 227 anywhere in images of 259 pixels, and mirror images, as comparisons say of the paper."""
    config.data.image_size = 227
    view = config.views.train
    view.crop_area, view.crop_area_max, view.crop_shift, view.flip = 0.0, 1.0, 1.0, 0.5


def seed(config: ConfigDict) -> None:
    """The command that the user gave: 100 small batches of 60, a last layer of 98 numbers by plain SGD."""
    cars196(config)
    config.sampler, config.evaluate.save_retrieval = "uniform_image", True
    config.steps = 400
    config.dscl.dropout_rate, config.dscl.init = 0.3, "upstream"
    config.dscl.grad_scale, config.dscl.mean_gradient = 0.5, True
    top = config.optimizer.top
    top.name, top.lr, top.momentum = "sgd", 1e-5, 0.0


def smoke(config: ConfigDict) -> None:
    """Two short rounds of a tiny network on tiny images."""
    config.steps = min(config.steps, 20)
    config.refresh_every = "10 steps"
    config.data.image_size = min(config.data.image_size, 32)
    config.model.name, config.model.width, config.model.dim = "convnet", 8, 32
    config.batch_size, config.eval_batch_size = 120, 120
    config.dscl.small_batch_size, config.dscl.vector_size = 60, 5
