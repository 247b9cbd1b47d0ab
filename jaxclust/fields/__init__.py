"""Every setting with its default, type and range."""

import math
from typing import Any

from jaxclust.fields.clustnet import CLUSTNET
from jaxclust.fields.dscl import DSCL
from jaxclust.fields.report import REPORT
from jaxclust.kinds import Each, Field, choice, duration, flag, name, number, numbers, positive, some, text

_VIEW = {
    "number": number(1, 1, 64, "how many of these are made of each image"),
    "size": number(0, 0, 4096, "side in pixels; 0: data.image_size"),
    "crop_area": number(0.0, 0.0, 1.0, "smallest share of the area a random crop keeps; 0: the centre crop"),
    "crop_area_max": number(1.0, 0.0, 1.0, "largest share of the area a random crop keeps"),
    "crop_aspect": number(0.75, 0.1, 1.0, "narrowest aspect of a random crop (its inverse is the widest)"),
    "crop_shift": number(0.0, 0.0, 1.0, "without crop_area: how far a crop may lie from the centre; 1: anywhere"),
    "flip": number(0.0, 0.0, 1.0, "probability of a horizontal flip"),
    "rotate": number(0.0, 0.0, 180.0, "largest rotation in degrees"),
    "scale": number(0.0, 0.0, 0.9, "largest relative change of size"),
    "shear": number(0.0, 0.0, 60.0, "largest shear in degrees"),
    "translate": number(0.0, 0.0, 1.0, "largest shift as a share of the side"),
    "jitter": number(1.0, 0.0, 1.0, "probability that brightness, contrast, saturation and hue change"),
    "brightness": number(0.0, 0.0, 1.0, "largest relative change of brightness"),
    "contrast": number(0.0, 0.0, 1.0, "largest relative change of contrast"),
    "saturation": number(0.0, 0.0, 1.0, "largest relative change of saturation"),
    "hue": number(0.0, 0.0, 0.5, "largest turn of the hue circle"),
    "grey": number(0.0, 0.0, 1.0, "probability of losing all colour"),
    "blur": number(0.0, 0.0, 1.0, "probability of a Gaussian blur"),
    "randaugment": number(0, 0, 5, "operations of RandAugment on each image"),
    "randaugment_set": choice("scan", ("fixmatch",), "whose RandAugment: shears and shifts up to 0.1, or to 0.3"),
    "pad": number(0, 0, 4096, "zero pixels put around the image, of which its size is cropped anywhere"),
    "erase": number(0.0, 0.0, 1.0, "largest side of an erased square as a share of the side"),
    "erase_fill": numbers((), 0.0, 1.0, "colour of an erased square; (): the image's own mean"),
    "noise": number(0.0, 0.0, math.inf, "standard deviation of the noise added to vectors, as a share of their own"),
}

