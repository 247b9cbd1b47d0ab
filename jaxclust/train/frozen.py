"""A frozen body sees each image once: its features are kept in the workdir and take the place of the images."""

from dataclasses import replace

from jaxclust import hosts
from jaxclust.data.feature_file import open_npy
from jaxclust.data.split import Split
from jaxclust.features.store import write_npy
from jaxclust.files import replacing
from jaxclust.methods.base import TrainState
from jaxclust.train.refresh import run
from jaxclust.train.stage import Stage


def with_features(stage: Stage, state: TrainState, restored: bool) -> Stage:
    """The stage with the features of its images, from features/<stage>.npy if the stage goes on (`restored`).

    Where it is judged during training also of the images that it is judged on, in features/<stage>-<split>.npy.
    """
    if len(stage.split.image_shape) == 1:
        return stage
    judged = stage.others if stage.lengths.eval else {}
    others = {name: kept(stage, state, split, f"{stage.name}-{name}", restored) for name, split in judged.items()}
    split = kept(stage, state, stage.split, stage.name, restored)
    return stage._replace(split=split, others={**stage.others, **others})


def kept(stage: Stage, state: TrainState, split: Split, name: str, restored: bool) -> Split:
    """The features of a split, which are in features/`name`.npy, or are made now."""
    path = stage.workdir / "features" / f"{name}.npy"
    if not (restored and hosts.agreed(path.exists())):  # from before the first checkpoint it may be of another body
        rows = run(stage._replace(split=split), state, stage.body, "features of the frozen body")["features"]
        if hosts.is_first():
            with replacing(path) as temporary:
                write_npy(temporary, rows)
        else:
            for _ in rows.in_order():
                pass
        hosts.wait("the file of features")
    features = open_npy(path, split.name_of, stage.config.data.cache_bytes)
    return replace(features, paths=split.paths, labels=split.labels)
