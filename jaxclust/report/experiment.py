"""An experiment: the runs of a sweep as numbered nets, or a single run as one, and what scores/ says of their epochs.

scores/epoch<e>.csv is of the test images after epoch e, or of the training images where there are no others, in the
order of their ids; scores/epoch<e>_train.csv of the images that epoch e trained on, as training saw them (section 2.8
of our specification of ClustNet).
"""

import csv
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from jaxclust import config as config_lib
from jaxclust.data.groups import classes
from jaxclust.errors import ConfigError, DataError
from jaxclust.evaluation import groups
from jaxclust.features import score_file
from jaxclust.features.score_file import Scores
from jaxclust.files import read_json
from jaxclust.kinds import spans
from jaxclust.progress import progress
from jaxclust.report import figures
from jaxclust.report.sweep import Values, read_plan

T = TypeVar("T")


class Net(NamedTuple):
    """A run of an experiment."""

    number: int  # its place in the sweep, from 1
    values: Values  # of the settings that are swept
    workdir: Path
    config: ConfigDict  # as its last stage sees it

    @property
    def name(self) -> str:
        """What it is called in words."""
        return f"net {self.number}"

    @property
    def legend(self) -> str:
        """Its number and what distinguishes it from the others, its settings."""
        words = (f"{name.rpartition('.')[2]}={value}" for name, value in self.values.items())
        return figures.printable(f"{self.number}: {', '.join(words)}" if self.values else self.name, 48)


def is_sweep(workdir: Path) -> bool:
    """Whether the workdir is that of a sweep."""
    return (workdir / "sweep.json").exists()


def read(workdir: Path, config: ConfigDict) -> list[Net]:
    """The nets of a workdir by their numbers, as far as they have begun; a single run with this `config` is net 1.

    Nets whose config.json is damaged are left out, and named.
    """
    if not is_sweep(workdir):
        return [alone(workdir, config)]
    nets = []
    for number, (run, values) in enumerate(read_plan(workdir).runs.items(), 1):
        if (workdir / run / "config.json").exists():
            try:
                own = config_of(workdir / run, config)
            except DataError as error:
                print(f"left out: net {number}: {error}", flush=True)
                continue
            nets.append(Net(number, values, workdir / run, _last_stage(own)))
    return nets


def alone(workdir: Path, config: ConfigDict) -> Net:
    """A single run with this config."""
    return Net(1, {}, workdir, _last_stage(config))


def config_of(workdir: Path, config: ConfigDict) -> ConfigDict:
    """The settings of a run, but for those of its report, which are those of `config`."""
    own = config_lib.load(workdir / "config.json")
    own.report = config.report
    return own


def chosen(nets: Sequence[Net], config: ConfigDict) -> list[Net]:
    """The nets that `config.report` asks for; ConfigError if there is no net of such a number, or none is left."""
    numbers = kept = [net.number for net in nets]
    for field, keeps in (("nets", True), ("without_nets", False)):
        asked = spans(config.report[field])
        if unknown := [n for span in asked for n in (span[0], span[-1]) if n not in numbers]:
            raise ConfigError(f"config.report.{field}={config.report[field]!r}: there is no net {unknown[0]}; there "
                              f"is: {spanned(numbers)}")  # fmt: skip
        if asked:
            kept = [number for number in kept if any(number in span for span in asked) == keeps]
    if not kept:
        raise ConfigError(f"config.report.nets={config.report.nets!r} without those of config.report.without_nets="
                          f"{config.report.without_nets!r} leaves no net of {spanned(numbers)}")  # fmt: skip
    return [net for net in nets if net.number in kept]


def by_field(nets: Sequence[Net]) -> list[Net]:
    """In rising order of the first setting that is swept if it is a number, else of their own numbers."""
    firsts = [next(iter(net.values.values()), "") for net in nets]
    if any(isinstance(value, str | bool) for value in firsts):
        return sorted(nets, key=lambda net: net.number)
    order = sorted(range(len(nets)), key=lambda i: (firsts[i], nets[i].number))
    return [nets[i] for i in order]


def of_split(config: ConfigDict) -> str:
    """Whether files of test or of train are asked for; by default of test."""
    return "train" if config.report.split == "train" else "test"


def of_epochs(net: Net, what: Callable[[int, Scores], T], last: bool = False) -> tuple[dict[int, T], tuple[str, ...]]:
    """What `what` says of each epoch that `report.epochs` asks for (by default all, or the `last`) and its scores.

    Damaged and half-written files are skipped, and named, as are those of another run. DataError: there is none that
    can be read.
    """
    there = files(net.workdir, of_split(net.config))
    if not there:
        raise DataError(missing(net))
    asked = asked_epochs(there, net.config, last)
    rows = _rows(net, there.values())
    found: dict[int, T] = {}
    skipped: dict[str, str] = {}
    for epoch in progress(asked, len(asked), f"scores of {net.name}", "files"):
        path = there[epoch]
        try:
            scores = score_file.read(path, *rows)
            _check(scores, net.config)
            found[epoch] = what(epoch, scores)
        except DataError as error:
            skipped[str(path.relative_to(net.workdir.parent))] = str(error)
    if not found:
        names = {why: [name for name, of in skipped.items() if of == why] for why in skipped.values()}
        raise DataError(
            "no file of scores can be used; "
            + "; ".join(f"{of[0]}{f' and {len(of) - 1} more' * (len(of) > 1)}: {why}" for why, of in names.items())
        )
    return found, tuple(f"{name}: {why}" for name, why in skipped.items())


