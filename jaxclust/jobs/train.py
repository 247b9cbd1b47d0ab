"""--job=train: from images to clusters, features' checkpoint, results and report in one command."""

import fcntl
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxclust import hosts, pictures
from jaxclust.config import stage_names
from jaxclust.data.source import Source, of_stage, open_source
from jaxclust.errors import ConfigError
from jaxclust.evaluation import suite
from jaxclust.files import locked
from jaxclust.heartbeats import uncounted
from jaxclust.jobs import evaluate, report
from jaxclust.jobs.options import Options
from jaxclust.methods.base import DataInfo
from jaxclust.runtime import stop_signal
from jaxclust.train import devices
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.loop import run_stage, steps_done
from jaxclust.train.stage import Stage, prepare
from jaxclust.train.writer import seconds_of


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Runs every stage that is not done, then evaluates and reports.

    Everything a user can have got wrong is found before the workdir is touched.
    """
    started = time.monotonic()
    source = open_source(config)
    config = workdir_lib.resolved(config, source.splits["train"].image_shape)
    names = stage_names(config)
    sources = {name: of_stage(source, config, name) for name in names}
    workdir_lib.check(config, workdir, source)
    evaluate.check_suite(config, source)
    pictures.load(config)  # only to see that every picture exists
    on = devices.choose(config, workdir, lambda config: ready(config, names[0], sources[names[0]], workdir))
    stages = [ready(on, name, sources[name], workdir) for name in names]
    evaluate.check_probes(stages[-1])
    learnt = any(stage.method.labels for stage in stages)
    print(describe(source, "to learn from" if learnt else "for evaluation only"), flush=True)
    used = stages[0].mesh.size
    if (before := workdir_lib.devices_used(workdir)) not in (None, used):
        print(f"begun on {before} devices, now on {used}: the same images in the same order, rounded otherwise")
    with alone(config, workdir), stop_signal() as stop:
        earlier = seconds_of(workdir / "metrics.jsonl")
        finished = all(steps_done(stage) >= stage.lengths.stage for stage in stages)
        workdir_lib.write(config, workdir, source, used, keep=finished and is_longer(stages))
        evaluate.write_untrained(stages[0], sources[names[0]])
        for stage in stages:
            snapshot = run_stage(stage, stop)
            if stage is not stages[-1]:
                evaluate.write_stage(stage, snapshot.state, sources[stage.name])
        if stop.asked():
            raise stop.error()
        seconds = None if finished else earlier + time.monotonic() - started
        results = evaluate.write_results(stages[-1], snapshot.state, sources[names[-1]], seconds)
    if hosts.is_first():
        with uncounted():
            report.at_the_end(config, workdir)
    hosts.wait("the report")
    print(f"{evaluate.summary(results)}; {results['seconds']:,.0f} s", flush=True)
    print(f"results: {workdir / 'report' / 'index.html'}", flush=True)


def is_longer(stages: Sequence[Stage]) -> bool:
    """Whether a stage was trained for more steps than it now has, which is said."""
    longer = [stage for stage in stages if steps_done(stage) > stage.lengths.stage]
    for stage in longer:
        has, asked = (f"{steps / stage.lengths.round:g}" for steps in (steps_done(stage), stage.lengths.stage))
        print(f"{stage.name}: has {has} rounds already, {asked} were asked for; config.json stays as it is", flush=True)
    return bool(longer)


@contextmanager
def alone(config: ConfigDict, workdir: Path) -> Iterator[None]:
    """No other process trains in `workdir` within the block; ConfigError, on all hosts, if one does."""
    with ExitStack() as held:

        def hold() -> dict[str, np.ndarray]:
            try:
                mine = held.enter_context(locked(workdir / workdir_lib.LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except ConfigError as error:
                logging.getLogger(__name__).warning("%s. Do not start a second training in it", error)
            else:
                if not mine:
                    raise ConfigError(
                        f"--workdir={workdir} is in use: another process trains in it. Wait for that, stop it, or "
                        "choose another --workdir"
                    )
            return {}

        hosts.from_first(hold, "the lock of the workdir", config.runtime.deadline)
        yield


def ready(config: ConfigDict, name: str, source: Source, workdir: Path) -> Stage:
    """Stage `name` on its training images, judged on all splits that have labels."""
    split = source.splits["train"]
    labelled = {name: other for name, other in source.splits.items() if suite.has_labels(other.labels)}
    others = {name: other for name, other in labelled.items() if name != "train"}
    info = DataInfo(split.size, split.image_shape, source.train_classes, parts=tuple(source.parts.values()))
    return prepare(config, name, split, info, workdir, others=others)


def describe(source: Source, purpose: str) -> str:
    """One line on what the images are, and for what `purpose` their labels."""
    splits = ", ".join(f"{split.size:,} {name}" for name, split in source.splits.items())
    shape = source.splits["train"].image_shape
    colour = "grey" if shape[-1] == 1 else "colour"
    kind = f"vectors of {shape[0]}" if len(shape) == 1 else f"{shape[1]} x {shape[0]} {colour}"
    known = f"{source.num_classes} classes known, {purpose}" if source.num_classes else "no labels"
    if source.class_names and source.trained:
        seen, unseen = (some(source.class_names[part]) for part in (slice(source.trained), slice(source.trained, None)))
        known += f"; trained on {source.trained} of them ({seen}), and not on {unseen}"
    skipped = f"; {len(source.skipped)} unreadable files skipped" if source.skipped else ""
    return f"{source.name}: {splits} images, {kind}; {known}{skipped}"


def some(names: Sequence[str], count: int = 10) -> str:
    """The first few names."""
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
