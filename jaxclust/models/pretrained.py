"""Weights of torchvision and timm for our networks: which tensor of a file is which of ours, by name.

torchvision keeps kernels as [out, in, height, width] and flattens maps channel by channel, Flax as [height, width, in,
out] and place by place. Files of safetensors are read as they are; .pth files by torch, as tensors only.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from jaxclust import config as config_lib
from jaxclust.errors import ConfigError, DataError
from jaxclust.models import alexnet, vgg

Shape = tuple[int, ...]
Array = NDArray[Any]

TORCH = "torch:"
"""What stands before the name of a file in `config.init_from`."""

SAFE = (".safetensors",)
PICKLED = (".pth", ".pt", ".tar")
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEANS = {"inception_v3": ((0.5,), (0.5,))}
"""`data.mean` and `data.std` of the images that published weights know; of all other networks IMAGENET."""


class Weights(NamedTuple):
    """A file: the shapes of its tensors, by the names that torchvision would give them, and their names in the file."""

    path: Path
    shapes: dict[str, Shape]
    names: dict[str, str]
    read: Callable[[str], Array]  # by the name in the file


class Matched(NamedTuple):
    """Which tensor fills each leaf, "<layer>.<leaf>"; tensors that fill none, and leaves that stay as they were."""

    used: dict[str, str]
    unused: list[str]
    missing: list[str]


# Names. Each function gives the module of torchvision for a layer of ours, None where it has none.


def _sequential(pooled: Sequence[bool], norm: bool, dense: tuple[int, int]) -> dict[str, str]:
    """Of convolutions in a row, each with ReLU, with batch norm in between, and some with pooling after them."""
    names, place = {"dense": f"classifier.{dense[0]}", "feature": f"classifier.{dense[1]}"}, 0
    for number, pools in enumerate(pooled, 1):
        names[f"conv{number}_conv"] = f"features.{place}"
        if norm:
            names[f"conv{number}_norm"] = f"features.{place + 1}"
        place += 2 + norm + pools
    return names


def _alexnet(norm: bool) -> Callable[[str], str | None]:
    return _sequential([conv.pooled for conv in alexnet.CONVS], norm, (1, 4)).get


def _vgg(blocks: Sequence[int]) -> Callable[[str], str | None]:
    return _sequential([conv == convs for convs in blocks for conv in range(1, convs + 1)], True, (0, 3)).get


def _resnet(layer: str) -> str | None:
    if layer in ("conv1_conv", "conv1_norm"):
        return {"conv": "conv1", "norm": "bn1"}[layer[6:]]
    found = re.fullmatch(r"conv(\d)_(\d+)_(\d|skip)_(conv|norm)", layer)
    if not found:
        return None
    stage, block, number, kind = found.groups()
    own = {"conv": "downsample.0", "norm": "downsample.1"} if number == "skip" else {"conv": "conv", "norm": "bn"}
    return f"layer{int(stage) - 1}.{int(block) - 1}.{own[kind]}{number if number != 'skip' else ''}"


STEM = {
    "conv1_1": "Conv2d_1a_3x3", "conv1_2": "Conv2d_2a_3x3", "conv1_3": "Conv2d_2b_3x3",
    "conv2_1": "Conv2d_3b_1x1", "conv2_2": "Conv2d_4a_3x3",
}  # fmt: skip
FIRST = {"3": "b", "4": "a", "5": "a"}  # letter of the first block of a stage, which are Mixed_5, Mixed_6, Mixed_7


def _inception(layer: str) -> str | None:
    name, _, kind = layer.rpartition("_")
    of = {"conv": "conv", "norm": "bn"}.get(kind)
    if name in STEM:
        return f"{STEM[name]}.{of}"
    found = re.fullmatch(r"conv([345])_(\d)_(\w+)", name)
    if not found or of is None:
        return None
    stage, block, branch = found.groups()
    letter = chr(ord(FIRST[stage]) + int(block) - 1)
    return f"Mixed_{int(stage) + 2}{letter}.branch{'_pool' if branch == 'pool' else branch}.{of}"


MODULES: dict[str, Callable[[str], str | None]] = {
    **{name: _alexnet(kind.norm) for name, kind in alexnet.NETWORKS.items()},
    **{name: _vgg(blocks) for name, blocks in vgg.NETWORKS.items()},
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), _resnet),
    "inception_v3": _inception,
}
"""The networks that such files are of."""

MARKS: dict[str, tuple[str, Shape]] = {
    "alexnet": ("features.14.weight", (256, 384, 3, 3)),
    "alexnet_owt": ("features.10.weight", (256, 256, 3, 3)),
    "vgg16": ("features.24.weight", (512, 256, 3, 3)),
    "resnet34": ("layer1.2.conv1.weight", (64, 64, 3, 3)),
    "resnet18": ("layer4.1.conv1.weight", (512, 512, 3, 3)),  # which resnet34 has too
    "resnet50": ("layer1.2.conv3.weight", (256, 64, 1, 1)),
    "inception_v3": ("Mixed_7c.branch_pool.conv.weight", (192, 2048, 1, 1)),
}
"""A tensor that tells each network as published from those that come after it."""

SIDES = {**dict.fromkeys(alexnet.NETWORKS, alexnet.SIDE), **dict.fromkeys(vgg.NETWORKS, vgg.SIDE)}
"""The side of the map that the layer `dense` sees flattened."""

OF_TIMM = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
"""Modules that timm, which keeps them as convolutions, calls otherwise than torchvision."""


def plain(name: str) -> str:
    """The name that torchvision gives a tensor: without the "module." of parallel training, nor timm's own names."""
    name = ".".join(part for part in name.split(".") if part != "module")
    module, _, leaf = name.rpartition(".")
    return f"{OF_TIMM[module]}.{leaf}" if module in OF_TIMM else name