def missing(net: Net) -> str:
    """What is said of a net without scores."""
    name = "epoch1.csv" if of_split(net.config) == "test" else "epoch1_train.csv"
    return (
        f"{net.workdir / score_file.FOLDER} has no {name} and the like; a training of a mixture of experts with "
        "--config.scores.every='1 round' writes them"
    )


def _rows(net: Net, there: Iterable[Path]) -> tuple[int, str]:
    """How many images each file is of, and in words who says so: the run, or most of the files that are `there`.

    Of the images of an epoch of training only the files know.
    """
    if of_split(net.config) == "test" and (size := scored(net.workdir)):
        return size, f"where images.csv and data.json of the run have {size:,} images"
    lengths = Counter(_lines(path) - 1 for path in there)
    usual = max(lengths, key=lambda rows: (lengths[rows], rows))  # each epoch sees as many images
    return usual, f"where the other epochs have {usual:,}"


def scored(workdir: Path) -> int:
    """How many test images a run has, or where it has none, images to train on; 0 where its files do not say."""
    try:
        with (workdir / "images.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            test = sum(row[:1] == ["test"] for row in csv.reader(file))
        return test or int(read_json(workdir / "data.json")["size"])
    except (OSError, csv.Error, DataError, KeyError, TypeError, ValueError):
        return 0


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _check(scores: Scores, config: ConfigDict) -> None:
    """DataError where scores are of another number of experts, or of other groups, than those of the run."""
    k, of_run = scores.gate.shape[1], config.cluster.k
    if k != of_run:
        raise DataError(f"is of {k} experts, the run has {of_run}")
    expected = np.select([np.isin(scores.label, of) for of in classes(config.groups)], [1, 0], -1)
    wrong = (scores.label >= 0) & (scores.group != expected)
    if wrong.any():
        line = int(wrong.argmax())
        raise DataError(
            f"contradicts the run: line {line + 2} has class {scores.label[line]} in group {scores.group[line]}, which "
            f"config.groups={config.groups!r} puts in group {expected[line]} (1: the first, 0: the second, -1: none)"
        )


def files(workdir: Path, split: str) -> dict[int, Path]:
    """The files of scores/ by their epoch, rising."""
    suffix = "_train" if split == "train" else ""
    found = {}
    for path in (workdir / score_file.FOLDER).glob("epoch*.csv"):
        if met := re.fullmatch(rf"epoch(\d+){suffix}\.csv", path.name):
            found[int(met[1])] = path
    return dict(sorted(found.items()))


def asked_epochs(there: Iterable[int], config: ConfigDict, last: bool = False) -> list[int]:
    """Those of the epochs `there` that `config.report.epochs` asks for; by default all, or the `last`.

    DataError: it asks for others only.
    """
    there, asked = sorted(there), spans(config.report.epochs)
    found = [epoch for epoch in there if any(epoch in span for span in asked)] if asked else there[-1 if last else 0 :]
    if not found:
        raise DataError(f"config.report.epochs={config.report.epochs!r}: there is: {spanned(there)}")
    return found


def spanned(numbers: Sequence[int]) -> str:
    """Rising numbers as "1-4,7"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)) or "none"


def measured(config: ConfigDict, scores: Scores) -> dict[str, float]:
    """What the evaluation "groups" says of a file: binary, acc_p, acc_n, nll and so on (section 2.7).

    DataError where no label is known.
    """
    labelled(scores)
    logs = np.log(np.maximum(scores.gate, math.ulp(0.0)))
    predictions = {
        "cluster": scores.expert, "groups": scores.log_probs, "log_probs": logs, "binary": scores.binary
    }  # fmt: skip
    return groups.measure(predictions, scores.label, config, _no_rows)


def labelled(scores: Scores) -> Scores:
    """The scores themselves; DataError where no label is known."""
    if not (scores.label >= 0).any():
        raise DataError("the images have no labels")
    return scores


def _no_rows() -> groups.Chunked:
    raise AssertionError("scores have no features")


def total_variation(values: Sequence[float]) -> float:
    """The sum of |a_{t+1} - a_t| over epochs that follow each other in a series (section 2.9)."""
    return float(np.abs(np.diff(np.asarray(values, np.float64))).sum())


def _last_stage(config: ConfigDict) -> ConfigDict:
    return config_lib.for_stage(config, config_lib.stage_names(config)[-1])
