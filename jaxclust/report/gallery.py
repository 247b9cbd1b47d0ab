"""Pictures that lie ready in a workdir: pictures/<kind>/ holds files, gallery.json says what a page shows of them."""

import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import jinja2
from PIL import Image

from jaxclust.files import write_json
from jaxclust.report import figures

NAME = "gallery.json"


class Shown(NamedTuple):
    """A picture on the page: a file beside gallery.json, one more for dark pages if it has paper, and words."""

    file: str  # empty: there is nothing to show but words
    title: str
    caption: str
    dark: str = ""
    size: tuple[int, int] | None = None  # width and height, as found in the file


class Gallery(NamedTuple):
    """All pictures of a kind, with the step of the checkpoint they are drawn from, and of several stages its own."""

    title: str
    caption: str
    images: list[Shown]
    step: int | None = None
    stage: str = ""
    skipped: Sequence[str] = ()  # files that could not be read, and why


def template(name: str) -> jinja2.Template:
    """A page that shows galleries, by the name of its file in this folder."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["printable"] = figures.printable
    return environment.get_template(name)


def _text(name: str) -> str:
    return resources.files("jaxclust.report").joinpath(name).read_text(encoding="utf-8")


def save(gallery: Gallery, folder: Path) -> None:
    """Writes gallery.json."""
    content = {**gallery._asdict(), "images": [shown._asdict() for shown in gallery.images]}
    write_json(folder / NAME, content)


def read(workdir: Path) -> dict[str, Gallery]:
    """The galleries of a workdir by the name of their folder; whatever is absent or half written is left out."""
    return dict(_galleries(workdir / "pictures"))


def _galleries(folder: Path) -> Iterator[tuple[str, Gallery]]:
    for path in sorted(folder.glob(f"*/{NAME}")):
        if path.parent.name.startswith("."):
            continue  # is being drawn
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            images = [_shown(path.parent, Shown(**shown)) for shown in content.pop("images")]
            yield path.parent.name, Gallery(**content, images=images)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue


def _shown(folder: Path, shown: Shown) -> Shown:
    if not shown.file:
        return shown
    for name in (shown.file, shown.dark or shown.file):
        if Path(name).name != name:
            raise ValueError(f"{name} is not a file of {folder}")
        with Image.open(folder / name) as image:
            size = image.size
    return shown._replace(size=size)
