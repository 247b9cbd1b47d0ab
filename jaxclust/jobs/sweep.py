"""--job=sweep: a training for every combination of values, each in a numbered folder of its own, net1, net2, ….

Every process that is started on the same folder takes the runs that no other one has; a lock of the operating system
guards each, so that a process that dies leaves its run to the others. What is finished is not done again, and further
values get the next numbers.
"""

import fcntl
import itertools
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from jaxclust import config as config_lib
from jaxclust import pictures, plugins
from jaxclust.data.source import Source, of_stage, open_source
from jaxclust.errors import ConfigError, DataError, JaxclustError, Stopped
from jaxclust.files import locked, read_json, write_json
from jaxclust.jobs import report as report_job
from jaxclust.jobs import train
from jaxclust.jobs.options import Options
from jaxclust.kinds import Field
from jaxclust.progress import progress
from jaxclust.report import sweep as report
from jaxclust.report.sweep import DONE, FAILED, SEED, One, Value, Values, named, read_outcome
from jaxclust.runtime import StopSignal, stop_signal
from jaxclust.train import devices
from jaxclust.train import workdir as workdir_lib

EXAMPLE = "--config.sweep='cluster.k=5,10,20;seed=1..3'"
SILHOUETTE = "silhouette"
SECONDS_BETWEEN_LOOKS = 1.0  # at runs that another process has
MOST = 10_000  # values of a span such as 1..5


class Run(NamedTuple):
    """One training of a sweep: a net, whose number never changes."""

    values: Values
    config: ConfigDict
    number: int = 0  # from 1; 0: it has none yet

    @property
    def name(self) -> str:
        """Of its folder."""
        return report.name_of(self.number)

    @property
    def title(self) -> str:
        """What a person sees of it."""
        return f"{self.name} ({named(self.values)})"


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Trains what is not finished, then writes sweep.csv, summary.csv and report/index.html.

    Everything a user can have got wrong is found before the workdir is touched. A run that fails is recorded and the
    others go on; JaxclustError at the end names all that failed.
    """
    fields, asked = parse(config), pictures.load(config)
    runs = plan(config, fields)
    for line in config_lib.left_alone(runs[-1].config, fields):
        print(line, flush=True)
    check_workdir(config, workdir, fields)
    with stop_signal() as stop:
        begun = numbered(runs, registered(workdir))
        check_runs([run for run in begun if not is_finished(run, workdir)], workdir, stop)
        runs = register(config, workdir, fields, runs)
        work(runs, workdir, stop)
        with locked(workdir / "locks" / "sweep.lock", fcntl.LOCK_EX):
            report_job.side_by_side(asked, config, workdir)
            summary = report.write(workdir)
    print(f"\n{summary.table}\n{summary.hint}\nresults: {summary.page}", flush=True)
    failed = [(run.title, why) for run in runs for status, why in [read_outcome(workdir, run.name)] if status == FAILED]
    if failed:
        shown = "\n".join(f"  {title}: {why}" for title, why in failed)
        raise JaxclustError(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:\n{shown}")


def parse(config: ConfigDict) -> dict[str, list[Value]]:
    """The values of each setting to sweep over, as `config.sweep` says: "NAME=VALUE,VALUE;NAME=FIRST..LAST".

    A value with commas of its own stands in brackets: "NAME=(1,2),(3,4)". ConfigError on whatever is wrong.
    """
    parts = [part.strip() for part in config.sweep.split(";") if part.strip()]
    if not parts:
        raise ConfigError(f"--job=sweep needs config.sweep, NAME=VALUE,VALUE;NAME=FIRST..LAST, such as {EXAMPLE}")
    fields: dict[str, list[Value]] = {}
    for text in parts:
        short, _, values = text.partition("=")
        name, field = setting(config, short.strip())
        said = f"config.sweep: {text!r}"
        if name.startswith("runtime.") or name == "sweep":
            raise ConfigError(f"{said}: config.{name} is the same for all runs of a process and cannot be swept")
        if name in fields:
            raise ConfigError(f"{said}: config.{name} is swept twice; give all its values at once")
        fields[name] = [value for one in split_values(name, field, values) for value in parse_values(name, field, one)]
        twice = [value for i, value in enumerate(fields[name]) if value in fields[name][:i]]
        if twice:
            raise ConfigError(f"{said}: {twice[0]!r} is there twice")
    return fields


def setting(config: ConfigDict, short: str) -> tuple[str, Field]:
    """The full name of a setting and its field.

    Settings of the method's own section (`config.clustnet` for clustnet) may be called by the end of their name, where
    only one ends so. ConfigError if there is no such setting, or more than one.
    """
    known = [name for name, _ in config_lib.flatten(config)]
    method = config_lib.for_stage(config, config_lib.stage_names(config)[-1]).method
    own = [name for name in known if name.startswith(f"{method}.")]
    ends = [name for name in own if name.endswith(f".{short}")]
    found = [short] if short in known else ends
    if len(found) > 1:
        raise ConfigError(f"config.sweep: {short!r} may be {' or '.join(found)}; say which")
    field = config_lib.field_of(found[0]) if found else None
    if field is None:
        foreign = {*plugins.names("jaxclust.methods")} - {method}
        hints = [name for name in known if name.partition(".")[0] not in foreign]
        raise config_lib.unknown(short, [*hints, *(name.rpartition(".")[2] for name in own)])
    return found[0], field


def split_values(name: str, field: Field, text: str) -> list[str]:
    """The texts between commas that are in no brackets.

    ConfigError if a bracket stays open, or a setting of several numbers has none, which may mean one value or several.
    """
    if type(field.default) is tuple and "," in text and "(" not in text:
        apart = ",".join(f"({part.strip()})" for part in text.split(","))
        raise ConfigError(
            f"config.sweep: {name}={text}: a setting of several numbers has its values in brackets; {name}=({text}) is "
            f"one, {name}={apart} are several"
        )
    found = [part.strip() for part in re.split(r",(?![^()]*\))", text)]
    for part in found:
        if part.startswith("(") and ")" not in part:
            raise ConfigError(f"config.sweep: {name}={text}: the bracket of {part!r} is not closed")
    return found


def parse_values(name: str, field: Field, text: str) -> list[Value]:
    """The values of a text: one, or all whole numbers of a span such as 1..5, its ends included."""
    first, dots, last = text.partition("..")
    if type(field.default) is not int or not dots:
        return [parse_value(name, field, text)]
    low, high = (parse_value(name, field, end.strip()) for end in (first, last))
    assert isinstance(low, int) and isinstance(high, int)
    if not 0 <= high - low < MOST:
        raise ConfigError(f"config.sweep: {name}={text} must rise, to {MOST:,} values at most, such as seed=1..5")
    return list(range(low, high + 1))


def parse_value(name: str, field: Field, text: str) -> Value:
    """A value of the setting's own type; its range is checked with the whole config."""
    if not text:
        raise ConfigError(
            f"config.sweep: {name}= has an empty value; write NAME=VALUE,VALUE without a gap, such as {EXAMPLE}"
        )
    kind = type(field.default)
    inner = text[1:-1].strip() if text.startswith("(") and text.endswith(")") else text
    if kind is not tuple:
        return parse_one(name, field, kind, inner)
    kind = type(field.default[0]) if field.default else float
    parts = inner.removesuffix(",").split(",") if inner else []  # (5,) has one number, and so has 5
    return tuple(parse_one(name, field, kind, part.strip()) for part in parts)