_OPTIMIZER = {
    "name": choice("adam", ("sgd", "lars"), "rule by which this group of parameters moves"),
    "lr": number(1e-3, 0.0, math.inf, "learning rate at the start"),
    "schedule": choice(
        "none",
        ("cosine", "cosine_part", "exponential", "steps", "plateau"),
        "course of the learning rate over the stage",
    ),
    "part": Field(
        0.4375,
        lambda v: 0 < v <= 0.5,
        "over 0, at most 0.5",
        "cosine_part: the rate is lr * cos(pi * part * t), t from 0 to 1; 7/16 is FixMatch's",
    ),
    "every": duration(
        "1 round", "exponential, steps: what `gamma` and `milestones` count; plateau: over what the loss is averaged"
    ),
    "gamma": Field(0.95, lambda v: 0 < v <= 1, "over 0, at most 1", "exponential: factor of the rate per `every`"),
    "milestones": some(
        (120, 160), 1, math.inf, "steps: after how many `every` the rate falls by `factor`, each once more"
    ),
    "factor": Field(
        0.1, lambda v: 0 < v < 1, "between 0 and 1", "steps: factor at a milestone; plateau: when the loss stalls"
    ),
    "patience": number(10, 0, math.inf, "plateau: how many `every` without a lower loss are waited"),
    "min_lr": number(0.0, 0.0, math.inf, "cosine: where the rate ends; plateau: it does not fall below this"),
    "warmup": duration("never", "over how long the rate rises evenly to `lr`, before its course begins"),
    "warmup_lr": number(0.0, 0.0, math.inf, "where that rise starts"),
    "frozen": number(0, 0, math.inf, "steps for which the group stays as it is"),
    "momentum": number(0.9, 0.0, 0.9999, "momentum of sgd and lars"),
    "nesterov": flag(False, "whether this is Nesterov's"),
    "trust": positive(0.001, "lars: length of a step at a rate of 1, as a share of that of the parameter"),
    "weight_decay": number(0.0, 0.0, 1.0, "decay added to the gradient"),
    "decayed": choice("all", ("no_norm",), "which parameters decay: all, or not scale and bias of a norm"),
    "wd": Field(
        0.0,
        lambda v: v == 0 or -30 <= v <= -1,
        "an exponent from -30 to -1 (-5: a decay of 10**-5), or 0; a plain value such as 1e-5 is `weight_decay`",
        "weight decay as the exponent of 10; 0: `weight_decay` says it",
    ),
}

_LINEAR = {
    "layers": text("", "layers that are probed, such as 'conv3,feature', separated by commas; empty: all"),
    "epochs": number(90, 1, math.inf, "passes over the training images"),
    "batch_size": number(256, 1, math.inf, "images in a step, over all devices"),
    "lr": number(0.01, 0.0, math.inf, "learning rate at the start"),
    "wd": Field(
        -4.0,
        lambda v: v == 0 or -30 <= v <= -1,
        "an exponent from -30 to -1 (-4: a decay of 10**-4), or 0",
        "weight decay as the exponent of 10, with which the learning rate falls as well; 0: none",
    ),
    "crop_shift": number(0.0, 0.0, 1.0, "as in `views`; published with 1, 0 lets pooled layers be kept"),
    "flip": number(0.0, 0.0, 1.0, "as in `views`; published with 0.5, 0 lets pooled layers be kept"),
    "ten_crops": flag(False, "whether a test image is judged by corners, centre and their mirror images together"),
    "cache_bytes": number(16 * 2**30, 0, math.inf, "pooled layers are kept on disk up to this size"),
}

