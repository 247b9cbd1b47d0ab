"""The pool of images that a step of SPICE labels: how many of each cluster, and which pools cannot be (6.2, 6.4)."""

import numpy as np
from ml_collections import ConfigDict

from jaxclust.cluster import warn_once
from jaxclust.errors import ConfigError
from jaxclust.methods.base import DataInfo
from jaxclust.ops import prototypes

FEW = 20  # images that make a centre; with fewer, clusters are known to die


def knots(config: ConfigDict) -> tuple[int, int, int, int]:
    """Epochs at which the ratio begins to leave `start`, is at `end`, begins to leave it, and is at `start` again."""
    r = config.spice.ratio
    return r.iter_start, r.iter_up, r.iter_down, r.iter_end


def course(config: ConfigDict) -> np.ndarray:
    """How many images of each cluster (make a centre, get a label) by epoch, int32 [E, 2]; the last row stays."""
    r, places = config.spice.ratio, knots(config)
    ratios = [prototypes.ratio(epoch, r.start, r.end, places) for epoch in range(places[-1] + 1)]
    return prototypes.sizes(config.batch_size, config.cluster.k, config.spice.center_ratio, ratios)


def check(config: ConfigDict, info: DataInfo) -> None:
    """ConfigError for a pool, a ratio or a body that cannot be worked with; a warning for a small pool.

    A stage without steps, which only refreshes, may have any.
    """
    s, k, pool = config.spice, config.cluster.k, config.batch_size
    if config.freeze_body and len(info.image_shape) > 1:
        raise ConfigError(
            f"config.freeze_body=True would keep one feature of each image, and config.method={config.method!r} needs "
            "views of them; set it to False, the body does not learn in any case"
        )
    if k < 2:
        raise ConfigError(f"config.cluster.k={k}: say into how many clusters, at least 2")
    if list(knots(config)) != sorted(knots(config)):
        raise ConfigError(f"config.spice.ratio: iter_start, iter_up, iter_down and iter_end fall: {knots(config)}")
    if not (config.rounds or config.steps):
        return
    if pool > info.size:
        raise ConfigError(f"config.batch_size={pool} images make the pool of a step, and there are only {info.size}")
    top, members = course(config).min(axis=0)
    if min(top, members) < 1:
        least = prototypes.least_images(k, s.center_ratio, min(s.ratio.start, s.ratio.end))
        raise ConfigError(
            f"config.batch_size={pool} images for config.cluster.k={k} clusters with config.spice.center_ratio="
            f"{s.center_ratio} leave a centre without an image; batch_size must be at least {least}"
        )
    labelled = pool if s.assignment == "argmax" else k * int(course(config)[:, 1].max())
    if labelled < s.train_sub_batch_size:
        raise ConfigError(
            f"config.spice.train_sub_batch_size={s.train_sub_batch_size} is more than the {labelled} images that get a "
            f"label in a pool of config.batch_size={pool}; lower it, or raise batch_size"
        )
    if top < FEW:
        warn_once(
            f"the centre of a cluster rests on {top} images of a pool, and with fewer than {FEW} clusters may die: "
            "raise config.batch_size or config.spice.center_ratio"
        )
