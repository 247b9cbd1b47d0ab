"""SPICE: MoCo, k-means of its embeddings, heads on it (SPICE-Self), reliable labels, a network on these (SPICE-Semi).

python -m jaxclust.main --config=configs/spice.py
python -m jaxclust.main --config=configs/spice.py --config.stages=moco --config.evaluate.suite=knn
python -m jaxclust.main --config=configs/spice.py:mnist --config.data.source=idx:FOLDER
python -m jaxclust.main --config=configs/spice.py:features --config.data.source=features:FILE --config.cluster.k=10
python -m jaxclust.main --config=configs/spice.py:cifar10
python -m jaxclust.main --config=configs/spice.py:cifar10_star,small --config.data.source=folder:CIFAR10
python -m jaxclust.main --config=configs/spice.py:imagenet10 --config.data.source=folder:IMAGENET10
python -m jaxclust.main --config=configs/spice.py:smoke

As published are stl10, cifar10, cifar100, imagenet10, imagenet_dog and tiny_imagenet, trained and judged on all images
whose class is known, and stl10_star, cifar10_star and cifar100_star, the paper's rows with a star, which are judged on
test images that they are not trained on. cifar10,moco_v1 and the like have the first version of MoCo, whose rate falls
at the epochs 120 and 160 (of 200 as published: --config.stage.moco.rounds=200).
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxclust import config as c

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for all published runs but the last stage's


def get_config(variant: str = "") -> ConfigDict:
    """The default learns from scikit-learn's 8 x 8 digits; variants are separated by commas and apply in order."""
    config = c.base()
    config.stages = "moco,embed,self,reliable,semi"
    config.sampler = "uniform_image"
    config.evaluate.suite, config.evaluate.nmi_average = "clustering,heads", "geometric"
    config.report.pictures, config.report.stage = "first_layer,tsne,prototypes,similarity,views", "self"
    # Three things of MoCo decide the result: views that move digits less than the heads' do (moved more, they end at an
    # ACC of 0.8), a temperature over the usual 0.2, and many rounds.
    config.moco.queue, config.moco.momentum, config.moco.dim, config.moco.temperature = 1024, 0.99, 64, 0.5
    plain = config.views.train.to_dict()
    moved = {"rotate": 15.0, "scale": 0.2, "shear": 12.0, "translate": 0.125}
    moved_less = {"rotate": 10.0, "scale": 0.1, "shear": 6.0, "translate": 0.0625}
    own = {
        "train": moved,
        "query": moved_less,
        "key": moved_less,
        "original": {},
        "weak": {"translate": 0.0625},
        "strong": moved,
    }
    with config.unlocked():
        config.views = ConfigDict({name: {**plain, **view} for name, view in own.items()})
        config.stage = stages()
    papers = {name: partial(published, p=values) for name, values in {**PUBLISHED, **STARS}.items()}
    others = {"moco_v1": moco_v1, "small": small, "mnist": mnist, "features": features, "smoke": smoke}
    return c.apply_variants(config, variant, {**papers, **others})