FIELDS: dict[str, Any] = {
    "seed": number(0, 0, 2**31 - 1, "seed of everything random"),
    "method": name("deepcluster", "the method, a file in jaxclust/methods"),
    "stages": name("deepcluster", "names of the stages to run in order, separated by commas"),
    "rounds": number(40, 0, math.inf, "length of a stage in rounds; 0: `steps` says it"),
    "steps": number(0, 0, math.inf, "length of a stage in steps, in place of `rounds`; both 0: it only refreshes"),
    "batch_size": number(256, 1, math.inf, "images in a training step, over all devices"),
    "eval_batch_size": number(512, 1, math.inf, "images in a step of feature extraction"),
    "refresh_every": duration("1 epoch", "length of a round: training between two clusterings"),
    "log_every": duration("1 round", "how often metrics are written"),
    "eval_every": duration("never", "how often the evaluation runs during training"),
    "save_every": duration("1 round", "how often a checkpoint is saved"),
    "keep_checkpoints": number(2, 1, math.inf, "newest checkpoints of a stage that are kept, beside the best on val"),
    "init_from": text(
        "",
        "workdir of a run whose body the first stage takes, or torch:FILE with weights of torchvision or timm; of a "
        "stage also @NAME, an earlier one",
    ),
    "init_noise": number(
        0.0, 0.0, math.inf, "noise added to what is so taken, as a share of half the length of an array"
    ),
    "freeze_body": flag(False, "whether the body stays as it is; its features are then computed once and kept"),
    "frozen_views": number(
        0, 0, 64, "freeze_body: augmented copies of each training image that are kept; 0: all is as evaluation sees it"
    ),
    "sweep": text(
        "",
        "sweep: values of settings, such as 'cluster.k=5,10;seed=1..5', with commas of their own in brackets, such as "
        "'groups=(0-4,5-9),(0-1,2-9)'; all combinations are trained",
    ),
    "groups": text("", "clustnet: the two groups of classes that it learns to tell apart, such as '0-4,5-9'"),
    "sampler": choice(
        "uniform_cluster",
        ("uniform_image", "upstream", "resample", "partition", "fixed", "labelled_first", "pk"),
        "how a round draws its images; of resample, partition and fixed no batch holds an image twice: each is drawn "
        "anew, is a chunk of one permutation, or is always the same chunk, and an epoch has only whole batches; "
        "labelled_first: one image with a label, then `unlabelled_ratio` of all images, in turn; pk: in each batch "
        "equally many of each class, of all classes or of as many as have `images_per_class`",
    ),
    "unlabelled_ratio": number(7, 1, 1000, "labelled_first: images of all that follow each one with a label"),
    "images_per_class": number(4, 2, math.inf, "pk: images of each class in a batch, at least"),
    "data": {
        "source": name(
            "digits",
            "digits, digits:N with N test images, idx:DIR, npz:FILE, folder:DIR, table:FILE, cars196:DIR, tfds:NAME "
            "or features:FILE",
        ),
        "data_dir": text("", "tfds: where its data sets lie; empty: TFDS' own default"),
        "label": text("", "tfds: the feature that is the class, such as 'coarse_label'; empty: the data set's own"),
        "train": Field(
            "train",
            lambda v: all(part.isidentifier() for part in v.split("+")) and len({*v.split("+")}) == v.count("+") + 1,
            "names of splits such as 'train+test+unlabelled'",
            "splits of the source that are trained on, one after the other; of a stage also the first of these",
        ),
        "train_classes": text(
            "",
            "classes that are trained on, of all splits, while the test has the others: '0,2,5-9' by place, names, "
            "'first:98', or a share such as '0.5'; empty: splits as they are",
        ),
        "train_images": number(0, 0, math.inf, "random images of these that are trained on, always the same; 0: all"),
        "hold_out": Field(
            0.0,
            lambda v: 0 <= v < 1,
            "0 or more, under 1",
            "share of the training images of each class that is not trained on but the split val, for methods that "
            "learn from labels: with `eval_every` the state that finds its classes best is kept; 0: none",
        ),
        "box_crop": flag(True, "whether of an image with a box only what is in it is seen (table, cars196, tfds)"),
        "stretch": flag(False, "whether images become squares whatever their aspect; else their middle is cut out"),
        "image_size": number(0, 0, 4096, "side in pixels; 0: the images' own up to 64, else 64"),
        "channels": Field(0, lambda v: v in (0, 1, 3), "0, 1 or 3", "1 grey, 3 RGB, 0: as the images are"),
        "num_images": number(0, 0, 2**31 - 1, "plan: images to reckon with where the source is not at hand"),
        "cache_bytes": number(4 * 2**30, 0, math.inf, "decoded images are kept in memory up to this size"),
        "max_pixels": number(100_000_000, 1, math.inf, "larger images are refused before they are decoded"),
        "max_skipped": number(100, 0, math.inf, "unreadable images that are skipped before the run is refused"),
        "mean": numbers((0.5,), 0.0, 1.0, "subtracted from pixels on the scale 0 to 1"),
        "std": numbers((0.5,), 1e-3, 10.0, "pixels are then divided by this"),
    },
    "views": Each(_VIEW, ("train",)),
    "model": {
        "name": name("convnet", "the network: convnet, alexnet, vgg16, resnet18, …, made by files in jaxclust/models"),
        "width": number(0, 0, 4096, "channels of the first convolution; 0: the network's own"),
        "blocks": number(3, 1, 6, "convnet: blocks, each of twice the channels and half the side"),
        "dim": number(0, 0, 65536, "length of the feature; 0: the network's own"),
        "dropout": number(-1.0, -1.0, 0.9, "share of units dropped in training; -1: the network's own"),
        "sobel": flag(False, "whether the network sees the horizontal and vertical gradient in place of colours"),
        "stem": choice(
            "imagenet",
            ("small", "pooled"),
            "resnet: 7 x 7 with pooling, 3 x 3 for some 32 pixels, or 3 x 3 with pooling",
        ),
    },
    "cluster": {
        "method": choice("kmeans", ("minibatch", "pic", "spherical"), "clustering of the features"),
        "backend": choice("auto", ("faiss", "jax"), "auto: faiss on one host that has it, else jax"),
        "k": Field(10, lambda v: v == 0 or v >= 2, "at least 2", "number of clusters or experts; 0: still to be said"),
        "seed": number(-1, -1, 2**31 - 1, "seed of every clustering; -1: another each time"),
        "iterations": number(20, 1, math.inf, "Lloyd iterations"),
        "runs": number(1, 1, math.inf, "restarts of which the best objective is kept"),
        "init": choice("rows", ("kmeans++",), "first centroids: distinct rows, or rows drawn far from each other"),
        "batch_rows": number(65_536, 1, math.inf, "minibatch: rows of an update, over all hosts"),
        "reseed_empty": choice("split", ("farthest",), "kmeans: what an empty cluster is replaced by"),
        "pca_dim": number(256, 0, 65536, "dimensions kept before clustering; 0: no reduction"),
        "whiten": flag(True, "whether kept dimensions are divided by their standard deviation"),
        "whiten_power": number(1.0, 0.0, 1.0, "the power it is taken to; 1: equal variances"),
        "l2": flag(True, "whether rows are then scaled to unit length"),
        "pic": {
            "neighbours": number(5, 1, 10_000, "edges from each image in the graph of nearest neighbours"),
            "sigma": positive(0.2, "width of the kernel exp(-d^2 / sigma^2) on squared distances"),
            "alpha": Field(0.001, lambda v: 0 < v <= 1, "over 0, at most 1", "share of the graph in a power iteration"),
            "iterations": number(200, 1, math.inf, "power iterations"),
            "merge_singletons": flag(True, "whether a cluster of one image joins its nearest larger one"),
            "bucket": number(256, 1, 65536, "the head's outputs are a multiple of this, so that it seldom recompiles"),
        },
    },
    "uad": {
        "mode": choice("full", ("baseline", "fusion", "uncertainty"), "uad: baseline is DeepCluster, full is both"),
        "low_layers": text("", "maps that are fused, separated by commas; empty: the network's own"),
        "low_grid": number(2, 1, 16, "low maps are pooled to so many cells a side"),
        "low_pool": choice("avg", ("max", "avgstd"), "what of a cell is kept"),
        "low_weight": number(0.3, 0.0, 1.0, "share of the low maps in squared distances, beta"),
        "low_dim": number(64, 1, 65536, "per_block: dimensions of cluster.pca_dim that are for the low maps"),
        "fusion_norm": choice("l2", ("standard", "none"), "unit rows, or a total variance of one, for each block"),
        "fusion_pca": choice("joint", ("per_block", "none"), "PCA-whitening of both blocks together, of each or none"),
        "uncertainty": choice(
            "fcm", ("fcm_entropy", "possibilistic", "gauss", "rank", "graph", "none"), "what makes a cluster certain"
        ),
        "fuzzifier": Field(2.0, lambda v: 1 < v <= 100, "over 1, at most 100", "m of fuzzy c-means"),
        "num_nearest": number(10, 1, 1000, "nearest centroids that fcm compares"),
        "weight_strength": number(0.5, 0.0, 1.0, "lambda: 0 weighs all images alike"),
        "weight_power": positive(1.0, "gamma: the power that certainty is taken to"),
        "weight_max": number(5.0, 1.0, math.inf, "weights are clipped here"),
        "weight_direction": choice("certain", ("uncertain",), "which images count more"),
        "weight_warmup": number(0, 0, math.inf, "rounds over which weight_strength grows"),
        "loss_norm": choice("dataset", ("sampler", "batch"), "over what weights have a mean of one"),
        "ignore_empty_centroids": flag(True, "whether the centroids of empty clusters do not count"),
        "min_cluster_for_certainty": number(2, 1, math.inf, "in smaller clusters certainty is at most the median"),
        "pic_centroids": flag(False, "whether distances to means of PIC's clusters may be used"),
    },
    "deepcluster_v2": {
        "heads": number(3, 1, 64, "deepcluster_v2: clusterings, each with a layer of prototypes that learns it"),
        "temperature": positive(0.1, "that scores are divided by"),
        "hidden": number(2048, 1, 65536, "width of the projection's hidden layer"),
        "dim": number(128, 2, 65536, "length of an embedding"),
    },
    "moco": {
        "dim": number(128, 2, 65536, "moco: length of a query and of a key"),
        "queue": number(65_536, 1, math.inf, "keys of earlier batches that are kept, a multiple of the batch size"),
        "momentum": number(0.999, 0.0, 1.0, "share of itself that the key encoder keeps in a step"),
        "temperature": positive(0.2, "that similarities are divided by; 0.07 in the first version"),
        "mlp": flag(True, "whether the projection has a hidden layer; the first version has none"),
        "bn": choice(
            "group",
            ("sync", "ema"),
            "batch statistics of groups, or, which departs from the paper, of the whole batch "
            "(sync), and for keys moving averages of the queries' (ema)",
        ),
        "groups": number(4, 1, 4096, "group: parts of a batch with statistics of their own, over all devices"),
    },
    "spice": {
        "num_head": number(10, 1, 1000, "spice: heads, of which the one with the lowest loss is selected"),
        "center_ratio": Field(
            0.5, lambda v: 0 < v <= 1, "over 0, at most 1", "images that make a centre, as a share of those it labels"
        ),
        "num_repeat": number(8, 1, math.inf, "passes over the labelled images of a step, whose pool is `batch_size`"),
        "train_sub_batch_size": number(128, 1, math.inf, "labelled images of each gradient step of each head"),
        "target_sub_batch_size": number(100, 1, math.inf, "images of the pool in one forward pass of a device"),
        "overlap": choice("keep", ("greedy", "best"), "whether an image may have the labels of several clusters"),
        "assignment": choice("balanced", ("argmax",), "equally many images of each cluster, or all to the nearest"),
        "mstep_bn": choice(
            "frozen", ("batch",), "batch: the body takes batch statistics as the heads learn, as published"
        ),
        "loss": choice("double_softmax", ("single_softmax",), "of the heads' outputs"),
        "whiten_power": number(
            0.0, 0.0, 1.0, "heads see principal components, divided by their deviation to this power; 0: the features"
        ),
        "lr": number(0.005, 0.0, math.inf, "learning rate of Adam; `optimizer` is not used"),
        "weight_decay": number(0.0, 0.0, 1.0, "decay added to the gradient"),
        "ratio": {
            "start": Field(1.0, lambda v: 0 < v <= 1, "over 0, at most 1", "share of the images that is labelled"),
            "end": Field(1.0, lambda v: 0 < v <= 1, "over 0, at most 1", "that share between iter_up and iter_down"),
            "iter_start": number(0, 0, 100_000, "epoch where the share leaves `start`"),
            "iter_up": number(0, 0, 100_000, "epoch where it has come to `end`"),
            "iter_down": number(0, 0, 100_000, "epoch where it leaves `end`"),
            "iter_end": number(0, 0, 100_000, "epoch where it is back at `start`"),
        },
    },
    "reliable": {
        "num_neighbor": number(100, 2, 10_000, "reliable: nearest images, itself among them, that are looked at"),
        "ratio_confident": number(0.9, 0.0, 1.0, "share of them that must have the cluster of the image"),
        "score": number(0.99, 0.0, 1.0, "an image is kept if its probability is larger"),
        "balance": choice("min", ("cap",), "as many as the smallest cluster has, of all or of those that have any"),
    },
    "fixmatch": {
        "labels": name("reliable", "fixmatch: a stage whose last assignment has the labels, or FILE.npz or FILE.npy"),
        "threshold": number(0.95, 0.0, 1.0, "a guess of a weak view counts if its probability is as large"),
        "weight": number(1.0, 0.0, math.inf, "factor of the loss of unlabelled images"),
        "ema": number(0.999, 0.0, 1.0, "share of itself that the average of the parameters keeps in a step"),
    },
    "clustnet": CLUSTNET,
    "dscl": DSCL,
    "optimizer": Each(_OPTIMIZER, ("body", "top")),
    "evaluate": {
        "suite": name("clustering", "names of the evaluations, separated by commas"),
        "step": number(
            0, -1, math.inf, "the checkpoint that a job takes, or the nearest one; 0: the newest, -1: the best on val"
        ),
        "nmi_average": choice("arithmetic", ("geometric",), "mean of the entropies that NMI divides by"),
        "metric_groups": choice("true", ("upstream",), "groups: those of `groups`, or the published code's by `seed`"),
        "silhouette_sample": number(2000, 10, 100_000, "images that the silhouette is measured on"),
        "knn_k": number(20, 1, 10_000, "knn: neighbours that vote"),
        "knn_temperature": positive(0.07, "knn: a neighbour votes with exp(similarity / temperature)"),
        "recall_at": some((1, 2, 4, 8), 1, 10_000, "retrieval, readouts: each K of R@K"),
        "readouts": name("l2,spectral", "readouts: some of raw, l2, spectral and njw, separated by commas"),
        "spectral_center": flag(False, "spectral: whether the mean of the features is taken off first"),
        "njw_neighbours": number(20, 1, 10_000, "njw: edges from each image in the graph of nearest neighbours"),
        "njw_scale": choice(
            "local", ("median", "cosine"), "njw: width of the graph's kernel, or cosines as its weights"
        ),
        "nmi_runs": number(10, 0, 1000, "readouts: restarts of the k-means whose NMI is told; 0: none is"),
        "save_retrieval": flag(False, "whether features, labels and nearest neighbours are kept in retrieval.npz"),
        "untrained": flag(False, "whether the network is also judged before it is trained"),
        "lowlabel_percent": some((1.0, 10.0), 0.01, 100.0, "lowlabel: shares of the labels that are learnt from"),
        "lowlabel_draws": number(5, 1, 1000, "lowlabel: draws of labels that are averaged"),
        "linear": _LINEAR,
    },
    "report": REPORT,
    "scores": {
        "every": duration("never", "clustnet: how often scores of all images are written to files, in whole rounds"),
        "index": flag(False, "whether a line also has the number of its image"),
    },
    "features": {
        "memory_bytes": number(8 * 2**30, 0, math.inf, "features beyond this size are kept on disk"),
    },
    "runtime": {
        "dtype": choice("float32", ("bfloat16", "float64"), "precision of the network"),
        "devices": number(0, 0, math.inf, "devices used; 0: all, on a CPU as many as are fastest"),
        "cpu_devices": number(0, 0, 256, "devices a CPU is split into; 0: one for each core"),
        "heartbeat": positive(30.0, "several hosts: one that is silent for so many seconds ends the job"),
        "deadline": positive(7200.0, "several hosts: seconds to wait for host 0 to cluster, or for one that hangs"),
    },
}


FIELDS["stage"] = Each(FIELDS, ())  # a stage's section overlays the whole config (see `for_stage`)
