"""The images whose group was told wrongly, as files and as a sheet (--failurecases).

Section 2.9 of our specification of ClustNet.
"""

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Source, Split
from jaxclust.errors import DataError
from jaxclust.features.score_file import Scores
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._epochs import split_of
from jaxclust.pictures._plots import save
from jaxclust.progress import progress
from jaxclust.report import experiment, figures
from jaxclust.report.gallery import Gallery, Shown
from jaxclust.train.image_rows import between

SIDE = 300  # pixels of a file
ROWS = 20  # classes on a sheet
COLUMNS = 13
COLUMN_NAMES = ("id", "path", "class", "target", "predicted", "expert")
GROUPS = "NP"
WITH_ID = "a training with --config.scores.index=True writes it"


class Failures(NamedTuple):
    """The images [M] whose likelier group is the wrong one, in the order of the file."""

    id: NDArray[np.int32]
    scores: Scores  # of these alone


def prepare(seen: Seen) -> Draw:
    """DataError where there are no scores, or no images to show."""
    if len(seen.stage.info.image_shape) != 3:
        raise DataError("the run is on vectors, of which there are no images to show")
    net = experiment.alone(seen.stage.workdir, seen.stage.config)
    if not experiment.files(net.workdir, experiment.of_split(net.config)):
        raise DataError(experiment.missing(net))
    return partial(draw, seen, seen.source())


def draw(seen: Seen, source: Source, folder: Path) -> Gallery:
    """epoch<e>/<id>.png of each wrong image, epoch<e>.csv, and a sheet; by default of the last epoch."""
    name, split = split_of(seen, source)
    net = experiment.alone(seen.stage.workdir, seen.stage.config)
    in_order = experiment.of_split(net.config) == "test"

    def failed_in(epoch: int, scores: Scores) -> Failures:
        known = in_order or scores.id is not None
        return wrong(split.size, in_order, scores if known else named(seen, epoch, scores))

    found, skipped = experiment.of_epochs(net, failed_in, last=True)
    images = []
    for epoch, failed in found.items():
        write(folder / f"epoch{epoch}.csv", failed, split, source.class_names or ())
        (folder / f"epoch{epoch}").mkdir()
        for id, image in _each(split, failed.id, f"failures of epoch {epoch}"):
            enlarged(image).save(folder / f"epoch{epoch}" / f"{id}.png")
        images.append(_sheet(failed, split, source.class_names or (), folder, epoch))
    caption = (
        f"The {name} images whose likelier group is the wrong one; epoch<e>/ has all of them and epoch<e>.csv a list."
    )
    return Gallery("Failure cases", caption, images, epochs=experiment.spanned([*found]), skipped=skipped)


def named(seen: Seen, epoch: int, scores: Scores) -> Scores:
    """Scores of an epoch of training with the images that its rows are of, as rows/<stage>/ has them in their order.

    DataError where that is missing, or says other things of the images.
    """
    stage = seen.stage
    step = epoch * stage.lengths.round
    start, folder = step - stage.lengths.round, stage.workdir / "rows" / stage.name
    first = start * stage.config.batch_size
    try:
        gate, ids = between(folder, (start, step), (first, first + len(scores.label)), ("gate", "id"))
    except DataError as error:
        raise DataError(f"has no column sampleIdx, and {error}; {WITH_ID}") from None
    if gate.shape != scores.gate.shape or not np.allclose(gate, scores.gate, rtol=1e-6):
        raise DataError(f"has no column sampleIdx, and {folder} says other things of its images; {WITH_ID}")
    return scores._replace(id=ids)


def wrong(size: int, in_order: bool, scores: Scores) -> Failures:
    """Where group and prediction differ; DataError unless it is known which of `size` images the rows are of.

    Without sampleIdx that is known of a file of all images `in_order`.
    """
    rows = np.flatnonzero((scores.group >= 0) & (scores.binary != scores.group))
    if scores.id is None and not (in_order and len(scores.label) == size):
        raise DataError(
            f"has {len(scores.label):,} rows for {size:,} images, and no column sampleIdx says which they are of; "
            f"{WITH_ID}"
        )
    ids = rows.astype(np.int32) if scores.id is None else scores.id[rows]
    if len(ids) and not 0 <= ids.min() <= ids.max() < size:
        raise DataError(f"names image {ids.max()} of {size:,}")
    of = scores
    return Failures(ids, Scores(of.label[rows], of.group[rows], of.log_probs[rows], of.gate[rows], ids))


def enlarged(image: NDArray[np.uint8]) -> Image.Image:
    """An image uint8 [H, W, C] with its darkest value 0 and its brightest 255, 300 x 300 without smoothing."""
    low, high = float(image.min()), float(image.max())
    stretched = np.round((image - low) / max(high - low, 1.0) * 255).astype(np.uint8)
    picture = Image.fromarray(stretched[..., 0] if image.shape[2] == 1 else stretched)
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _each(split: Split, ids: NDArray[np.int32], title: str) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Each of the images once."""
    unique = np.unique(ids)
    for id in progress(unique.tolist(), len(unique), title, "images"):
        yield id, images_at(split, np.array([id], np.int32))[0]


def write(path: Path, failed: Failures, split: Split, classes: Sequence[str]) -> None:
    """id, path, class, target and prediction (1: P), the likeliest expert, and the probability of each."""
    scores = failed.scores
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table:  # names of files
        writer = csv.writer(table)
        writer.writerow((*COLUMN_NAMES, *(f"p{expert}" for expert in range(scores.gate.shape[1]))))
        for row, id in enumerate(failed.id.tolist()):
            label = int(scores.label[row])
            name = classes[label] if 0 <= label < len(classes) else label
            known = (id, split.path(id), name, scores.group[row], scores.binary[row], scores.expert[row])
            writer.writerow((*known, *(f"{p:.6g}" for p in scores.gate[row])))


def _sheet(failed: Failures, split: Split, classes: Sequence[str], folder: Path, epoch: int) -> Shown:
    """A row for each class with failures, those with most first."""
    labels, counts = np.unique(failed.scores.label, return_counts=True)
    title = f"epoch {epoch}: {len(failed.id):,} wrong"
    if not len(labels):
        return Shown("", title, "no image is in the wrong group")
    rows = []
    for place in np.argsort(-counts, kind="stable")[:ROWS].tolist():
        label, count = int(labels[place]), int(counts[place])
        of = failed.scores.label == label
        name = figures.printable(classes[label], 11) if 0 <= label < len(classes) else str(label)
        group = GROUPS[int(failed.scores.group[of][0])]
        shown = images_at(split, failed.id[of][:COLUMNS])
        rows.append(figures.Row(shown, f"class {name}", f"of {group}", f"{count:,} wrong", count / int(counts.max())))
    note = "each row: images of one class in the wrong group"
    words = f"the {ROWS} classes with most" if len(labels) > ROWS else ""
    columns = max(len(row.images) for row in rows)

    def figure(theme: figures.Theme) -> figures.Figure:
        return figures.overview(rows, title, max(columns, 6), note, theme)

    return save(figure, folder, f"epoch{epoch}", title, words)
