"""--job=report: pictures from a run's network, images and files, then one page from the files of its workdir.

Of a sweep those of each of its runs, then those of all side by side, and its own page.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from jaxclust import pictures
from jaxclust.config import stage_names, validate
from jaxclust.data.source import Source, Split, of_last_stage, open_source
from jaxclust.errors import ConfigError, DataError
from jaxclust.hints import did_you_mean
from jaxclust.jobs import evaluate, export
from jaxclust.jobs.options import Options
from jaxclust.pictures import Draw, Seen
from jaxclust.report import experiment, gallery, html, sweep
from jaxclust.report.experiment import Net
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.checkpoint import Checkpoints

Asked = Mapping[str, ModuleType]
Prepare = Callable[[], Draw]


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Draws the pictures of `config.report.pictures`, as far as this run has what they are made from, then the page.

    ConfigError, before anything is drawn, if one of their settings is wrong.
    """
    asked = pictures.load(config)
    if experiment.is_sweep(workdir):
        of_sweep(asked, config, workdir)
        return
    if asked:
        (net,) = experiment.chosen(experiment.read(workdir, config), config)
        draw(of_network(asked, config, workdir) | of_files(asked, net) | alone(asked, net), workdir)
    page(workdir)


def of_sweep(asked: Asked, config: ConfigDict, workdir: Path) -> None:
    """The pictures and the page of each run of a sweep that `config.report` asks for, and what compares these runs."""
    nets = experiment.chosen(experiment.read(workdir, config), config)
    somewhere = functools.cache(lambda name: any(_fits(asked[name], config, net) for net in nets))
    for net in nets if asked else ():
        print(f"\nnet {net.legend}", flush=True)
        own = validate(experiment.config_of(net.workdir, config))
        of_own = of_network(asked, own, net.workdir)
        of_own = {name: functools.partial(_or_left_out, prepare, name, somewhere) for name, prepare in of_own.items()}
        draw(of_own | of_files(asked, net), net.workdir)
        page(net.workdir)
    draw(compared(asked, nets), workdir)
    print(f"\nreport: {sweep.write(workdir).page}", flush=True)


def _or_left_out(prepare: Prepare, name: str, somewhere: Callable[[str], bool]) -> Draw:
    """What this run alone has not, such as a layer, is a DataError; what no run has stays a ConfigError."""
    try:
        return prepare()
    except ConfigError as error:
        if somewhere(name):
            raise DataError(f"{error} (other runs of the sweep have it)") from None
        raise


def _fits(module: ModuleType, config: ConfigDict, net: Net) -> bool:
    """Whether the picture can be made from a run's network."""
    try:
        module.prepare(look(experiment.config_of(net.workdir, config), net.workdir))
    except (ConfigError, DataError):
        return False
    return True


def at_the_end(config: ConfigDict, workdir: Path) -> None:
    """What a training draws when it is over: the pictures that need its files alone, and the page."""
    asked, net = _without_network(pictures.load(config)), experiment.alone(workdir, config)
    draw(of_files(asked, net) | alone(asked, net), workdir)
    page(workdir)


def side_by_side(asked: Asked, config: ConfigDict, workdir: Path) -> None:
    """What a sweep draws when it is over, or as far as it is: the pictures that compare its runs by their files."""
    draw(compared(_without_network(asked), experiment.read(workdir, config)), workdir)


def _without_network(asked: Asked) -> Asked:
    return {name: module for name, module in asked.items() if not hasattr(module, "prepare")}


def page(workdir: Path) -> None:
    """Writes report/index.html from what there is."""
    print(f"report: {html.write(workdir)}", flush=True)


def of_files(asked: Asked, net: Net) -> dict[str, Prepare]:
    """The pictures that are made from files of a run."""
    return {name: functools.partial(module.read, net) for name, module in asked.items() if hasattr(module, "read")}


def alone(asked: Asked, net: Net) -> dict[str, Prepare]:
    """The pictures of a single run that else compare several, where it has no other of that name."""
    only = {name: module for name, module in asked.items() if not {"prepare", "read"} & {*dir(module)}}
    return {name: functools.partial(module.compare, [net]) for name, module in only.items()}


def compared(asked: Asked, nets: Sequence[Net]) -> dict[str, Prepare]:
    """The pictures that show the runs of a sweep side by side."""
    able = {name: module for name, module in asked.items() if hasattr(module, "compare") and nets}
    return {name: functools.partial(module.compare, nets) for name, module in able.items()}


def of_network(asked: Asked, config: ConfigDict, workdir: Path) -> dict[str, Prepare]:
    """The pictures that are made from the network or the images of a run; none if it has no checkpoint yet."""
    modules = {name: module for name, module in asked.items() if hasattr(module, "prepare")}
    if not modules:
        return {}
    try:
        seen = look(config, workdir)
    except DataError as error:
        print(f"left out: {', '.join(modules)}: {error}", flush=True)
        return {}
    return {name: functools.partial(_with_origin, module, seen) for name, module in modules.items()}


def _with_origin(module: ModuleType, seen: Seen) -> Draw:
    drawing = module.prepare(seen)
    return lambda folder: drawing(folder)._replace(**origin(seen))


def draw(asked: Mapping[str, Prepare], workdir: Path) -> None:
    """Each picture in pictures/<name>/, which takes the place of an earlier one when it is complete."""
    drawings = {}
    for name, prepare in asked.items():
        try:
            drawings[name] = prepare()
        except DataError as error:
            print(f"left out: {name}: {error}", flush=True)
    if drawings:
        (workdir / "pictures").mkdir(exist_ok=True)
    for name, drawing in drawings.items():
        target = workdir / "pictures" / name
        try:
            with export.replacing_folder(target, overwrite=True) as folder, export.stopping_cleanly():
                found = drawing(folder)
                gallery.save(found, folder)
        except DataError as error:
            print(f"left out: {name}: {error}", flush=True)
            continue
        print(f"{name}: {target}", flush=True)
        for words in found.skipped:
            print(f"skipped: {words}", flush=True)


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
    """The config of the run up to the stage that `report.stage` names, or where it leaves that out, up to its last one.

    ConfigError if the config has no stage of that name.
    """
    names, name = stage_names(config), config.report.stage or stage_names(config)[-1]
    if name not in {*names, *config.stage}:
        there_is = f"There is: {', '.join(names)}."
        raise ConfigError(f"config.report.stage={name!r} is unknown{did_you_mean(name, names)} {there_is}")
    if name not in names:
        print(f"pictures are of stage {names[-1]!r}: this run leaves out config.report.stage={name!r}", flush=True)
        name = names[-1]
    config = ConfigDict(config.to_dict())
    config.stages = ",".join(names[: names.index(name) + 1])
    return config


def opened(config: ConfigDict, workdir: Path) -> Source:
    """The images of the run; DataError where they are no longer those that it began with."""
    source = open_source(config)
    workdir_lib.check(config, workdir, source)
    return of_last_stage(source, config)
