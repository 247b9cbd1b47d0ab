"""Every setting with its default, type and range, and the checks that refuse a wrong one.

A config is an `ml_collections.ConfigDict` made by `base()`, changed by a file in `configs/` and by
`--config.a.b=value` on the command line, and checked by `validate` before any work starts.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxclust.errors import ConfigError
from jaxclust.files import replacing


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


def _numbers(default: tuple[float, ...], low: float, high: float, doc: str) -> Field:
    def check(values: tuple[float, ...]) -> bool:
        return len(values) in (1, 3) and all(isinstance(v, int | float) and low <= v <= high for v in values)

    return Field(default, check, f"one number or three, each from {low:g} to {high:g}", doc)


_VIEW = {
    "crop_area": _number(0.0, 0.0, 1.0, "smallest share of the area a random crop keeps; 0: the centre crop"),
    "crop_aspect": _number(0.75, 0.1, 1.0, "narrowest aspect of a random crop (its inverse is the widest)"),
    "flip": _number(0.0, 0.0, 1.0, "probability of a horizontal flip"),
    "rotate": _number(0.0, 0.0, 180.0, "largest rotation in degrees"),
    "scale": _number(0.0, 0.0, 0.9, "largest relative change of size"),
    "shear": _number(0.0, 0.0, 60.0, "largest shear in degrees"),
    "translate": _number(0.0, 0.0, 1.0, "largest shift as a share of the side"),
    "brightness": _number(0.0, 0.0, 1.0, "largest relative change of brightness"),
    "contrast": _number(0.0, 0.0, 1.0, "largest relative change of contrast"),
    "saturation": _number(0.0, 0.0, 1.0, "largest relative change of saturation"),
    "hue": _number(0.0, 0.0, 0.5, "largest turn of the hue circle"),
    "grey": _number(0.0, 0.0, 1.0, "probability of losing all colour"),
    "blur": _number(0.0, 0.0, 1.0, "probability of a Gaussian blur"),
    "erase": _number(0.0, 0.0, 1.0, "largest side of an erased square as a share of the side"),
    "noise": _number(0.0, 0.0, math.inf, "standard deviation of the noise added to vectors"),
}

_OPTIMIZER = {
    "name": _choice("adam", ("sgd",), "rule by which this group of parameters moves"),
    "lr": _number(1e-3, 0.0, math.inf, "learning rate at the start"),
    "schedule": _choice("none", ("cosine", "exponential", "plateau"), "course of the learning rate over the stage"),
    "every": _duration("1 round", "exponential: what `gamma` counts; plateau: over what the loss is averaged"),
    "gamma": Field(0.95, lambda v: 0 < v <= 1, "over 0, at most 1", "exponential: factor of the rate per `every`"),
    "factor": Field(0.1, lambda v: 0 < v < 1, "between 0 and 1", "plateau: factor when the training loss stalls"),
    "patience": _number(10, 0, math.inf, "plateau: how many `every` without a lower loss are waited"),
    "min_lr": _number(0.0, 0.0, math.inf, "plateau: the rate does not fall below this"),
    "momentum": _number(0.9, 0.0, 0.9999, "momentum of sgd"),
    "weight_decay": _number(0.0, 0.0, 1.0, "decay added to the gradient, on every parameter"),
    "wd": Field(
        0.0,
        lambda v: v == 0 or -30 <= v <= -1,
        "an exponent from -30 to -1 (-5: a decay of 10**-5), or 0; a plain value such as 1e-5 is `weight_decay`",
        "weight decay as the exponent of 10; 0: `weight_decay` says it",
    ),
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
    "init_from": _text("", "workdir of another run whose body the first stage starts with"),
    "freeze_body": _flag(False, "whether the body stays as it is; its features are then computed once and kept"),
    "sampler": _choice("uniform_cluster", ("uniform_image", "upstream"), "how a round draws its images"),
    "data": {
        "source": _name("digits", "digits, idx:DIR, npz:FILE, folder:DIR, tfds:NAME or features:FILE"),
        "data_dir": _text("", "tfds: where its data sets lie; empty: TFDS' own default"),
        "image_size": _number(0, 0, 4096, "side in pixels; 0: the images' own up to 64, else 64"),
        "channels": Field(0, lambda v: v in (0, 1, 3), "0, 1 or 3", "1 grey, 3 RGB, 0: as the images are"),
        "cache_bytes": _number(4 * 2**30, 0, math.inf, "decoded images are kept in memory up to this size"),
        "max_pixels": _number(100_000_000, 1, math.inf, "larger images are refused before they are decoded"),
        "max_skipped": _number(100, 0, math.inf, "unreadable images that are skipped before the run is refused"),
        "mean": _numbers((0.5,), 0.0, 1.0, "subtracted from pixels on the scale 0 to 1"),
        "std": _numbers((0.5,), 1e-3, 1.0, "pixels are then divided by this"),
    },
    "views": Each(_VIEW, ("train",)),
    "model": {
        "name": _name("convnet", "the network: convnet, alexnet, vgg16, resnet18, resnet34 or resnet50"),
        "width": _number(0, 0, 4096, "channels of the first convolution; 0: the network's own"),
        "blocks": _number(3, 1, 6, "convnet: blocks, each of twice the channels and half the side"),
        "dim": _number(0, 0, 65536, "length of the feature; 0: the network's own"),
        "dropout": _number(-1.0, -1.0, 0.9, "share of units dropped in training; -1: the network's own"),
        "sobel": _flag(False, "whether the network sees the horizontal and vertical gradient in place of colours"),
        "stem": _choice("imagenet", ("small",), "resnet: 7 x 7 with pooling, or 3 x 3 for images of some 32 pixels"),
    },
    "cluster": {
        "method": _choice("kmeans", ("pic",), "clustering of the features"),
        "backend": _choice("auto", ("faiss", "jax"), "auto: faiss where it is installed, else jax"),
        "k": Field(10, lambda v: v == 0 or v >= 2, "at least 2", "number of clusters of kmeans; 0: still to be said"),
        "seed": _number(-1, -1, 2**31 - 1, "seed of every clustering; -1: another each time"),
        "iterations": _number(20, 1, math.inf, "Lloyd iterations"),
        "runs": _number(1, 1, math.inf, "restarts of which the best objective is kept"),
        "reseed_empty": _choice("split", ("farthest",), "what an empty cluster is replaced by"),
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
    "optimizer": Each(_OPTIMIZER, ("body", "top")),
    "evaluate": {
        "suite": _name("clustering", "names of the evaluations, separated by commas"),
        "nmi_average": _choice("arithmetic", ("geometric",), "mean of the entropies that NMI divides by"),
        "silhouette_sample": _number(2000, 10, 100_000, "images that the silhouette is measured on"),
    },
    "features": {
        "memory_bytes": _number(8 * 2**30, 0, math.inf, "features beyond this size are kept on disk"),
    },
    "runtime": {
        "dtype": _choice("float32", ("bfloat16", "float64"), "precision of the network"),
        "devices": _number(0, 0, math.inf, "devices used; 0: all, on a CPU as many as are fastest"),
        "cpu_devices": _number(0, 0, 256, "devices a CPU is split into; 0: one for each core"),
    },
}


FIELDS["stage"] = Each(FIELDS, ())  # a stage's section overlays the whole config (see `for_stage`)


def _defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in fields.items():
        if isinstance(field, Field):
            tree[name] = field.default
        elif isinstance(field, Each):
            tree[name] = {section: _defaults(field.fields) for section in field.names}
        else:
            tree[name] = _defaults(field)
    return tree


def base() -> ConfigDict:
    """The config of all defaults."""
    return ConfigDict(_defaults(FIELDS))


def apply_variants(config: ConfigDict, text: str, variants: Mapping[str, Callable[[ConfigDict], None]]) -> ConfigDict:
    """Applies the comma separated variants of `text` in order; ConfigError names the known ones."""
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in variants:
            hint = did_you_mean(name, variants)
            raise ConfigError(f"variant {name!r} is unknown{hint} There is: {', '.join(variants)}.")
        variants[name](config)
    return config


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt `name`, or a full stop."""
    names = list(names)
    same_ending = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6) or same_ending
    return f"; did you mean {close[0]!r}?" if close else "."


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a config or of its dict."""
    for name, value in tree.items():
        if isinstance(value, ConfigDict | Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def field_of(name: str) -> Field | None:
    """The field behind a dotted name, None when there is none."""

    def walk(node: Any, parts: list[str]) -> Field | None:
        if isinstance(node, Field):
            return None if parts else node
        if not parts:
            return None
        if isinstance(node, Each):
            return walk(node.fields, parts[1:])
        return walk(node[parts[0]], parts[1:]) if parts[0] in node else None

    return walk(FIELDS, name.split("."))


def unknown(name: str, names: Iterable[str]) -> ConfigError:
    """The error for a setting that does not exist; it names the nearest one that does."""
    return ConfigError(f"config.{name} is unknown{did_you_mean(name, names)}")


def _check_leaf(name: str, value: Any, field: Field) -> None:
    kind = type(field.default)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config.{name}={value!r} must be of type {kind.__name__} ({field.allowed}): {field.doc}.")
    if not field.check(value):
        raise ConfigError(f"config.{name}={value!r} must be {field.allowed}: {field.doc}.")


def validate(config: ConfigDict) -> ConfigDict:
    """Returns `config` if every setting is known, of its type and in its range; ConfigError otherwise."""
    known = [name for name, _ in flatten(base())]
    for name, value in flatten(config):
        field = field_of(name)
        if field is None:
            raise unknown(name, known)
        _check_leaf(name, value, field)
    for name in stage_names(config):
        stage = for_stage(config, name)
        if stage.cluster.method == "kmeans" and stage.cluster.k == 0:
            raise ConfigError(
                "config.cluster.k=0: say into how many clusters, such as --config.cluster.k=20; compare several with "
                "--job=sweep --over=cluster.k=5,10,20, or let --config.cluster.method=pic find their number"
            )
        if stage.rounds and stage.steps:
            raise ConfigError(
                f"config.rounds={stage.rounds} and config.steps={stage.steps}: only one can say how long stage "
                f"{name!r} is; set the other to 0"
            )
    return config


def stage_names(config: ConfigDict) -> list[str]:
    """Names of the stages in their order."""
    return [name.strip() for name in config.stages.split(",") if name.strip()]


def for_stage(config: ConfigDict, name: str) -> ConfigDict:
    """The config that stage `name` sees: the whole one, with its section `stage.<name>` laid over."""
    merged = ConfigDict(config.to_dict())
    if name in config.stage:
        merged.update(config.stage[name].to_dict())
    return merged


def save(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load(path: Path) -> ConfigDict:
    """Reads what `save` wrote; ConfigError on a setting this version does not know."""
    config = base()

    def fill(node: ConfigDict, tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                if name not in node:
                    node[name] = ConfigDict()
                fill(node[name], value, f"{prefix}{name}.")
            elif field_of(prefix + name) is None:
                raise ConfigError(f"{path}: config.{prefix}{name} is unknown to this version of jaxclust")
            else:
                node[name] = tuple(value) if isinstance(value, list) else value

    with config.unlocked():
        fill(config, json.loads(path.read_text()), "")
    return config


def differences(old: ConfigDict, new: ConfigDict) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of every setting that makes `new` another run than `old`.

    How long a run is, where its files lie and what it runs on may change between two starts.
    """

    def essence(config: ConfigDict) -> dict[str, Any]:
        leaves = dict(flatten(config))
        leaves["data.source"] = leaves["data.source"].partition(":")[0]
        return {name: value for name, value in leaves.items() if not _may_change(name)}

    a, b = essence(old), essence(new)
    return [(name, a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _may_change(name: str) -> bool:
    last = name.rpartition(".")[2]
    free = ("rounds", "steps", "stages", "init_from", "keep_checkpoints", "data_dir", "cache_bytes")
    return name.startswith("runtime.") or last in free or name.startswith(("evaluate.", "features."))


def table() -> str:
    """All settings as a Markdown table, which docs/config.md is."""
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for name, default in flatten(base()):
        field = field_of(name)
        assert field is not None
        shown = f"`{default!r}`".replace("|", "\\|")
        lines.append(f"| `{name}` | {shown} | {field.allowed} | {field.doc} |")
    return "\n".join(lines) + "\n"
