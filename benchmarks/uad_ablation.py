"""UAD's four modes beside each other, random weights and labels: what each of its two parts is worth.

Every run is the program itself: --job=train, then --job=evaluate with clustering, nearest neighbours and a linear probe
of every layer on the test images. All modes have the small convnet, the presets of configs/uad.py, the same rounds and
seeds; `random` is its network before the first step, `supervised` the same network on the class labels. A run that is
done in --out is not repeated, so the benchmark goes on where it was stopped.

mnist:DIR has the four files of MNIST: the first 10,000 training images, and all 10,000 of the test. cifar10:DIR has
folders train/ and test/ of class folders of JPEG files: the first 5,000 and 2,000, equally many of each class.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import results
from benchmarks.round import linked
from jaxclust import config as config_lib
from jaxclust.data.source import open_source
from jaxclust.files import replacing

PROGRAM = (sys.executable, "-m", "jaxclust.main")
ROOT = Path(__file__).parents[1]
MODES = ("baseline", "fusion", "uncertainty", "full")
NAMES = (*MODES, "random", "supervised")
TIMED = ("baseline", "full")
TIMED_ROUNDS = 4  # of which the two in the middle are steady
SUITE = "clustering,knn,linear"

Figures = dict[str, float]
"""What is read of one run; shares in percent, `seconds` of a steady round."""

Runs = Mapping[str, Mapping[int, Figures]]
"""Figures of each run by seed."""


class Data(NamedTuple):
    """A data set: its name, how it is made ready, and the presets that it is learnt with."""

    name: str
    source: Callable[[Path, Path, bool], str]  # (place, out, quick) -> config.data.source
    variant: str  # of configs/uad.py
    flags: tuple[str, ...]
    supervised: str  # variant of configs/supervised.py
    rounds: int


def main() -> None:
    """Runs what is missing, then writes the section."""
    options = arguments()
    kind, _, place = options.data.partition(":")
    data = DATA[kind]
    size = ("--config.model.width=4", "--config.model.dim=16") if options.quick else ()
    rounds, epochs = (2, 1) if options.quick else (options.rounds or data.rounds, options.epochs)
    common = (f"--config.data.source={data.source(Path(place), options.out, options.quick)}", *data.flags, *size)
    folder = options.out / f"{kind}-{rounds}"
    runs: dict[str, dict[int, Figures]] = {name: {} for name in options.runs}
    for seed in options.seeds:
        for name in runs:
            workdir = folder / f"{name}-{seed}"
            train(workdir, flags(data, name, rounds, (*common, f"--config.seed={seed}")))
            judge(workdir, epochs)
            runs[name][seed] = read(workdir)
    times = {name: [] for name in TIMED}
    for turn in range(options.turns):
        for name in TIMED:
            workdir = folder / f"timed-{name}-{turn}"
            train(workdir, flags(data, name, min(rounds, TIMED_ROUNDS), common))
            times[name].append(read(workdir)["seconds"])
    command = f"python -m benchmarks.uad_ablation --data={kind}:DIR --out=DIR"
    results.publish(options, f"UAD on {data.name}", command, describe(runs, times, rounds, epochs))


def arguments() -> argparse.Namespace:
    """The options."""
    parser = results.arguments(__doc__)
    parser.add_argument("--data", required=True, help=" or ".join(f"{name}:DIR" for name in DATA))
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--seeds", default=(0, 1, 2), type=numbers, help="such as 0,1,2")
    parser.add_argument("--runs", default=NAMES, type=names, help=f"which of {', '.join(NAMES)}")
    parser.add_argument("--rounds", default=0, type=int, help="of every run; 0: the data set's own")
    parser.add_argument("--epochs", default=15, type=int, help="of the linear probes")
    parser.add_argument("--turns", default=3, type=int, help="short runs of baseline and full whose rounds are timed")
    options = results.parse(parser)
    if options.data.partition(":")[0] not in DATA:
        parser.error(f"--data={options.data} must be {' or '.join(f'{name}:DIR' for name in DATA)}")
    options.out = options.out.resolve()
    options.seeds, options.turns = ((0,), 1) if options.quick else (options.seeds, options.turns)
    return options


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers separated by commas."""
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Names of runs separated by commas."""
    chosen = tuple(text.split(","))
    if set(chosen) - set(NAMES):
        raise argparse.ArgumentTypeError(f"{text!r}: there is {', '.join(NAMES)}")
    return chosen


def mnist(place: Path, out: Path, quick: bool) -> str:
    """The first 10,000 training images and all of the test in one archive."""
    path = out / ("mnist-quick.npz" if quick else "mnist.npz")
    if not path.exists():
        config = config_lib.base()
        config.data.source = f"idx:{place}"
        splits = open_source(config).splits
        sizes = (200, 100) if quick else (10_000, 10_000)
        arrays: dict[str, Any] = {}
        for (name, prefix), size in zip((("train", ""), ("test", "test_")), sizes, strict=True):
            arrays |= {f"{prefix}images": splits[name].images[:size], f"{prefix}labels": splits[name].labels[:size]}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)
    return f"npz:{path}"


def cifar10(place: Path, out: Path, quick: bool) -> str:
    """Links to 5,000 training and 2,000 test images, in class folders."""
    folder = out / ("cifar10-quick" if quick else "cifar10")
    if not folder.exists():
        begun = folder.with_suffix(".begun")
        shutil.rmtree(begun, ignore_errors=True)
        for split, count in (("train", 200 if quick else 5_000), ("test", 100 if quick else 2_000)):
            linked(place / split, begun / split, count)
        begun.rename(folder)
    return f"folder:{folder}"


DATA = {
    "mnist": Data("MNIST", mnist, "mnist", (), "", 6),
    "cifar10": Data(
        "CIFAR-10", cifar10, "folder", ("--config.data.image_size=32", "--config.cluster.k=10"), "folder", 6
    ),
}


def flags(data: Data, name: str, rounds: int, common: Iterable[str]) -> tuple[str, ...]:
    """The command line of a run: a mode, random weights or labels."""
    common = (*common, f"--config.rounds={0 if name == 'random' else rounds}", "--config.runtime.devices=1")
    if name == "supervised":
        return (f"--config={ROOT}/configs/supervised.py:{data.supervised}", "--config.batch_size=128", *common)
    mode = "baseline" if name == "random" else name
    return (f"--config={ROOT}/configs/uad.py:{data.variant}", f"--config.uad.mode={mode}", *common)


def train(workdir: Path, arguments: Sequence[str]) -> None:
    """--job=train, unless it is done."""
    if not (workdir / "results.json").exists():
        program(workdir, "train", arguments)


def judge(workdir: Path, epochs: int) -> None:
    """--job=evaluate, unless it is done with so many epochs."""
    done = workdir / "probes" / "probes.json"
    judged = "linear/feature/top1" in json.loads((workdir / "results.json").read_text())
    if not (judged and json.loads(done.read_text())["linear"]["epochs"] == epochs):
        suite = f"--config.evaluate.suite={SUITE}", f"--config.evaluate.linear.epochs={epochs}"
        program(workdir, "evaluate", suite)


def program(workdir: Path, job: str, arguments: Sequence[str]) -> None:
    """Runs a job of jaxclust; its output goes to <workdir>.log."""
    command = (*PROGRAM, f"--job={job}", f"--workdir={workdir}", *arguments)
    log = workdir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as output:
        ended = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    if ended.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {ended.returncode}; its output is in {log}")
    print(f"{workdir.name}: {job} is done", flush=True)


def read(workdir: Path) -> Figures:
    """The figures of a run that is done."""
    found = json.loads((workdir / "results.json").read_text())
    shares = {key: 100 * value for key, value in found.items() if key.endswith(("/acc", "/nmi", "/top1", "/top1_best"))}
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return shares | of_rounds([json.loads(line) for line in lines])


def of_rounds(records: Sequence[Mapping[str, float]]) -> Figures:
    """Seconds of a steady round; of the last clustering the area under the ROC curve of certainty, and the share of the
    low maps in the directions that it saw; the least such area after the first round.

    The first round compiles and the last clustering also predicts, so neither is a steady one.
    """
    figures: Figures = {}
    steady = [after["time"] - before["time"] for before, after in zip(records[1:-2], records[2:-1], strict=True)]
    if steady:
        figures["seconds"] = statistics.median(steady)
    certain = [100 * record["train/certainty_auc"] for record in records if "train/certainty_auc" in record]
    if certain:
        figures |= {"auc": certain[-1], "auc_least": min(certain[1:] or certain)}
    if "features/low_share" in records[-1]:
        figures["low"] = 100 * records[-1]["features/low_share"]
    return figures


def describe(runs: Runs, times: Mapping[str, Sequence[float]], rounds: int, epochs: int) -> str:
    """The tables."""
    seeds = sorted({seed for of_name in runs.values() for seed in of_name})
    layers = [key.split("/")[1] for key in first(runs) if key.startswith("linear/") and key.endswith("/top1")]
    last = {f"linear/{layer}/top1": layer for layer in layers}
    best = {f"linear/{layer}/top1_best": layer for layer in layers}
    plain = {"train/acc": "ACC", "train/nmi": "NMI", "knn/top1": "kNN"}
    certain = {"auc": "AUC of certainty", "auc_least": "its least from round 1 on"}
    others = {"low": "share of the low maps", "seconds": "seconds a round"}
    modes = {name: of_name for name, of_name in runs.items() if name in MODES}
    parts = [
        f"{rounds} rounds, seeds {', '.join(map(str, seeds))}; percent, mean ± standard error over the seeds. Clusters "
        "are judged on the training images, kNN and linear probes on the test images.",
        columns(runs, plain | certain | others),
        f"Linear probe of each layer, top-1 after the last of {epochs} epochs:",
        columns(runs, last),
        "The same at the best epoch, which the test images choose:",
        columns(runs, best),
    ]
    if "baseline" in runs and len(modes) > 1:
        parts += ["Less the baseline of the same seed, with each seed's in brackets:", differences(modes, plain | last)]
    if times["full"]:
        ratio = results.ratio(times["full"], times["baseline"])
        turns = f"{len(times['full'])} turns, median of the steady rounds of each"
        parts.append(f"Time of a round, full / baseline: **{ratio}** ({turns}).")
    return "\n\n".join(parts)


def first(runs: Runs) -> Figures:
    """The figures of one run, for their names."""
    return next(iter(next(iter(runs.values())).values()))


def columns(runs: Runs, keys: Mapping[str, str]) -> str:
    """A row for each run, a column for each figure."""
    rows = [[name, *(mean([f[key] for f in by.values() if key in f]) for key in keys)] for name, by in runs.items()]
    return results.table(["", *keys.values()], rows)


def differences(runs: Runs, keys: Mapping[str, str]) -> str:
    """What each mode has more than the baseline of the same seed; a row for each figure."""
    others = [name for name in runs if name != "baseline"]
    rows = []
    for key, title in keys.items():
        paired = {
            name: [figures[key] - runs["baseline"][seed][key] for seed, figures in runs[name].items()]
            for name in others
        }
        cells = [f"{mean(of, '+.2f')} ({', '.join(f'{x:+.2f}' for x in of)})" for of in paired.values()]
        rows.append([title, *cells])
    return results.table(["", *others], rows)


def mean(values: Sequence[float], form: str = ".1f") -> str:
    """Mean and standard error; a dash where there is nothing."""
    if not values:
        return "-"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:{form.strip('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{error}"


if __name__ == "__main__":
    main()
