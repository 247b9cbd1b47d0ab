"""Small runs for tests: real digits, a tiny network, seconds."""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from jaxclust import config as config_lib
from jaxclust import models
from jaxclust.data.source import Source, open_source
from jaxclust.data.split import from_array
from jaxclust.main import main
from jaxclust.methods.base import DataInfo
from jaxclust.report import figures, html
from jaxclust.runtime import StopSignal
from jaxclust.train import loop, stage
from jaxclust.train.checkpoint import Snapshot

# All networks for small images; in the fast tests three of their kinds.
FAST, WIDE = {"alexnet", "convnet", "resnet18"}, {"vgg16", "wrn28_2", "resnet50"}
NETWORKS = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.wide if name in WIDE else pytest.mark.slow)
    for name in models.networks()
]


def small_config(**overrides: Any) -> ConfigDict:
    """The smoke variant of DeepCluster on one device; `a__b=value` sets config.a.b."""
    config = runpy.run_path("configs/deepcluster.py")["get_config"]("smoke")
    config.runtime.devices = 1
    config.batch_size = 128
    config.refresh_every = "1 epoch"
    return with_settings(config, **overrides)


def with_settings(config: ConfigDict, **overrides: Any) -> ConfigDict:
    """The config itself, checked, where `a__b=value` has set config.a.b."""
    with config.unlocked():
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config_lib.validate(config)


def smaller_config(**overrides: Any) -> ConfigDict:
    """`small_config` of two blocks: what a test waits for is compilation."""
    return small_config(**{"model__blocks": 2, **overrides})


def few_digits(size: int = 300) -> Source:
    """The first digits, with labels."""
    whole = open_source(config_lib.base()).splits["train"]
    split = from_array(whole.images[:size], whole.image_shape, whole.name_of)
    return Source("digits", {"train": replace(split, labels=whole.labels[:size])}, tuple("0123456789"), [])


def digit_files(folder: Path, size: int, classes: int = 10) -> Path:
    """The first digits as PNG files with a hostile name, in class folders "digit 0", …, in a folder that is made."""
    split = few_digits(size).splits["train"]
    for i in range(size):
        path = folder / f"digit {split.labels[i] % classes}" / f"{i:03}, scan.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(split.images[i, ..., 0]).save(path)
    return folder


def few_vectors(size: int = 300, dim: int = 6) -> Source:
    """Vectors around four centres, with labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(size, dtype=np.int32) % 4
    rows = (3 * np.eye(4, dim)[labels] + 0.3 * rng.standard_normal((size, dim))).astype(np.float32)
    split = from_array(rows, (dim,), "vectors/{}".format)
    return Source("vectors", {"train": replace(split, labels=labels)}, tuple("0123"), [])


def prepared(config: ConfigDict, workdir: Path, source: Source | None = None) -> stage.Stage:
    """The only stage of a config."""
    workdir.mkdir(parents=True, exist_ok=True)
    name = config_lib.stage_names(config)[0]
    source = source or open_source(config)
    split = source.splits["train"]
    others = {name: other for name, other in source.splits.items() if name != "train"}
    info = DataInfo(split.size, split.image_shape, source.train_classes)
    return stage.prepare(config, name, split, info, workdir, others=others)


def trained(config: ConfigDict, workdir: Path, source: Source | None = None) -> Snapshot:
    """Trains the only stage of a config."""
    return loop.run_stage(prepared(config, workdir, source), StopSignal())


def run(*arguments: str, drawn: bool = False) -> int:
    """The command line, in this process, on one device; pictures are small, and are drawn sooner.

    Those that every page has are drawn where a test asks for them: they take as long as a small training.
    """
    draw = html._draw if drawn else _undrawn
    with mock.patch.object(figures, "DPI", 48), mock.patch.object(html, "_draw", draw):
        return main(["jaxclust", *arguments, "--config.runtime.devices=1"])


def _undrawn(picture: html.Picture, draw: Any, folder: Path) -> html.Picture:
    return picture


def smoke(workdir: Path, *arguments: str, drawn: bool = False) -> int:
    """A smoke training of two blocks by command line."""
    smallest = "--config=configs/deepcluster.py:smoke", "--config.model.blocks=2", f"--workdir={workdir}"
    return run(*smallest, *arguments, drawn=drawn)
