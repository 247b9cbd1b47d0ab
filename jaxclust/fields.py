"""Every setting with its default, type and range."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxclust.errors import ConfigError


class Field(NamedTuple):
    """One setting: its default, whether a value is allowed, and both in words."""

    default: Any
    check: Callable[[Any], bool]
    allowed: str
    doc: str


class Each(NamedTuple):
    """Sections with free names that all have the same fields, and the names that exist at first."""

    fields: Mapping[str, Any]
    names: tuple[str, ...]


class Duration(NamedTuple):
    """A length of training: an amount of `step`, `epoch` or `round`."""

    amount: float
    unit: str


UNITS = ("step", "epoch", "round")


def parse_duration(text: str) -> Duration:
    """Reads "500 steps", "1 epoch", "0.5 rounds" or "never"; ConfigError on anything else."""
    if text == "never":
        return Duration(math.inf, "step")
    amount, _, unit = text.strip().partition(" ")
    try:
        duration = Duration(float(amount), unit.strip().removesuffix("s"))
    except ValueError:
        duration = Duration(math.nan, "")
    if duration.unit not in UNITS or not 0 < duration.amount < math.inf:
        raise ConfigError(f"{text!r} is not a duration; write '500 steps', '1 epoch', '2 rounds' or 'never', say")
    return duration


def _is_duration(text: str) -> bool:
    try:
        parse_duration(text)
    except ConfigError:
        return False
    return True


def _number(default: float, low: float, high: float, doc: str) -> Field:
    words = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
    return Field(default, lambda v: low <= v <= high, words, doc)


def _positive(default: float, doc: str) -> Field:
    return Field(default, lambda v: 0 < v < math.inf, "more than 0", doc)


def _choice(default: str, others: tuple[str, ...], doc: str) -> Field:
    names = (default, *others)
    return Field(default, lambda v: v in names, f"one of {', '.join(names)}", doc)


def _duration(default: str, doc: str) -> Field:
    return Field(default, _is_duration, "a duration such as '500 steps', '1 epoch', '2 rounds' or 'never'", doc)


def _text(default: str, doc: str) -> Field:
    return Field(default, lambda v: True, "text", doc)


def _name(default: str, doc: str) -> Field:
    return Field(default, lambda v: bool(v.strip()), "a name", doc)


def _flag(default: bool, doc: str) -> Field:
    return Field(default, lambda v: True, "True or False", doc)


def _list(default: tuple[float, ...], low: float, high: float, doc: str) -> Field:
    kind = type(default[0])

    def check(values: tuple[float, ...]) -> bool:
        fit = (isinstance(v, int | kind) and not isinstance(v, bool) and low <= v <= high for v in values)
        return bool(values) and all(fit)

    words = "whole numbers" if kind is int else "numbers"
    return Field(default, check, f"{words} from {low:g} to {high:g}, of one such as ({default[0]!r},)", doc)


def _numbers(default: tuple[float, ...], low: float, high: float, doc: str) -> Field:
    def check(values: tuple[float, ...]) -> bool:
        return len(values) in (1, 3, len(default)) and all(
            isinstance(v, int | float) and low <= v <= high for v in values
        )

    return Field(default, check, f"one number or three, each from {low:g} to {high:g}", doc)


_VIEW = {
    "number": _number(1, 1, 64, "how many of these are made of each image"),
    "size": _number(0, 0, 4096, "side in pixels; 0: data.image_size"),
    "crop_area": _number(0.0, 0.0, 1.0, "smallest share of the area a random crop keeps; 0: the centre crop"),
    "crop_area_max": _number(1.0, 0.0, 1.0, "largest share of the area a random crop keeps"),
    "crop_aspect": _number(0.75, 0.1, 1.0, "narrowest aspect of a random crop (its inverse is the widest)"),
    "crop_shift": _number(0.0, 0.0, 1.0, "without crop_area: how far a crop may lie from the centre; 1: anywhere"),
    "flip": _number(0.0, 0.0, 1.0, "probability of a horizontal flip"),
    "rotate": _number(0.0, 0.0, 180.0, "largest rotation in degrees"),
    "scale": _number(0.0, 0.0, 0.9, "largest relative change of size"),
    "shear": _number(0.0, 0.0, 60.0, "largest shear in degrees"),
    "translate": _number(0.0, 0.0, 1.0, "largest shift as a share of the side"),
    "jitter": _number(1.0, 0.0, 1.0, "probability that brightness, contrast, saturation and hue change"),
    "brightness": _number(0.0, 0.0, 1.0, "largest relative change of brightness"),
    "contrast": _number(0.0, 0.0, 1.0, "largest relative change of contrast"),
    "saturation": _number(0.0, 0.0, 1.0, "largest relative change of saturation"),
    "hue": _number(0.0, 0.0, 0.5, "largest turn of the hue circle"),
    "grey": _number(0.0, 0.0, 1.0, "probability of losing all colour"),
    "blur": _number(0.0, 0.0, 1.0, "probability of a Gaussian blur"),
    "randaugment": _number(0, 0, 5, "operations of RandAugment on each image"),
    "randaugment_set": _choice("scan", ("fixmatch",), "whose RandAugment: shears and shifts up to 0.1, or to 0.3"),
    "pad": _number(0, 0, 4096, "zero pixels put around the image, of which its size is cropped anywhere"),
    "erase": _number(0.0, 0.0, 1.0, "largest side of an erased square as a share of the side"),
    "erase_fill": _numbers((), 0.0, 1.0, "colour of an erased square; (): the image's own mean"),
    "noise": _number(0.0, 0.0, math.inf, "standard deviation of the noise added to vectors"),
}

_OPTIMIZER = {
    "name": _choice("adam", ("sgd", "lars"), "rule by which this group of parameters moves"),
    "lr": _number(1e-3, 0.0, math.inf, "learning rate at the start"),
    "schedule": _choice("none", ("cosine", "exponential", "plateau"), "course of the learning rate over the stage"),
    "every": _duration("1 round", "exponential: what `gamma` counts; plateau: over what the loss is averaged"),
    "gamma": Field(0.95, lambda v: 0 < v <= 1, "over 0, at most 1", "exponential: factor of the rate per `every`"),
    "factor": Field(0.1, lambda v: 0 < v < 1, "between 0 and 1", "plateau: factor when the training loss stalls"),
    "patience": _number(10, 0, math.inf, "plateau: how many `every` without a lower loss are waited"),
    "min_lr": _number(0.0, 0.0, math.inf, "cosine: where the rate ends; plateau: it does not fall below this"),
    "warmup": _duration("never", "over how long the rate rises evenly to `lr`, before its course begins"),
    "warmup_lr": _number(0.0, 0.0, math.inf, "where that rise starts"),
    "frozen": _number(0, 0, math.inf, "steps for which the group stays as it is"),
    "momentum": _number(0.9, 0.0, 0.9999, "momentum of sgd and lars"),
    "trust": _positive(0.001, "lars: length of a step at a rate of 1, as a share of that of the parameter"),
    "weight_decay": _number(0.0, 0.0, 1.0, "decay added to the gradient, on every parameter"),
    "wd": Field(
        0.0,
        lambda v: v == 0 or -30 <= v <= -1,
        "an exponent from -30 to -1 (-5: a decay of 10**-5), or 0; a plain value such as 1e-5 is `weight_decay`",
        "weight decay as the exponent of 10; 0: `weight_decay` says it",
    ),
}

_LINEAR = {
    "layers": _text("", "layers that are probed, such as 'conv3,feature', separated by commas; empty: all"),
    "epochs": _number(90, 1, math.inf, "passes over the training images"),
    "batch_size": _number(256, 1, math.inf, "images in a step, over all devices"),
    "lr": _number(0.01, 0.0, math.inf, "learning rate at the start"),
    "wd": Field(
        -4.0,
        lambda v: v == 0 or -30 <= v <= -1,
        "an exponent from -30 to -1 (-4: a decay of 10**-4), or 0",
        "weight decay as the exponent of 10, with which the learning rate falls as well; 0: none",
    ),
    "crop_shift": _number(0.0, 0.0, 1.0, "as in `views`; published with 1, 0 lets pooled layers be kept"),
    "flip": _number(0.0, 0.0, 1.0, "as in `views`; published with 0.5, 0 lets pooled layers be kept"),
    "ten_crops": _flag(False, "whether a test image is judged by corners, centre and their mirror images together"),
    "cache_bytes": _number(16 * 2**30, 0, math.inf, "pooled layers are kept on disk up to this size"),
}

FIELDS: dict[str, Any] = {
    "seed": _number(0, 0, 2**31 - 1, "seed of everything random"),
    "method": _name("deepcluster", "the method, a file in jaxclust/methods"),
    "stages": _name("deepcluster", "names of the stages to run in order, separated by commas"),
    "rounds": _number(40, 0, math.inf, "length of a stage in rounds; 0: `steps` says it"),
    "steps": _number(0, 0, math.inf, "length of a stage in steps, in place of `rounds`; both 0: it only refreshes"),
    "batch_size": _number(256, 1, math.inf, "images in a training step, over all devices"),
    "eval_batch_size": _number(512, 1, math.inf, "images in a step of feature extraction"),
    "refresh_every": _duration("1 epoch", "length of a round: training between two clusterings"),
    "log_every": _duration("1 round", "how often metrics are written"),
    "eval_every": _duration("never", "how often the evaluation runs during training"),
    "save_every": _duration("1 round", "how often a checkpoint is saved"),
    "keep_checkpoints": _number(2, 1, math.inf, "newest checkpoints of a stage that are kept"),
    "init_from": _text("", "workdir of a run whose body the first stage takes; of a stage also @NAME, an earlier one"),
    "freeze_body": _flag(False, "whether the body stays as it is; its features are then computed once and kept"),
    "sampler": _choice(
        "uniform_cluster",
        ("uniform_image", "upstream", "resample", "partition", "fixed"),
        "how a round draws its images; of the last three no batch holds an image twice: each is drawn anew, is a chunk "
        "of one permutation, or is always the same chunk, and an epoch has only whole batches",
    ),
    "data": {
        "source": _name("digits", "digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or features:FILE"),
        "data_dir": _text("", "tfds: where its data sets lie; empty: TFDS' own default"),
        "image_size": _number(0, 0, 4096, "side in pixels; 0: the images' own up to 64, else 64"),
        "channels": Field(0, lambda v: v in (0, 1, 3), "0, 1 or 3", "1 grey, 3 RGB, 0: as the images are"),
        "num_images": _number(0, 0, 2**31 - 1, "plan: images to reckon with where the source is not at hand"),
        "cache_bytes": _number(4 * 2**30, 0, math.inf, "decoded images are kept in memory up to this size"),
        "max_pixels": _number(100_000_000, 1, math.inf, "larger images are refused before they are decoded"),
        "max_skipped": _number(100, 0, math.inf, "unreadable images that are skipped before the run is refused"),
        "mean": _numbers((0.5,), 0.0, 1.0, "subtracted from pixels on the scale 0 to 1"),
        "std": _numbers((0.5,), 1e-3, 1.0, "pixels are then divided by this"),
    },
    "views": Each(_VIEW, ("train",)),
    "model": {
        "name": _name("convnet", "the network: convnet, alexnet, vgg16, resnet18, …, made by files in jaxclust/models"),
        "width": _number(0, 0, 4096, "channels of the first convolution; 0: the network's own"),
        "blocks": _number(3, 1, 6, "convnet: blocks, each of twice the channels and half the side"),
        "dim": _number(0, 0, 65536, "length of the feature; 0: the network's own"),
        "dropout": _number(-1.0, -1.0, 0.9, "share of units dropped in training; -1: the network's own"),
        "sobel": _flag(False, "whether the network sees the horizontal and vertical gradient in place of colours"),
        "stem": _choice(
            "imagenet",
            ("small", "pooled"),
            "resnet: 7 x 7 with pooling, 3 x 3 for some 32 pixels, or 3 x 3 with pooling",
        ),
    },
    "cluster": {
        "method": _choice("kmeans", ("minibatch", "pic", "spherical"), "clustering of the features"),
        "backend": _choice("auto", ("faiss", "jax"), "auto: faiss on one host that has it, else jax"),
        "k": Field(10, lambda v: v == 0 or v >= 2, "at least 2", "number of clusters of kmeans; 0: still to be said"),
        "seed": _number(-1, -1, 2**31 - 1, "seed of every clustering; -1: another each time"),
        "iterations": _number(20, 1, math.inf, "Lloyd iterations"),
        "runs": _number(1, 1, math.inf, "restarts of which the best objective is kept"),
        "init": _choice("rows", ("kmeans++",), "first centroids: distinct rows, or rows drawn far from each other"),
        "batch_rows": _number(65_536, 1, math.inf, "minibatch: rows of an update, over all hosts"),
        "reseed_empty": _choice("split", ("farthest",), "kmeans: what an empty cluster is replaced by"),
        "pca_dim": _number(256, 0, 65536, "dimensions kept before clustering; 0: no reduction"),
        "whiten": _flag(True, "whether kept dimensions are divided by their standard deviation"),
        "whiten_power": _number(1.0, 0.0, 1.0, "the power it is taken to; 1: equal variances"),
        "l2": _flag(True, "whether rows are then scaled to unit length"),
        "pic": {
            "neighbours": _number(5, 1, 10_000, "edges from each image in the graph of nearest neighbours"),
            "sigma": _positive(0.2, "width of the kernel exp(-d^2 / sigma^2) on squared distances"),
            "alpha": Field(0.001, lambda v: 0 < v <= 1, "over 0, at most 1", "share of the graph in a power iteration"),
            "iterations": _number(200, 1, math.inf, "power iterations"),
            "merge_singletons": _flag(True, "whether a cluster of one image joins its nearest larger one"),
            "bucket": _number(256, 1, 65536, "the head's outputs are a multiple of this, so that it seldom recompiles"),
        },
    },
    "uad": {
        "mode": _choice("full", ("baseline", "fusion", "uncertainty"), "uad: baseline is DeepCluster, full is both"),
        "low_layers": _text("", "maps that are fused, separated by commas; empty: the network's own"),
        "low_grid": _number(2, 1, 16, "low maps are pooled to so many cells a side"),
        "low_pool": _choice("avg", ("max", "avgstd"), "what of a cell is kept"),
        "low_weight": _number(0.3, 0.0, 1.0, "share of the low maps in squared distances, beta"),
        "low_dim": _number(64, 1, 65536, "per_block: dimensions of cluster.pca_dim that are for the low maps"),
        "fusion_norm": _choice("l2", ("standard", "none"), "unit rows, or a total variance of one, for each block"),
        "fusion_pca": _choice("joint", ("per_block", "none"), "PCA-whitening of both blocks together, of each or none"),
        "uncertainty": _choice(
            "fcm", ("fcm_entropy", "possibilistic", "gauss", "rank", "graph", "none"), "what makes a cluster certain"
        ),
        "fuzzifier": Field(2.0, lambda v: 1 < v <= 100, "over 1, at most 100", "m of fuzzy c-means"),
        "num_nearest": _number(10, 1, 1000, "nearest centroids that fcm compares"),
        "weight_strength": _number(0.5, 0.0, 1.0, "lambda: 0 weighs all images alike"),
        "weight_power": _positive(1.0, "gamma: the power that certainty is taken to"),
        "weight_max": _number(5.0, 1.0, math.inf, "weights are clipped here"),
        "weight_direction": _choice("certain", ("uncertain",), "which images count more"),
        "weight_warmup": _number(0, 0, math.inf, "rounds over which weight_strength grows"),
        "loss_norm": _choice("dataset", ("sampler", "batch"), "over what weights have a mean of one"),
        "ignore_empty_centroids": _flag(True, "whether the centroids of empty clusters do not count"),
        "min_cluster_for_certainty": _number(2, 1, math.inf, "in smaller clusters certainty is at most the median"),
        "pic_centroids": _flag(False, "whether distances to means of PIC's clusters may be used"),
    },
    "deepcluster_v2": {
        "heads": _number(3, 1, 64, "deepcluster_v2: clusterings, each with a layer of prototypes that learns it"),
        "temperature": _positive(0.1, "that scores are divided by"),
        "hidden": _number(2048, 1, 65536, "width of the projection's hidden layer"),
        "dim": _number(128, 2, 65536, "length of an embedding"),
    },
    "moco": {
        "dim": _number(128, 2, 65536, "moco: length of a query and of a key"),
        "queue": _number(65_536, 1, math.inf, "keys of earlier batches that are kept, a multiple of the batch size"),
        "momentum": _number(0.999, 0.0, 1.0, "share of itself that the key encoder keeps in a step"),
        "temperature": _positive(0.2, "that similarities are divided by; 0.07 in the first version"),
        "mlp": _flag(True, "whether the projection has a hidden layer; the first version has none"),
        "bn": _choice(
            "group",
            ("sync", "ema"),
            "batch statistics of groups, or, which departs from the paper, of the whole batch "
            "(sync), and for keys moving averages of the queries' (ema)",
        ),
        "groups": _number(4, 1, 4096, "group: parts of a batch with statistics of their own, over all devices"),
    },
    "spice": {
        "num_head": _number(10, 1, 1000, "spice: heads, of which the one with the lowest loss is selected"),
        "center_ratio": Field(
            0.5, lambda v: 0 < v <= 1, "over 0, at most 1", "images that make a centre, as a share of those it labels"
        ),
        "num_repeat": _number(8, 1, math.inf, "passes over the labelled images of a step, whose pool is `batch_size`"),
        "train_sub_batch_size": _number(128, 1, math.inf, "labelled images of each gradient step of each head"),
        "target_sub_batch_size": _number(100, 1, math.inf, "images of the pool in one forward pass of a device"),
        "overlap": _choice("keep", ("greedy", "best"), "whether an image may have the labels of several clusters"),
        "assignment": _choice("balanced", ("argmax",), "equally many images of each cluster, or all to the nearest"),
        "mstep_bn": _choice(
            "frozen", ("batch",), "batch: the body takes batch statistics as the heads learn, as published"
        ),
        "loss": _choice("double_softmax", ("single_softmax",), "of the heads' outputs"),
        "lr": _number(0.005, 0.0, math.inf, "learning rate of Adam; `optimizer` is not used"),
        "weight_decay": _number(0.0, 0.0, 1.0, "decay added to the gradient"),
        "ratio": {
            "start": Field(1.0, lambda v: 0 < v <= 1, "over 0, at most 1", "share of the images that is labelled"),
            "end": Field(1.0, lambda v: 0 < v <= 1, "over 0, at most 1", "that share between iter_up and iter_down"),
            "iter_start": _number(0, 0, 100_000, "epoch where the share leaves `start`"),
            "iter_up": _number(0, 0, 100_000, "epoch where it has come to `end`"),
            "iter_down": _number(0, 0, 100_000, "epoch where it leaves `end`"),
            "iter_end": _number(0, 0, 100_000, "epoch where it is back at `start`"),
        },
    },
    "reliable": {
        "num_neighbor": _number(100, 2, 10_000, "reliable: nearest images, itself among them, that are looked at"),
        "ratio_confident": _number(0.9, 0.0, 1.0, "share of them that must have the cluster of the image"),
        "score": _number(0.99, 0.0, 1.0, "an image is kept if its probability is larger"),
        "balance": _choice("min", ("cap",), "as many as the smallest cluster has, of all or of those that have any"),
    },
    "optimizer": Each(_OPTIMIZER, ("body", "top")),
    "evaluate": {
        "suite": _name("clustering", "names of the evaluations, separated by commas"),
        "nmi_average": _choice("arithmetic", ("geometric",), "mean of the entropies that NMI divides by"),
        "silhouette_sample": _number(2000, 10, 100_000, "images that the silhouette is measured on"),
        "knn_k": _number(20, 1, 10_000, "knn: neighbours that vote"),
        "knn_temperature": _positive(0.07, "knn: a neighbour votes with exp(similarity / temperature)"),
        "recall_at": _list((1, 2, 4, 8), 1, 10_000, "retrieval: each K of R@K"),
        "lowlabel_percent": _list((1.0, 10.0), 0.01, 100.0, "lowlabel: shares of the labels that are learnt from"),
        "lowlabel_draws": _number(5, 1, 1000, "lowlabel: draws of labels that are averaged"),
        "linear": _LINEAR,
    },
    "report": {
        "pictures": _text("first_layer,tsne", "pictures that --job=report draws, separated by commas"),
        "layers": _text("", "filters, activations: layers such as 'conv1,conv3', separated by commas; empty: all"),
        "channels": _number(16, 0, math.inf, "filters, activations: the first so many of each layer; 0: all"),
        "sample": _number(1000, 10, 100_000, "tsne, umap: training images that are shown"),
        "filters": {
            "steps": _list((1000,), 1, 10_000_000, "steps of gradient ascent, for all layers or for each"),
            "lr": _list((3.0,), 0.0, 1e6, "length of a step, for all layers or for each"),
            "weight_decay": _number(1e-5, 0.0, math.inf, "factor of the squared image in what is climbed"),
            "every": _number(5, 1, math.inf, "the image is blurred in the first of so many steps"),
            "sigma": _number(0.3, 0.0, 10.0, "width of this blur in pixels"),
        },
        "activations": {
            "count": _number(9, -1, math.inf, "images of each channel; 0 or less: all"),
        },
    },
    "features": {
        "memory_bytes": _number(8 * 2**30, 0, math.inf, "features beyond this size are kept on disk"),
    },
    "runtime": {
        "dtype": _choice("float32", ("bfloat16", "float64"), "precision of the network"),
        "devices": _number(0, 0, math.inf, "devices used; 0: all, on a CPU as many as are fastest"),
        "cpu_devices": _number(0, 0, 256, "devices a CPU is split into; 0: one for each core"),
        "heartbeat": _positive(30.0, "several hosts: one that is silent for so many seconds ends the job"),
        "deadline": _positive(7200.0, "several hosts: seconds to wait for host 0 to cluster, or for one that hangs"),
    },
}


FIELDS["stage"] = Each(FIELDS, ())  # a stage's section overlays the whole config (see `for_stage`)