# Files


def open_weights(path: Path) -> Weights:
    """The tensors of a file, none of which is read yet.

    ConfigError: there is no such file, of another kind, or torch is needed and not there. DataError: it is damaged, or
    holds something else than tensors.
    """
    kind = path.suffix.lower()
    if kind not in SAFE + PICKLED:
        raise ConfigError(
            f"config.init_from: {str(path)!r} must end in {', '.join(SAFE + PICKLED)}; weights of torchvision or timm "
            "are in such files"
        )
    if not path.is_file():
        raise ConfigError(f"config.init_from: there is no file {str(path)!r}")
    shapes, read = _safe(path) if kind in SAFE else _pickled(path)
    if not shapes:
        raise DataError(f"{str(path)!r} holds no tensor")
    names = {plain(name): name for name in shapes}
    return Weights(path, {short: shapes[name] for short, name in names.items()}, names, read)


def _safe(path: Path) -> tuple[dict[str, Shape], Callable[[str], Array]]:
    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{str(path)!r} is no whole file of safetensors: {error}") from error

    def read(name: str) -> Array:
        try:
            return np.asarray(file.get_tensor(name))
        except (SafetensorError, TypeError, KeyError) as error:  # such as float8, which NumPy does not know
            raise DataError(f"{str(path)!r}: {name} cannot be read: {error}; save it as float32") from error

    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, read  # noqa: SIM118


def _pickled(path: Path) -> tuple[dict[str, Shape], Callable[[str], Array]]:
    try:
        import torch
    except ImportError:
        raise ConfigError(
            f"config.init_from: {str(path)!r} is a file of PyTorch, which must be installed to read it (pip install "
            "torch); files of safetensors need nothing: where torch is, "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors') makes one"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, and what is refused is one that only pickle has
        reason = str(error).strip().splitlines()[:1]
        raise DataError(f"{str(path)!r} is damaged, or holds more than tensors: {' '.join(reason)}") from error
    inner = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in inner.items() if isinstance(value, torch.Tensor)}
    return (
        {name: tuple(value.shape) for name, value in tensors.items()},
        lambda name: np.asarray(tensors[name].detach().to(torch.float32).numpy()),
    )


# Which is which


def wanted(network: str, leaf: str, shape: Shape) -> tuple[str, Shape] | None:
    """The tensor that fills a leaf of `network`, and its shape in a file; None: there is none in such files."""
    layer, _, kind = leaf.rpartition(".")
    module = MODULES[network](layer)
    if module is None or kind not in LEAVES:
        return None
    return f"{module}.{LEAVES[kind]}", (shape[-1], *shape[-2:-1], *shape[:-2])


