"""DeepCluster.

python -m jaxclust.main --config=configs/deepcluster.py
python -m jaxclust.main --config=configs/deepcluster.py:mnist --config.data.source=idx:FOLDER
python -m jaxclust.main --config=configs/deepcluster.py:folder --config.data.source=folder:PHOTOS --config.cluster.k=20
python -m jaxclust.main --config=configs/deepcluster.py:cifar10
python -m jaxclust.main --config=configs/deepcluster.py:imagenette --config.data.source=folder:imagenette2
python -m jaxclust.main --config=configs/deepcluster.py:imagenet --config.data.source=folder:IMAGENET
python -m jaxclust.main --config=configs/deepcluster.py:v2 --config.data.source=folder:IMAGENET
python -m jaxclust.main --config=configs/deepcluster.py:v2_digits
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
    variants = {
        "mnist": mnist, "folder": folder, "cifar10": cifar10, "imagenette": imagenette, "imagenet": imagenet,
        "v2": v2, "v2_digits": v2_digits, "smoke": smoke,
    }  # fmt: skip
    return c.apply_variants(config, variant, variants)


def mnist(config: ConfigDict) -> None:
    """The 60,000 training digits of MNIST; the 10,000 test digits are only predicted."""
    config.data.source = "idx:data/mnist"
    config.data.num_images = 60_000
    config.batch_size = 128
    config.rounds = 18
    config.cluster.runs = 10
    config.cluster.whiten_power = 0.5


def folder(config: ConfigDict) -> None:
    """Photos of any size, seen at 64 x 64; the number of clusters is yours to say, or to find with --job=sweep."""
    config.data.source = "folder:photos"
    config.data.image_size = 64
    config.cluster.k = 0
    config.batch_size = 128
    config.cluster.pca_dim = 32
    natural(config)
    view = config.views.train
    view.crop_area = 0.35
    view.brightness, view.contrast, view.saturation = 0.3, 0.3, 0.3


def cifar10(config: ConfigDict) -> None:
    """CIFAR-10 from TFDS, or from class folders, with a ResNet-18 for small images."""
    folder(config)
    config.data.source = "tfds:cifar10"
    config.data.num_images = 50_000
    config.data.image_size = 32
    config.cluster.k = 10
    config.model.name, config.model.stem = "resnet18", "small"


def imagenette(config: ConfigDict) -> None:
    """Ten classes of ImageNet with a VGG16, Adam for the body and SGD for the top; k is the number of classes."""
    published(config)
    config.data.source = "folder:imagenette2"
    config.data.num_images = 9_469
    config.model.name = "vgg16"
    config.cluster.k = 10
    config.batch_size = config.eval_batch_size = 64
    config.rounds = 40
    body = config.optimizer.body
    body.name, body.lr, body.wd = "adam", 1e-4, 0.0
    config.optimizer.top.lr = 0.01  # at 0.05 the new head of a round is still worse than guessing when the round ends


def imagenet(config: ConfigDict) -> None:
    """The paper's ImageNet run: AlexNet on Sobel gradients, 10,000 clusters (its tables took 500 rounds)."""
    published(config)
    config.data.source = "folder:imagenet"
    config.data.num_images = 1_281_167
    config.model.name, config.model.sobel = "alexnet", True
    config.cluster.k = 10_000
    config.rounds = 200


def v2(config: ConfigDict) -> None:
    """DeepCluster-v2 as published: ResNet-50, two large and six small crops, batches of 4,096, 800 rounds."""
    imagenet(config)
    second_version(config)
    config.model.name, config.model.sobel = "resnet50", False
    config.cluster.k, config.cluster.iterations = 3000, 10
    config.batch_size, config.rounds = 4096, 800
    body = config.optimizer.body
    body.name, body.lr, body.wd, body.weight_decay = "lars", 4.8, 0.0, 1e-6
    body.schedule, body.min_lr, body.warmup, body.warmup_lr = "cosine", 0.0048, "10 epochs", 0.3
    large, small = config.views.large, config.views.small
    large.crop_area, large.flip, large.grey, large.blur = 0.14, 0.5, 0.2, 0.5
    large.jitter, large.brightness, large.contrast, large.saturation, large.hue = 0.8, 0.8, 0.8, 0.8, 0.2
    small.update(large)
    small.number, small.size, small.crop_area, small.crop_area_max = 6, 96, 0.05, 0.14
    large.number = 2
    frozen_prototypes(config)


def v2_digits(config: ConfigDict) -> None:
    """DeepCluster-v2 of the digits that the default clusters."""
    second_version(config)
    config.rounds = 30
    config.optimizer.body.lr = 3e-3
    config.deepcluster_v2.hidden, config.deepcluster_v2.dim = 128, 32
    large, small = config.views.large, config.views.small
    large.number = small.number = 2
    small.size, small.crop_area = 6, 0.8  # of a smaller part of a digit one cannot tell which it is
    frozen_prototypes(config)


def second_version(config: ConfigDict) -> None:
    """What makes the method the second one: spherical k-means as it is, and two kinds of crops."""
    config.method = config.stages = "deepcluster_v2"
    config.sampler = "uniform_image"
    config.cluster.method, config.cluster.pca_dim, config.cluster.whiten = "spherical", 0, False
    with config.unlocked():
        config.views.large = config.views.train.copy_and_resolve_references()
        config.views.small = config.views.train.copy_and_resolve_references()


def frozen_prototypes(config: ConfigDict) -> None:
    """Prototypes stay the centroids that they were made from."""
    with config.unlocked():
        config.optimizer.prototypes = config.optimizer.body.copy_and_resolve_references()
    config.optimizer.prototypes.frozen = 300_000  # steps, more than the whole run has


def published(config: ConfigDict) -> None:
    """What the paper does to natural images at 224 x 224, and its optimisers."""
    natural(config)
    config.seed = 31
    config.data.image_size = 224
    config.batch_size = 256
    config.views.train.crop_area = 0.08
    config.cluster.pca_dim, config.cluster.runs = 256, 1
    for group in (config.optimizer.body, config.optimizer.top):
        group.name, group.lr, group.schedule, group.wd = "sgd", 0.05, "none", -5.0
    config.optimizer.top.momentum = 0.0
    config.evaluate.linear.crop_shift, config.evaluate.linear.flip = 1.0, 0.5


def natural(config: ConfigDict) -> None:
    """Colours, of grey photos too, as ImageNet has them on average, and mirror images in place of turned ones."""
    config.data.channels = 3
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    view = config.views.train
    view.flip = 0.5
    view.rotate, view.scale, view.shear, view.translate = 0.0, 0.0, 0.0, 0.0


def smoke(config: ConfigDict) -> None:
    """Two short rounds of a tiny network on tiny images."""
    config.rounds = 2
    config.refresh_every = "20 steps"
    config.batch_size = min(config.batch_size, 128)
    config.data.image_size = min(config.data.image_size, 32)
    for view in config.views.values():
        view.size = min(view.size, 16)
    config.deepcluster_v2.hidden = config.deepcluster_v2.dim = 32
    config.model.width = 8
    config.model.dim = 32
    config.cluster.k = min(config.cluster.k, 10)
    config.cluster.runs = 3
