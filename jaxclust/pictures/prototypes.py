"""The images most similar to the prototype of each cluster, after Niu, Shan, Wang, arXiv 2103.09382 (SPICE)."""

import csv
from functools import partial
from pathlib import Path

from jaxclust.data.pipeline import images_at
from jaxclust.data.source import Source, Split
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._prototypes import COLUMNS, Prototypes, find, names_of, sheets, source_of
from jaxclust.report.gallery import Gallery


def prepare(seen: Seen) -> Draw:
    """Checks that there are images, and a method that says how probable each cluster is."""
    return partial(draw, seen, source_of(seen))


def draw(seen: Seen, source: Source, folder: Path) -> Gallery:
    """prototypes.png, a row for each cluster, and prototypes.csv with the files."""
    split = source.splits["train"]
    found = find(seen, split, seen.stage.method.embed, COLUMNS, folder)
    write(folder / "prototypes.csv", found, split)
    images = (images_at(split, ids) for ids in found.ids)
    names = names_of(found.cluster, split, source.class_names or ())
    note = "each row: the images most similar to one cluster's prototype"
    caption = (
        "A prototype is the mean feature of the images that a cluster is surest of; images follow by their similarity "
        "to it, whatever cluster they are in."
    )
    return Gallery("Prototypes", caption, sheets(images, found, names, note, folder, "prototypes"))


def write(path: Path, found: Prototypes, split: Split) -> None:
    """Which images were drawn: prototype, rank (1: the most similar), id, path."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table:  # names of files
        writer = csv.writer(table)
        writer.writerow(("prototype", "rank", "id", "path"))
        for c, ids in enumerate(found.ids.tolist()):
            writer.writerows((c, rank, id, split.path(id)) for rank, id in enumerate(ids, 1))
