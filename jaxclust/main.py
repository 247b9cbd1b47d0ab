"""The one entry point: `python -m jaxclust.main --config=configs/deepcluster.py [--workdir=DIR] [--job=train]`."""

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxclust import config as config_lib
from jaxclust import plugins, watch
from jaxclust.errors import ConfigError, JaxclustError, Stopped
from jaxclust.files import check_place
from jaxclust.heartbeats import Place
from jaxclust.jobs.options import Options

ON_SEVERAL_HOSTS = ("train", "evaluate")
WRONG_TYPE = (flags.Error, TypeError, ValueError, SyntaxError)  # what ml_collections raises of a value


class Command(NamedTuple):
    """What the command line says."""

    config: ConfigDict
    workdir: Path
    job: str
    options: Options
    place: Place | None = None  # None where it says nothing of other hosts
    settings: tuple[str, ...] = ()  # names of those that it says itself


class SaidByFirst(ConfigError):
    """A wrong setting: all hosts have the same ones, so host 0 says it for all."""


def main(argv: Sequence[str]) -> int:
    """Runs the job that the command line asks for; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    own = _process_id(argv)
    try:
        run(parse(argv))
    except JaxclustError as error:
        if not (own and isinstance(error, Stopped | SaidByFirst)):
            print(f"jaxclust: {f'host {own}: ' if own else ''}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        if error.filename is None:  # of no file that somebody named
            raise
        place = f"host {own}: " if own else ""
        print(f"jaxclust: {place}{error.filename2 or error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return JaxclustError.exit_code
    return 0


def run(command: Command) -> None:
    """Runs the job, on several hosts if this process is one of several."""
    import jax  # here, so that a wrong command line is answered at once

    from jaxclust import hosts, runtime

    runtime.start(command.config)
    job = plugins.load("jaxclust.jobs", command.job, "--job", "run")
    place = hosts.place(command.place)
    if place is None or place.process == 0:
        for line in config_lib.left_alone(command.config, command.settings):
            print(line, flush=True)
    if place is None:
        job.run(command.config, command.workdir, command.options)
        return
    if command.job not in ON_SEVERAL_HOSTS:
        raise ConfigError(
            f"--job={command.job} is for one process, and this is one of {place.processes}; start it alone, without "
            f"--num_processes. On several hosts there is: {', '.join(ON_SEVERAL_HOSTS)}"
        )
    runtime.tensorflow()  # a slow disk may hold its import up, and now nobody counts the seconds yet
    heartbeat = command.config.runtime.heartbeat
    hosts.join(place, heartbeat)
    if place.process:  # host 0 speaks and warns for all, but for errors
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where libraries write too
        logging.getLogger().setLevel(logging.ERROR)
    try:
        patience = command.config.runtime.deadline + 2 * heartbeat  # a clustering on host 0 has its say before
        with watch.together(place, hosts.store(), heartbeat, patience):
            runtime.require_equal_hosts(jax.devices())
            job.run(command.config, command.workdir, command.options)
    finally:
        hosts.leave()


def parse(argv: Sequence[str]) -> Command:
    """Reads the command line; ConfigError on whatever is wrong with it."""
    overrides, others = _split(list(argv[1:]))
    known = flags.FlagValues()
    texts = {
        "config": "a file in configs/ and its variants, such as configs/deepcluster.py:mnist,smoke",
        "workdir": "folder of the run; by default runs/<config>-<variant>-<source>",
        "job": "train, evaluate, predict, export, sweep, report or plan",
        "images": "predict: folder of images",
        "out": "predict: the .csv or .parquet file to write",
        "by-cluster": "export: link or copy, folders of the images of each cluster",
        "topology": "plan: the devices to compile for, such as v5e:16x16 or cpu:8",
        "coordinator": "several hosts: HOST:PORT of host 0, the same on all; or $JAX_COORDINATOR_ADDRESS",
        "num_processes": "several hosts: how many there are; or $JAX_NUM_PROCESSES",
        "process_id": "several hosts: which one this is, from 0; or $JAX_PROCESS_ID",
    }
    for name, words in texts.items():
        flags.DEFINE_string(name, "train" if name == "job" else "", words, flag_values=known)
    flags.DEFINE_bool("overwrite", False, "export: replace what an earlier export wrote", flag_values=known)
    flags.DEFINE_bool("largest", True, "plan: look for the largest batch that fits, too", flag_values=known)
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
    place = _place(known.coordinator, known.num_processes, known.process_id)
    config = _base_config(known.config, known.workdir, known.job, overrides)
    try:
        config = _override(config, overrides)
        if known.job != "sweep" and not _is_sweep(known.job, known.workdir):  # which fill in what is swept over
            config_lib.validate(config)
        workdir = Path(known.workdir or Path("runs") / default_name(known.config, config, known.job))
        if workdir.is_file():
            raise ConfigError(f"--workdir={workdir} is a file and no folder")
        if not workdir.exists():
            check_place(workdir, "--workdir")
    except ConfigError as error:
        raise SaidByFirst(str(error)) from None
    by_cluster = known["by-cluster"].value or ""
    options = Options(known.images, known.out, by_cluster, known.overwrite, known.topology, known.largest)
    return Command(config, workdir, known.job, options, place, tuple(map(_name_of, overrides)))


def _place(coordinator: str, num_processes: str, process_id: str) -> Place | None:
    """Where this process stands, by its flags or by the variables of the environment that take their place."""
    given = {
        "--coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
        "--num_processes": num_processes or os.environ.get("JAX_NUM_PROCESSES", ""),
        "--process_id": process_id or os.environ.get("JAX_PROCESS_ID", ""),
    }
    missing = [flag for flag, value in given.items() if not value]
    if len(missing) == len(given):
        return None
    if missing:
        there = ", ".join(f"{flag}={value}" for flag, value in given.items() if value)
        raise ConfigError(
            f"{there} without {' and '.join(missing)}: several hosts need all three (or the variables "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
        )
    address, count, index = given.values()
    if not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"--coordinator={address} must be HOST:PORT, the address of host 0")
    if not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"--num_processes={count} must be a number from 1")
    if not index.isdecimal() or int(index) >= int(count):
        raise ConfigError(f"--process_id={index} must be from 0 to {int(count) - 1}, with --num_processes={count}")
    return Place(address, int(count), int(index))


def _process_id(argv: Sequence[str]) -> int:
    """Which host this is, before anything was read, so that a wrong command line need not be said by all."""
    flag = re.search(r"--?process_id[= ](\d+)", " ".join(argv))
    names = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
    said = flag[1] if flag else next((os.environ[name] for name in names if name in os.environ), "")
    return int(said) if said.isdecimal() else 0


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


def _base_config(flag: str, workdir: str, job: str, overrides: list[str]) -> ConfigDict:
    """The config that --config names, or for a job on an existing run the workdir's own; a file of features that is
    to be evaluated needs none."""
    if flag:
        path, _, variant = flag.partition(":")
        return config_lib.from_file(Path(path), variant)
    saved = Path(workdir or ".") / ("base.json" if job == "sweep" or _is_sweep(job, workdir) else "config.json")
    features = any(re.match(r"--?config\.data\.source[= ]features:", text) for text in overrides)
    if job == "evaluate" and features and not saved.exists():
        return config_lib.base()
    if job == "train" or not workdir:
        raise ConfigError("--config is missing; for example --config=configs/deepcluster.py")
    if not saved.exists() and saved.with_name("base.json").exists():
        raise ConfigError(f"--workdir={workdir} is a sweep; choose one of its runs, such as --workdir={workdir}/net1")
    if not saved.exists():
        raise ConfigError(f"--workdir={workdir} holds no run (there is no {saved}); train one first, or give --config")
    return config_lib.load(saved)


def _is_sweep(job: str, workdir: str) -> bool:
    """Whether a report is to be of a sweep, each of whose runs is checked."""
    return job == "report" and bool(workdir) and (Path(workdir) / "base.json").exists()


def _name_of(override: str) -> str:
    return override.lstrip("-").removeprefix("config.").partition("=")[0]


def _override(config: ConfigDict, overrides: list[str]) -> ConfigDict:
    for text in overrides:
        name = _name_of(text)
        config_lib.make_room(config, name)
        names = [known for known, _ in config_lib.flatten(config)]
        if name not in names:
            raise config_lib.unknown(name, names)
    try:
        return _set(config, overrides)  # all at once: every reading takes as long
    except WRONG_TYPE:
        raise _at_fault(config, overrides) from None


def _set(config: ConfigDict, overrides: list[str]) -> ConfigDict:
    before, sys.argv = sys.argv, [sys.argv[0], *overrides]  # ml_collections reads overrides from there
    try:
        values = flags.FlagValues()
        config_flags.DEFINE_config_dict("config", config, flag_values=values)
        values(sys.argv)
    finally:
        sys.argv = before
    return values.config


def _at_fault(config: ConfigDict, overrides: list[str]) -> ConfigError:
    """The error for the first override whose value is of the wrong type."""
    for text in overrides:
        try:
            _set(config, [text])
        except WRONG_TYPE:
            name = _name_of(text)
            field = config_lib.field_of(name)
            assert field is not None
            return config_lib.wrong_type(name, text.partition("=")[2], field)
    raise AssertionError(f"no override of {overrides} is wrong by itself")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