def stages() -> ConfigDict:
    """What each stage does otherwise than the whole."""
    sgd = {"name": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine"}
    nesterov = {
        "name": "sgd",
        "lr": 0.03,
        "nesterov": True,
        "weight_decay": 5e-4,
        "decayed": "no_norm",
        "schedule": "cosine_part",
    }
    as_it_is = {"pca_dim": 0, "whiten": False, "runs": 10}
    return ConfigDict(
        {
            "moco": {"method": "moco", "rounds": 150, "batch_size": 64, "optimizer": {"body": sgd}},
            "embed": {
                "method": "deepcluster", "rounds": 0, "freeze_body": True, "init_from": "@moco", "cluster": as_it_is
            },
            "self": {
                "method": "spice", "rounds": 30, "batch_size": 1500, "sampler": "resample", "init_from": "@moco",
                "eval_every": "1 round",  # every head against the labels, if there are any; nothing is selected by it
            },
            "reliable": {"method": "reliable", "rounds": 0, "init_from": "@self"},
            "semi": {
                "method": "fixmatch", "rounds": 10, "refresh_every": "200 steps", "batch_size": 128,
                "sampler": "labelled_first", "init_from": "", "fixmatch": {"ema": 0.98},
                "optimizer": {"body": nesterov, "top": nesterov},
            },
        }
    )  # fmt: skip


def mnist(config: ConfigDict) -> None:
    """The 10,000 test digits of MNIST."""
    config.data.source, config.data.train, config.data.num_images = "idx:data/mnist", "test", 10_000
    config.moco.queue = 4096
    config.stage.moco.rounds, config.stage.moco.batch_size = 30, 128
    config.stage.self.batch_size = 5000


def features(config: ConfigDict) -> None:
    """k-means and heads on a file of features, where noise, as a share of their deviation, takes the place of views."""
    config.stages = "embed,self,reliable"
    config.data.source, config.freeze_body = "features:features.npy", True
    config.views.weak.noise, config.views.strong.noise = 0.3, 0.8
    for stage in (config.stage.embed, config.stage.self):
        stage.init_from = ""


def levels(*colours: float) -> tuple[float, ...]:
    """Colours of 0 to 255 on the scale 0 to 1."""
    return tuple(colour / 255 for colour in colours)


class Published(NamedTuple):
    """The values of a data set in sections 3 to 9 of our specification; those that are not there are called ours."""

    source: str
    splits: dict[str, int]  # and how many images each has
    side: int
    k: int
    network: str
    moco_rounds: int
    queue: int
    pool: int  # images of an E step
    chunk: int  # of these in one forward pass
    eval_batch: int
    rounds: int  # of the heads
    cutout: int  # longest side of an erased square
    confident: float  # share of neighbours that agree
    semi: str = ""  # its network; none: there is no such stage
    moco_splits: int = 3  # the first so many are what MoCo sees
    semi_colours: tuple[tuple[float, ...], tuple[float, ...]] = MEAN, STD


CIFAR = {"train": 50_000, "test": 10_000}
PUBLISHED = {
    "stl10": Published(
        "tfds:stl10", {"train": 5000, "test": 8000, "unlabelled": 100_000}, 96, 10,
        "clusterresnet", 1000, 65_536, 5000, 100, 100, 100, 32, 0.90, "wrn37_2",
    ),
    "cifar10": Published(
        "tfds:cifar10", CIFAR, 32, 10, "resnet18", 1000, 12_800, 5000, 100, 100, 30, 16, 0.99, "resnet18", 1,
        (levels(125.3, 123.0, 113.9), levels(63.0, 62.1, 66.7)),
    ),
    "cifar100": Published(  # the queue of cifar10
        "tfds:cifar100", CIFAR, 32, 20, "clusterresnet", 1000, 12_800, 10_000, 1000, 500, 100, 16, 0.99, "wrn28_8", 1,
        (levels(129.3, 124.1, 112.4), levels(68.2, 65.4, 70.4)),
    ),
    "imagenet10": Published(  # the queue is ours: less than there are images
        "folder:imagenet10", {"train": 13_000}, 224, 10,
        "resnet34", 5000, 12_800, 5000, 500, 100, 100, 32, 0.90, "resnet34",
    ),
    "imagenet_dog": Published(  # and here
        "folder:imagenet_dog", {"train": 19_500}, 224, 15,
        "resnet34", 3000, 12_800, 8000, 500, 100, 100, 32, 0.90, "resnet34",
    ),
    # Only its evaluation is published: both lengths, queue, pool and its chunk are ours. It has no last stage, so the
    # wrn37_2 with a first group of stride 1, which the original has for images of 64 pixels, is not built.
    "tiny_imagenet": Published(
        "folder:tiny-imagenet", {"train": 100_000}, 64, 200,
        "clusterresnet", 1000, 65_536, 10_000, 100, 1000, 100, 32, 0.90,
    ),
}  # fmt: skip
STARS = {
    f"{name}_star": p._replace(splits={split: size for split, size in p.splits.items() if split != "test"})
    for name, p in PUBLISHED.items()
    if "test" in p.splits
}


def published(config: ConfigDict, p: Published) -> None:
    """All stages as the paper trains them, but for `spice.mstep_bn`; what is not said here is so by default."""
    base, (moco, heads, semi) = c.base(), (config.stage[name] for name in ("moco", "self", "semi"))
    config.update({name: base[name] for name in ("model", "moco", "spice", "reliable")})
    config.stages = "moco,embed,self,reliable" + ",semi" * bool(p.semi)
    config.data.update(
        {"source": p.source, "image_size": p.side, "channels": 3, "mean": MEAN, "std": STD, **images(p.splits)}
    )
    config.data.label = "coarse_label" if p.source == "tfds:cifar100" else ""
    config.cluster.k = p.k
    config.model.name, config.model.stem = p.network, "small" if p.network == "resnet18" else "imagenet"
    config.eval_batch_size = p.eval_batch
    config.moco.queue = p.queue
    config.spice.target_sub_batch_size, config.reliable.ratio_confident = p.chunk, p.confident
    moco.rounds, moco.batch_size = p.moco_rounds, 128
    moco.optimizer.body.update({"lr": 0.015, "weight_decay": 1e-4})
    heads.rounds, heads.batch_size = p.rounds, p.pool
    labelled = {split: size for split, size in p.splits.items() if split != "unlabelled"}
    with config.unlocked():
        config.views = views(p)
        moco.data = images(dict([*p.splits.items()][: p.moco_splits]))
        for name in ("embed", "self", "reliable"):
            config.stage[name].data = images(labelled)
        semi.update({"rounds": 0, "steps": 2**20, "refresh_every": "1000 steps", "batch_size": 512})
        for group in semi.optimizer.values():
            group.update({"lr": 0.03, "weight_decay": 5e-4})
        semi.fixmatch = ConfigDict({"ema": 0.999})
        semi.model = ConfigDict({"name": p.semi or p.network})
        semi.data = ConfigDict(dict(zip(("mean", "std"), p.semi_colours, strict=True)))
        cutout = {"erase": 0.5, "erase_fill": levels(125, 123, 114)}
        semi.views = ConfigDict({"strong": {"randaugment": 3, "randaugment_set": "fixmatch", "pad": 4, **cutout}})


def images(splits: Mapping[str, int]) -> ConfigDict:
    """What `data` says of the images of `splits`."""
    return ConfigDict({"train": "+".join(splits), "num_images": sum(splits.values())})


COLOURS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}