def parse_one(name: str, field: Field, kind: type, text: str) -> One:
    """A text, a truth value or a number; ConfigError if it is none of this kind."""
    if kind is str:
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        number: int | float = kind(text)
        return number
    except (KeyError, ValueError):
        raise ConfigError(f"config.sweep: {name}: {text!r} must be of type {kind.__name__} ({field.allowed})") from None


def plan(config: ConfigDict, fields: Mapping[str, Sequence[Value]]) -> list[Run]:
    """A run for each combination, the last setting changing fastest; ConfigError if one is not allowed."""
    runs = []
    for combination in itertools.product(*fields.values()):
        values = dict(zip(fields, combination, strict=True))
        own = ConfigDict(config.to_dict())
        own.sweep = ""
        own.update_from_flattened_dict(values)
        if SILHOUETTE not in [name.strip() for name in own.evaluate.suite.split(",")]:
            own.evaluate.suite = f"{own.evaluate.suite},{SILHOUETTE}"
        runs.append(Run(values, config_lib.validate(own)))
    return runs


def numbered(runs: Sequence[Run], nets: Sequence[Values]) -> list[Run]:
    """The runs with their places in `nets`, which are all that were ever asked for, as numbers."""
    return [run._replace(number=nets.index(run.values) + 1 if run.values in nets else 0) for run in runs]


def registered(workdir: Path) -> list[Values]:
    """The values of all nets that there are, by number."""
    return list(report.read_plan(workdir).runs.values()) if (workdir / "base.json").exists() else []


def check_workdir(config: ConfigDict, workdir: Path, fields: Mapping[str, Sequence[Value]]) -> None:
    """Refuses a folder of something else or of another sweep; writes nothing."""
    base, where = workdir / "base.json", f"--workdir={workdir}"
    # These and temporary files are those of another process that begins this very sweep. It writes base.json before
    # anything else, so what else is seen before that is missing is no sweep's.
    own = ("locks", "sweep.json")
    foreign = workdir.exists() and any(path.name not in own and path.name[0] != "." for path in workdir.iterdir())
    if not base.exists():
        if (workdir / "config.json").exists():
            raise ConfigError(f"{where} holds a single run and no sweep; choose a new or an empty folder")
        if foreign:
            raise ConfigError(f"{where} holds other files and no sweep; choose a new or an empty folder")
        return
    there = report.read_plan(workdir).fields
    if set(there) != set(fields):
        raise ConfigError(
            f"{where} holds a sweep over {', '.join(there)}, not {', '.join(fields)}; use another --workdir"
        )
    changes = [c for c in config_lib.differences(config_lib.load(base), config) if c[0] not in fields]
    if changes:
        shown = "\n".join(f"  config.{name}: {old!r} there, {new!r} now" for name, old, new in changes)
        raise ConfigError(
            f"{where} holds a sweep with other settings:\n{shown}\nUse these settings, or another --workdir"
        )


