"""`config.data.source` to a `Source`."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxclust import plugins
from jaxclust.config import for_stage, stage_names
from jaxclust.data.class_split import disjoint
from jaxclust.data.split import Skipped, Source, Split
from jaxclust.data.subset import first, joined, subset, with_validation
from jaxclust.errors import ConfigError
from jaxclust.hints import did_you_mean

__all__ = ["Skipped", "Source", "Split", "files_of", "of_last_stage", "of_stage", "open_source", "read"]

OF_A_STAGE = ("mean", "std", "train", "num_images")  # settings of data that may be a stage's own


def open_source(config: ConfigDict) -> Source:
    """Opens `config.data.source` as `read` does, for all stages of a run; `of_stage` says what each is trained on.

    ConfigError if a stage asks for images of its own: an id means the same image in all stages.
    """
    for name in stage_names(config):
        _check_stage(config, name)
    return read(config.data)


def read(data: ConfigDict) -> Source:
    """Opens `data.source`, KIND or KIND:PLACE, and fixes which images there are.

    `data.train` says which splits of it are "train", or `data.train_classes` which classes of all of them, and
    `data.train_images` how many of these images; of those `data.hold_out` are "val".

    ConfigError on an unknown kind or split; DataError if the data are missing, malformed or worse than
    `data.max_skipped` allows.
    """
    kind, _, where = data.source.partition(":")
    if kind not in plugins.names("jaxclust.data.sources") and Path(data.source).expanduser().is_dir():
        raise ConfigError(f"config.data.source={data.source!r} names no kind; did you mean 'folder:{data.source}'?")
    module = plugins.load("jaxclust.data.sources", kind, "config.data.source", "read")
    source: Source = module.read(where, data)
    names = data.train.split("+")
    for name in names:
        if name not in source.splits:
            raise ConfigError(
                f"config.data.train={data.train!r}: {source.name} has no split {name!r}"
                f"{did_you_mean(name, source.splits)} There is: {', '.join(source.splits)}."
            )
    if train_classes := data.train_classes or getattr(module, "TRAIN_CLASSES", ""):
        return _parted(disjoint(source, train_classes, names), data)
    parts = {name: source.splits[name] for name in names}
    others = {name: split for name, split in source.splits.items() if name not in {*parts, "train"}}
    sizes = {name: split.size for name, split in parts.items()}
    return _parted(source._replace(splits={"train": joined([*parts.values()]), **others}, parts=sizes), data)


def _parted(source: Source, data: ConfigDict) -> Source:
    return with_validation(some(source, data.train_images), data.hold_out)


def some(source: Source, count: int) -> Source:
    """`source` trained on `count` random images, always the same, in the order of their ids; 0: on all.

    ConfigError if there are not so many.
    """
    size = source.splits["train"].size
    if not count or count == size:
        return source
    if count > size:
        raise ConfigError(f"config.data.train_images={count}: {source.name} has {size:,} images to train on; 0: all")
    ids = np.sort(np.random.default_rng(0).permutation(size)[:count])
    ends = np.searchsorted(ids, np.cumsum([*source.parts.values()]))
    parts = dict(zip(source.parts, np.diff(ends, prepend=0).tolist(), strict=True))
    return source._replace(splits={**source.splits, "train": subset(source.splits["train"], ids)}, parts=parts)


def of_stage(source: Source, config: ConfigDict, name: str) -> Source:
    """The source of a run as its stage `name` sees it: trained on is the beginning that its own `data.train` names."""
    train = for_stage(config, name).data.train
    if train == config.data.train:
        return source
    parts = {part: source.parts[part] for part in train.split("+")}
    split = first(source.splits["train"], sum(parts.values()))
    return source._replace(splits={**source.splits, "train": split}, parts=parts)


def of_last_stage(source: Source, config: ConfigDict) -> Source:
    """The source of a run as its last stage sees it, whose clusters are those of the run."""
    return of_stage(source, config, stage_names(config)[-1])


def _check_stage(config: ConfigDict, name: str) -> None:
    own = config.stage[name].get("data", {}) if name in config.stage else {}
    for field in own:
        if field not in OF_A_STAGE:
            raise ConfigError(
                f"config.stage.{name}.data.{field}={own[field]!r}: images are read once, for all stages; set "
                f"config.data.{field} (a stage may have its own {', '.join(OF_A_STAGE)})"
            )
    train = for_stage(config, name).data.train
    if not f"{config.data.train}+".startswith(f"{train}+"):
        raise ConfigError(
            f"config.stage.{name}.data.train={train!r} must be the beginning of config.data.train="
            f"{config.data.train!r}, so that an id means the same image in all stages"
        )


def files_of(config: ConfigDict) -> Path | None:
    """The folder that the images of `config.data.source` are files in, None if they are not."""
    kind, _, where = config.data.source.partition(":")
    path = Path(where).expanduser()
    return {"folder": path, "cars196": path, "table": path.parent}.get(kind)
