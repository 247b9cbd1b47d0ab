"""--job=report: pictures from a run's network and images, then one page from the files of its workdir."""

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxclust import pictures
from jaxclust.config import did_you_mean, stage_names
from jaxclust.data.source import Source, Split, of_last_stage, open_source
from jaxclust.errors import ConfigError, DataError
from jaxclust.jobs import evaluate, export
from jaxclust.jobs.options import Options
from jaxclust.pictures import Seen
from jaxclust.report import gallery, html
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.checkpoint import Checkpoints


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Draws the pictures of `config.report.pictures`, as far as this run has what they are made from, then the page.

    ConfigError, before anything is drawn, if one of their settings is wrong.
    """
    asked = pictures.load(config)
    if asked:
        draw(asked, config, workdir)
    page(workdir)


def page(workdir: Path) -> None:
    """Writes report/index.html from what there is."""
    print(f"report: {html.write(workdir)}", flush=True)


def draw(asked: dict[str, ModuleType], config: ConfigDict, workdir: Path) -> None:
    """Each picture in pictures/<name>/, which takes the place of an earlier one when it is complete."""
    try:
        seen = look(config, workdir)
    except DataError as error:
        print(f"left out: {', '.join(asked)}: {error}", flush=True)
        return
    drawings = {}
    for name, module in asked.items():
        try:
            drawings[name] = module.prepare(seen)
        except DataError as error:
            print(f"left out: {name}: {error}", flush=True)
    (workdir / "pictures").mkdir(exist_ok=True)
    for name, drawing in drawings.items():
        target = workdir / "pictures" / name
        try:
            with export.replacing_folder(target, overwrite=True) as folder, export.stopping_cleanly():
                gallery.save(drawing(folder)._replace(**origin(seen)), folder)
        except DataError as error:
            print(f"left out: {name}: {error}", flush=True)
            continue
        print(f"{name}: {target}", flush=True)


def origin(seen: Seen) -> dict[str, Any]:
    """What a page says of where pictures come from; that there is only one stage goes without saying."""
    several = len(stage_names(seen.stage.config)) > 1
    return {"step": int(seen.state.step), "stage": seen.stage.name if several else ""}


def look(config: ConfigDict, workdir: Path) -> Seen:
    """The newest checkpoint of the stage that is pictured, for which no image is opened; DataError if there is none."""
    config = until_pictured(config)
    name = stage_names(config)[-1]
    if not Checkpoints.exist(workdir / "checkpoints" / name):
        raise DataError(f"there is no checkpoint of stage {name!r} yet")
    info = workdir_lib.data_info(workdir)
    config = workdir_lib.resolved(config, info.image_shape)
    no_images = Split(info.size, info.image_shape, str, load=lambda id: id)
    stage, state = evaluate.restore(config, workdir, no_images)
    return Seen(stage, state, functools.cache(functools.partial(opened, config, workdir)))


def until_pictured(config: ConfigDict) -> ConfigDict:
    """The config of the run up to the stage that `report.stage` names; ConfigError if there is none of that name."""
    names, name = stage_names(config), config.report.stage or stage_names(config)[-1]
    if name not in names:
        there_is = f"There is: {', '.join(names)}."
        raise ConfigError(f"config.report.stage={name!r} is unknown{did_you_mean(name, names)} {there_is}")
    config = ConfigDict(config.to_dict())
    config.stages = ",".join(names[: names.index(name) + 1])
    return config


def opened(config: ConfigDict, workdir: Path) -> Source:
    """The images of the run; DataError where they are no longer those that it began with."""
    source = open_source(config)
    workdir_lib.check(config, workdir, source)
    return of_last_stage(source, config)
