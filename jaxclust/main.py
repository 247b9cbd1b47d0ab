"""The one entry point: `python -m jaxclust.main --config=configs/deepcluster.py [--workdir=DIR] [--job=train]`."""

import importlib.util
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxclust import config as config_lib
from jaxclust import plugins
from jaxclust.errors import ConfigError, JaxclustError
from jaxclust.jobs.options import Options


class Command(NamedTuple):
    """What the command line says."""

    config: ConfigDict
    workdir: Path
    job: str
    options: Options


def main(argv: Sequence[str]) -> int:
    """Runs the job that the command line asks for; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        command = parse(argv)
        from jaxclust import runtime  # here, so that a wrong command line is answered at once

        runtime.start(command.config)
        job = plugins.load("jaxclust.jobs", command.job, "--job", "run")
        job.run(command.config, command.workdir, command.options)
    except JaxclustError as error:
        print(f"jaxclust: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def parse(argv: Sequence[str]) -> Command:
    """Reads the command line; ConfigError on whatever is wrong with it."""
    overrides, others = _split(list(argv[1:]))
    known = flags.FlagValues()
    texts = {
        "config": "a file in configs/ and its variants, such as configs/deepcluster.py:mnist,smoke",
        "workdir": "folder of the run; by default runs/<config>-<variant>-<source>",
        "job": "train, evaluate, predict, export, sweep or report",
        "images": "predict: folder of images",
        "out": "predict: the .csv or .parquet file to write",
        "by-cluster": "export: link or copy, folders of the images of each cluster",
    }
    for name, words in texts.items():
        flags.DEFINE_string(name, "train" if name == "job" else "", words, flag_values=known)
    flags.DEFINE_multi_string("over", [], "sweep: NAME=VALUE,VALUE,…, such as cluster.k=5,10,20", flag_values=known)
    flags.DEFINE_bool("overwrite", False, "export: replace what an earlier export wrote", flag_values=known)
    flags.DEFINE_bool("help", False, "show this", short_name="h", flag_values=known)
    try:
        rest = known([argv[0], *others])
    except flags.Error as error:
        raise ConfigError(str(error)) from None
    if known.help:
        print(f"{__doc__}\n\n{known.get_help()}\nEvery setting: --config.NAME=VALUE; docs/config.md lists them.")
        raise SystemExit(0)
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is no flag; write --flag=value")
    config = _override(_base_config(known.config, known.workdir, known.job), overrides)
    if known.job != "sweep":  # which fills in what it sweeps over, and checks each of its runs
        config_lib.validate(config)
    workdir = Path(known.workdir or Path("runs") / default_name(known.config, config, known.job))
    options = Options(known.images, known.out, known["by-cluster"].value or "", tuple(known.over), known.overwrite)
    return Command(config, workdir, known.job, options)


def default_name(config_flag: str, config: ConfigDict, job: str = "train") -> str:
    """<config>-<variant>-<source>, without what is empty or said twice; a sweep is another folder than a run."""
    path, _, variant = config_flag.partition(":")
    kind, _, where = config.data.source.partition(":")
    parts = [Path(path).stem, *variant.split(","), kind, where if kind == "tfds" else Path(where).stem]
    parts += ["sweep"] if job == "sweep" else []
    slugs = [re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.") for part in parts]
    return "-".join(dict.fromkeys(slug for slug in slugs if slug))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The overrides (--config.name=value or --config.name value), and everything else."""
    overrides, others = [], []
    while arguments:
        argument = arguments.pop(0)
        if not re.match(r"--?config\.", argument):
            others.append(argument)
            continue
        if "=" not in argument and arguments and not arguments[0].startswith("-"):
            argument = f"{argument}={arguments.pop(0)}"
        overrides.append(argument)
    return overrides, others


def _base_config(flag: str, workdir: str, job: str) -> ConfigDict:
    """The config that --config names, or for a job on an existing run the workdir's own."""
    if flag:
        path, _, variant = flag.partition(":")
        return load_config(Path(path), variant)
    saved = Path(workdir or ".") / ("base.json" if job == "sweep" else "config.json")
    if job == "train" or not workdir:
        raise ConfigError("--config is missing; for example --config=configs/deepcluster.py")
    if not saved.exists():
        raise ConfigError(f"--workdir={workdir} holds no run (there is no {saved}); train one first, or give --config")
    return config_lib.load(saved)


def load_config(path: Path, variant: str) -> ConfigDict:
    """`get_config(variant)` of a config file."""
    if not path.is_file():
        raise ConfigError(f"--config={path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def _override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
    names = [name for name, _ in config_lib.flatten(config)]
    for text in overrides:
        name = text.lstrip("-").removeprefix("config.").partition("=")[0]
        if name not in names:
            raise config_lib.unknown(name, names)
    before, sys.argv = sys.argv, [sys.argv[0], *overrides]  # ml_collections reads the overrides from there
    try:
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", config, flag_values=values)
        values(sys.argv)
    except (flags.Error, TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(f"{' '.join(overrides)}: {error}") from None
    finally:
        sys.argv = before
    return values.config


if __name__ == "__main__":
    sys.exit(main(sys.argv))