def views(p: Published) -> ConfigDict:
    """MoCo's second augmentation for queries and keys, and those of the heads."""
    moco = {"crop_area": 0.2, "jitter": 0.8, **COLOURS, "hue": 0.1, "grey": 0.2, "blur": 0.5, "flip": 0.5}
    own = {
        "train": {},
        "query": moco,
        "key": moco,
        "original": {},
        "weak": {"flip": 0.5, "pad": 4},
        "strong": {"flip": 0.5, "randaugment": 4, "erase": p.cutout / p.side, "erase_fill": MEAN},
    }
    return ConfigDict({name: {**c.base().views.train.to_dict(), **view} for name, view in own.items()})


def moco_v1(config: ConfigDict) -> None:
    """MoCo's first version, with the augmentation and the falls of the rate as published, behind a data set."""
    config.moco.temperature, config.moco.mlp = 0.07, False
    config.stage.moco.optimizer.body.update({"schedule": "steps", "every": "1 epoch", "milestones": (120, 160)})
    view = {**c.base().views.train.to_dict(), "crop_area": 0.2, "grey": 0.2, **COLOURS, "hue": 0.4, "flip": 0.5}
    config.views.query, config.views.key = ConfigDict(view), ConfigDict(view)


def small(config: ConfigDict) -> None:
    """A small network and few epochs, behind a data set of 32 x 32 pixels, for two cores; without the last two stages.

    Features become better than random ones. On features as poor as these heads become as good as k-means only where
    they learn from views as weak as those that they label, and an image has one label (benchmarks/RESULTS.md). At a
    rate of 0.06 all embeddings become the same.
    """
    config.stages = "moco,embed,self"
    config.model.name, config.model.stem = "convnet", "imagenet"
    config.moco.queue, config.moco.momentum = 4096, 0.99
    config.eval_batch_size = 500
    config.views.query.blur = config.views.key.blur = 0.0
    config.views.strong.update(config.views.weak.to_dict())
    config.spice.overlap, config.spice.whiten_power = "best", 0.5
    with config.unlocked():
        config.stage.embed.cluster.update({"pca_dim": 128, "whiten": True, "whiten_power": 0.5})
    moco, heads = config.stage.moco, config.stage.self
    moco.rounds, moco.batch_size, moco.optimizer.body.lr = 60, 256, 0.015
    heads.rounds = 10
    config.evaluate.suite = "clustering,heads,knn"


def smoke(config: ConfigDict) -> None:
    """Two short rounds of a tiny network on tiny images."""
    moco, heads, semi = (config.stage[name] for name in ("moco", "self", "semi"))
    moco.rounds = heads.rounds = semi.rounds = 2
    heads.batch_size = min(heads.batch_size, 1500)
    with config.unlocked():
        semi.update({"steps": 0, "batch_size": min(semi.batch_size, 128), "refresh_every": "20 steps"})
    config.data.image_size = min(config.data.image_size, 32)
    config.reliable.ratio_confident, config.reliable.score, config.reliable.balance = 0.0, 0.0, "cap"
    config.refresh_every = "20 steps"
    config.model.width, config.model.dim = 8, 32
    config.moco.queue, config.moco.dim = 256, 16
    config.spice.num_head = 2
