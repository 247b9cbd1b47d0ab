"""A few images, and what an autoencoder makes of their codes. Section 2.10 of our specification of ClustNet."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Source
from jaxclust.data.subset import subset
from jaxclust.errors import DataError
from jaxclust.features.extract import compile_for
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._epochs import found, kept, split_of, states
from jaxclust.pictures._plots import save
from jaxclust.pictures.views import Column, grid
from jaxclust.report.gallery import Gallery

COUNT = 10


def prepare(seen: Seen) -> Draw:
    """DataError where the method has no decoder, or there are no images or checkpoints."""
    if seen.stage.method.reconstruct is None:
        raise DataError(
            f"method {seen.stage.config.method!r} of stage {seen.stage.name!r} has no decoder; another stage may: "
            "config.report.stage"
        )
    return partial(draw, seen, kept(seen, last=True), seen.source())


def draw(seen: Seen, epochs: Sequence[int], source: Source, folder: Path) -> Gallery:
    """reconstructions.png, <id>.png of ten images, and <id>-epoch<e>.png; by default of the last epoch."""
    name, split = split_of(seen, source)
    rng = np.random.default_rng((seen.stage.config.seed, 8))
    ids = np.sort(rng.permutation(split.size)[:COUNT])
    assert seen.stage.method.reconstruct is not None
    program, part = compile_for(seen.stage.method.reconstruct, seen.stage.mesh), subset(split, ids)
    columns = [Column("image", images_at(split, ids.astype(np.int32))[:, None])]
    for epoch, state in states(seen, epochs):
        made = np.concatenate([batch["features"] for batch in found(seen, state, program, part, epoch)])
        shown = np.clip(np.round(made.astype(np.float64)), 0, 255).astype(np.uint8)
        columns.append(Column(f"epoch {epoch}", shown[:, None]))
    for column in columns:
        suffix = "" if column.name == "image" else f"-{column.name.replace(' ', '')}"
        for id, image in zip(ids.tolist(), column.images[:, 0], strict=True):
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(folder / f"{id}{suffix}.png")
    caption = f"In each row a {name} image, and what the decoder makes of its code."
    return Gallery("Reconstructions", caption, [save(partial(grid, columns), folder, "reconstructions")])
