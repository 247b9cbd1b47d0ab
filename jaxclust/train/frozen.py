"""A frozen body sees each image once: its features are kept in the workdir and take the place of the images."""

from dataclasses import replace

from jaxclust import hosts
from jaxclust.data.feature_file import open_npy
from jaxclust.features.store import write_npy
from jaxclust.files import replacing
from jaxclust.methods.base import TrainState
from jaxclust.train.refresh import run
from jaxclust.train.stage import Stage


def with_features(stage: Stage, state: TrainState, restored: bool) -> Stage:
    """The stage with the features of its images, from features/<stage>.npy if the stage goes on (`restored`)."""
    split = stage.split
    if len(split.image_shape) == 1:
        return stage
    path = stage.workdir / "features" / f"{stage.name}.npy"
    if not (restored and hosts.agreed(path.exists())):  # from before the first checkpoint it may be of another body
        rows = run(stage, state, stage.body, "features of the frozen body")["features"]
        if hosts.is_first():
            with replacing(path) as temporary:
                write_npy(temporary, rows)
        else:
            for _ in rows.in_order():
                pass
        hosts.wait("the file of features")
    features = open_npy(path, split.name_of, stage.config.data.cache_bytes)
    return stage._replace(split=replace(features, paths=split.paths, labels=split.labels))