def check_runs(runs: Sequence[Run], workdir: Path, stop: StopSignal) -> None:
    """Makes every stage of every run ready and forgets it; ConfigError or DataError names the run that cannot be."""
    sources: dict[str, Source] = {}
    different = {named({**run.values, SEED: 0}): run for run in runs}  # no seed is a wrong one
    for run in progress(different.values(), len(different), "checking the settings", "runs"):
        if stop.received:
            raise stop.error()
        try:
            data = run.config.data.to_json()
            source = sources[data] = sources.get(data) or open_source(run.config)
            config = on_any_cpu(workdir_lib.resolved(run.config, source.splits["train"].image_shape))
            names = config_lib.stage_names(config)
            stages = [train.ready(config, name, of_stage(source, config, name), workdir / run.name) for name in names]
            if stages[-1].predict is None:
                method = stages[-1].config.method
                raise ConfigError(f"config.method={method!r} predicts no clusters, which are what a sweep compares")
        except (ConfigError, DataError) as error:
            raise type(error)(f"{named(run.values)}: {error}") from error


def on_any_cpu(config: ConfigDict) -> ConfigDict:
    """`config` on one device where each training will choose how many its batches can be split over."""
    free = not (config.runtime.devices or config.runtime.cpu_devices) and jax.default_backend() == "cpu"
    return devices.with_devices(config, 1) if free else config


def register(
    config: ConfigDict, workdir: Path, fields: Mapping[str, Sequence[Value]], runs: Sequence[Run]
) -> list[Run]:
    """The runs with their numbers, which nobody else gets.

    Writes base.json, the config, and sweep.json, the fields and all runs that were ever asked for, by number.
    """
    with locked(workdir / "locks" / "sweep.lock", fcntl.LOCK_EX):
        check_workdir(config, workdir, fields)  # once more, now that nobody else can write
        nets = registered(workdir)
        nets += [run.values for run in runs if run.values not in nets]
        names = report.read_plan(workdir).fields if (workdir / "base.json").exists() else tuple(fields)
        write_json(workdir / "sweep.json", {"fields": names, "runs": nets})
        config_lib.save(config, workdir / "base.json")
    return numbered(runs, nets)


def work(runs: Sequence[Run], workdir: Path, stop: StopSignal) -> None:
    """Trains the runs one after the other; those that another process has are looked at again until they are done."""
    again = {run.name for run in runs if read_outcome(workdir, run.name)[0] == FAILED}  # the cause may be gone
    left, waiting = dict(enumerate(runs, 1)), False
    while left:
        busy = {}
        for number, run in left.items():
            if stop.received:
                raise stop.error()
            with locked(workdir / "locks" / f"{run.name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
                failed = read_outcome(workdir, run.name)[0] == FAILED and run.name not in again
                if not mine:
                    busy[number] = run
                elif not failed and not is_finished(run, workdir):
                    print(f"\n[{number}/{len(runs)}] {run.title}", flush=True)
                    train_one(run, workdir)
                    again.discard(run.name)
        if len(busy) == len(left):
            if not waiting:
                print(f"waiting for another process, which has {len(busy)} of the {len(runs)} runs", flush=True)
            waiting = True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        left = busy


def train_one(run: Run, workdir: Path) -> None:
    """Trains, evaluates and reports one run, from where it stands, and records how it ended."""
    record = workdir / "outcomes" / f"{run.name}.json"
    record.unlink(missing_ok=True)
    status, why = DONE, ""
    try:
        train.run(run.config, workdir / run.name, Options())
    except Stopped:
        raise
    except JaxclustError as error:
        status, why = FAILED, str(error)
        print(f"{run.title} failed: {error}", file=sys.stderr, flush=True)
    write_json(record, {"status": status, "why": why})


def is_finished(run: Run, workdir: Path) -> bool:
    """Whether the run has ended well, with the length and the evaluation that it is to have.

    Not if its files are damaged: of these the training says what to do.
    """
    folder = workdir / run.name
    files = (folder / name for name in ("config.json", "results.json", "assignments.csv"))
    if not run.number or read_outcome(workdir, run.name)[0] != DONE or not all(path.exists() for path in files):
        return False
    try:
        there = dict(config_lib.flatten(config_lib.load(folder / "config.json")))
        read_json(folder / "results.json")
    except DataError:
        return False
    return all(there.get(name) == value for name, value in config_lib.flatten(run.config) if may_grow(name))


def may_grow(name: str) -> bool:
    """Whether a setting may differ from an earlier start and leaves more to do."""
    return name.rpartition(".")[2] in ("rounds", "steps", "stages") or ".evaluate." in f".{name}"