def match(config: ConfigDict, weights: Weights, leaves: Mapping[str, Shape]) -> Matched:
    """Which tensor fills which of `leaves`, "<layer>.<leaf>", the body of `config.model` with its batch statistics.

    Only a `feature` that comes after the network's mean may be missing. ConfigError names the first tensor that
    differs, and what the file seems to be.
    """
    name = config.model.name
    if name not in MODULES:
        raise ConfigError(
            f"config.init_from: there are no such weights for config.model.name={name!r}; there are for "
            f"{', '.join(MODULES)}"
        )
    used, missing = {}, []
    for leaf, shape in leaves.items():
        tensor = wanted(name, leaf, shape)
        if tensor is None and leaf.startswith("feature."):
            missing.append(leaf)
            continue
        if tensor is None:
            raise ConfigError(
                f"config.init_from: {leaf} of config.method={config.method!r} is no layer of config.model.name="
                f"{name!r}, which {str(weights.path)!r} could fill"
            )
        there = weights.shapes.get(tensor[0])
        if there is None or not _fits(there, tensor[1]):
            raise ConfigError(
                f"config.init_from: {tensor[0]} is {there or 'missing'} in {str(weights.path)!r}, this config makes "
                f"{tensor[1]}; {_inputs(there or (), tensor[1]) or _guess(config, weights)}"
            )
        used[leaf] = tensor[0]
    unused = [tensor for tensor in weights.shapes if tensor not in used.values()]
    _check_left_over(config, weights, used, unused)
    return Matched(used, unused, missing)


def _check_left_over(config: ConfigDict, weights: Weights, used: Mapping[str, str], unused: Sequence[str]) -> None:
    """ConfigError if a tensor fills nothing that is not of a classifier: a deeper network has all of a flat one's."""
    bodies = {tensor.partition(".")[0] for tensor in used.values()} - {"classifier"}
    for tensor in unused:
        if tensor.partition(".")[0] in bodies and not tensor.endswith(COUNTER):
            best = _looks(weights)
            of = f"config.model.name={best}" if best not in (None, config.model.name) else "a deeper relative of it"
            raise ConfigError(
                f"config.init_from: {tensor} in {str(weights.path)!r} fills nothing of config.model.name="
                f"{config.model.name!r}; the file looks like {of}"
            )


def _fits(there: Shape, wanted: Shape) -> bool:
    """timm keeps some dense layers as convolutions."""
    return there == wanted or (len(wanted) == 2 and len(there) == 4 and (there[0], np.prod(there[1:])) == wanted)


INPUTS = {
    1: "grey images: config.data.channels=1",
    2: "Sobel gradients: config.model.sobel=True",
    3: "colours: config.data.channels=3 and config.model.sobel=False",
}


def _inputs(there: Shape, wanted: Shape) -> str:
    """What a first convolution of a file sees, if that is all that differs, else nothing."""
    alone = len(there) == 4 and there[1] != wanted[1] and (there[0], *there[2:]) == (wanted[0], *wanted[2:])
    return f"the file sees {INPUTS[there[1]]}" if alone and there[1] in INPUTS else ""


def _guess(config: ConfigDict, weights: Weights) -> str:
    """What a file seems to be of, in words."""
    best = _looks(weights)
    if best is None:
        return f"the file is of none of the networks that can be filled: {', '.join(MODULES)}"
    if best != config.model.name:
        return f"the file looks like {best}: config.model.name={best}"
    usual = config_lib.base().model
    differs = [name for name in ("width", "dim", "stem") if config.model[name] != usual[name]]
    hint = ", ".join(f"config.model.{name}={usual[name]!r}, not {config.model[name]!r}" for name in differs)
    return f"the file looks like {best} as published{': ' * bool(hint)}{hint}"


def _looks(weights: Weights) -> str | None:
    """The network, as published, that a file seems to be of, by a tensor that only this one has."""
    return next((name for name, (tensor, shape) in MARKS.items() if weights.shapes.get(tensor) == shape), None)


def load(network: str, weights: Weights, matched: Matched, leaves: Mapping[str, Shape]) -> dict[str, Array]:
    """The arrays of `leaves` as `network` has them, float32. DataError names a tensor that is not finite."""
    found = {}
    for leaf, tensor in matched.used.items():
        array = weights.read(weights.names[tensor]).astype(np.float32)
        if not np.isfinite(array).all():
            raise DataError(f"{str(weights.path)!r}: {tensor} has numbers that are not finite")
        found[leaf] = turned(array, leaves[leaf], SIDES[network] if leaf == "dense.kernel" else 1)
    return found


def turned(array: Array, shape: Shape, side: int = 1) -> Array:
    """A tensor of a file as a leaf of `shape`; a dense kernel may see a flattened map of `side` x `side`."""
    if len(shape) == 4:
        return array.transpose(2, 3, 1, 0)
    if len(shape) == 2:
        return array.reshape(len(array), -1, side, side).transpose(2, 3, 1, 0).reshape(shape)
    return array
