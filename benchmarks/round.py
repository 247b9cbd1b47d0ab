"""A round of DeepCluster on JPEG folders against PyTorch, Pillow and faiss.

10,000 images of CIFAR-10 (the first 1,000 of each class), the small convnet at 32 px, settings as in the preset
`folder`. Both sides do the same: features of every image, PCA-whitening and k-means, a new top layer, one pass over
images drawn uniformly over clusters with random crops, flips and colours, NMI, a checkpoint. Ours is the program of
--job=train, timed from outside; the peer (`torch_round.py`) decodes with Pillow in the two workers of a DataLoader.

The first round has what happens once: imports, scanning and decoding, compilation (without a cache on disk). A steady
round is any later one. Every turn is a new process; files are in the page cache for both.
"""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from benchmarks import results, sides
from jaxclust import config as config_lib

Rounds = list[dict[str, float]]
"""Seconds of each part of each round."""

Marks = list[tuple[float, str]]
"""When each part began."""

ONCE = ("imports", "set-up")
WORK = ("decoding", "features", "clustering", "training", "other")
PARTS = (*ONCE, *WORK)


def main() -> None:
    """Measures and writes the section."""
    parser = results.arguments(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="folder with a folder of JPEG files for each class")
    parser.add_argument("--images", type=int, default=10_000, help="how many of them, equally many of each class")
    parser.add_argument("--turns", type=int, default=3, help="runs of each side")
    options = results.parse(parser)
    count, turns = (60, 1) if options.quick else (options.images, options.turns)
    config = recipe(options.quick)
    makers = {**({"PyTorch": peer} if results.has_torch() else {}), "ours": ours}
    runs: dict[str, list[sides.Answer]] = {name: [] for name in makers}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        count = linked(options.data, folder, count)
        for turn in range(turns):
            for name, make in makers.items():
                with sides.side(make, folder, Path(temporary) / f"{name}-{turn}", config) as ask:
                    runs[name].append(ask())
                print(f"turn {turn + 1}, {name}: {runs[name][-1].value}", flush=True)
    results.publish(options, "A round", "python -m benchmarks.round --data=FOLDER", describe(count, runs))


def recipe(quick: bool) -> ConfigDict:
    """The settings of both sides: the preset `folder` at 32 px with ten clusters, one first and two steady rounds."""
    config = config_lib.base()
    config.rounds = 2 if quick else 3
    config.batch_size = 32 if quick else 128
    config.data.image_size, config.data.channels = 32, 3
    config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    config.cluster.k, config.cluster.pca_dim, config.cluster.runs = 10, 32, 20
    config.optimizer.body.schedule, config.optimizer.top.lr = "cosine", 1e-2
    view = config.views.train
    view.crop_area, view.flip = 0.35, 0.5
    view.brightness = view.contrast = view.saturation = 0.3
    return config_lib.validate(config)


def linked(data: Path, folder: Path, count: int) -> int:
    """Links to the first images of each class of `data` (or of its folder `train`) in `folder`; how many there are.

    Each is read once, so that it lies in the page cache.
    """
    root = data / "train" if (data / "train").is_dir() else data
    classes = sorted(path for path in root.glob("*/"))
    images = [path for of in classes for path in sorted(of.glob("*.jp*g"))[: count // len(classes)]]
    if len(images) < count // 2:
        raise SystemExit(f"--data={data}: {len(images)} JPEG files in {len(classes)} class folders; {count} are needed")
    for path in images:
        path.read_bytes()
        link = folder / path.parent.name / path.with_suffix(".jpg").name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    return len(images)


def ours(folder: Path, workdir: Path, config: ConfigDict) -> Callable[[], Rounds]:
    """The program of --job=train, without the results and the report that follow it."""

    def run() -> Rounds:
        os.environ["XDG_CACHE_HOME"] = str(workdir / "cache")  # no compiled program of an earlier run
        marks: Marks = []
        mark(marks, "imports")
        from jaxclust import runtime
        from jaxclust.data.source import open_source
        from jaxclust.methods.base import DataInfo
        from jaxclust.train.loop import run_stage
        from jaxclust.train.stage import prepare

        runtime.start(config)
        runtime.tensorflow()
        mark(marks, "decoding")
        config.data.source = f"folder:{folder}"
        split = open_source(config).splits["train"]
        mark(marks, "set-up")
        stage = prepare(config, "deepcluster", split, DataInfo(split.size, split.image_shape), workdir / "run")
        run_stage(watched(stage, marks), runtime.StopSignal())
        return rounds_of(marks)

    return run


def watched(stage: Any, marks: Marks) -> Any:
    """A stage that marks when a pass over the features, a clustering and a training begin."""

    def clustering(*arguments: Any) -> Any:
        mark(marks, "clustering")
        refreshed = stage.method.refresh(*arguments)
        mark(marks, "other")
        return refreshed

    embed, step = marking(stage.embed, "features", marks), marking(stage.step, "training", marks)
    return stage._replace(embed=embed, step=step, method=stage.method._replace(refresh=clustering))


def marking(program: Callable[..., Any], part: str, marks: Marks) -> Callable[..., Any]:
    """A compiled program that marks when its part begins; its first call, which compiles it, is set-up."""
    compiled = False

    def call(*arguments: Any) -> Any:
        nonlocal compiled
        if not compiled:
            mark(marks, "set-up")
            result, compiled = program(*arguments), True
            mark(marks, part)
            return result
        if marks[-1][1] != part:
            mark(marks, part)
        return program(*arguments)

    return call


def mark(marks: Marks, part: str) -> None:
    """Notes that `part` begins now."""
    marks.append((time.perf_counter(), part))


def rounds_of(marks: Marks) -> Rounds:
    """Seconds by part of each round: one begins where features follow training; the last has no training."""
    rounds: Rounds = [defaultdict(float)]
    for (start, part), (end, following) in pairwise(marks):
        rounds[-1][part] += end - start
        if (part, following) == ("training", "features"):
            rounds.append(defaultdict(float))
    return rounds[:-1]


def peer(folder: Path, workdir: Path, config: ConfigDict) -> Callable[[], Rounds]:
    """PyTorch, Pillow and faiss."""

    def run() -> Rounds:
        start = time.perf_counter()
        from benchmarks.torch_round import Run

        imported = time.perf_counter()
        workdir.mkdir()
        state = Run(folder, workdir, config)
        once = {"imports": imported - start, "set-up": time.perf_counter() - imported}
        first, *steady = [state.round() for _ in range(config.rounds)]
        return [once | first, *steady]

    return run


def describe(count: int, runs: Mapping[str, Sequence[sides.Answer]]) -> str:
    """Seconds of each part of the first and of a steady round, and the ratios."""
    first = {name: [mean(answer.value[:1]) for answer in of_side] for name, of_side in runs.items()}
    steady = {name: [mean(answer.value[1:]) for answer in of_side] for name, of_side in runs.items()}
    columns = {f"{name}, first round": column(of_side) for name, of_side in first.items()}
    columns |= {f"{name}, steady round": column(of_side) for name, of_side in steady.items()}
    rows = zip((*PARTS, "total"), *columns.values(), strict=True)
    peaks = ", ".join(f"{name} {results.gigabytes(max(a.peak for a in of_side))}" for name, of_side in runs.items())
    lines = [f"{count:,} images; seconds, median of {len(runs['ours'])} runs, and share of the total."]
    lines += ["", results.table(("", *columns), rows), "", f"Peak memory of the main process: {peaks}."]
    if "PyTorch" in runs:
        ratios = {
            "a steady round": faster(steady, PARTS),
            "the first round without imports and set-up": faster(first, WORK),
            "the first round with everything": faster(first, PARTS),
        }
        lines += [
            "",
            "PyTorch's time / ours: " + ", ".join(f"{what} **{times}**" for what, times in ratios.items()) + ".",
        ]
    return "\n".join(lines)


def faster(rounds: Mapping[str, Sequence[Mapping[str, float]]], parts: Sequence[str]) -> results.Spread:
    """How many times as fast we are in some parts together."""
    totals = {name: [sum(of_run[part] for part in parts) for of_run in of_side] for name, of_side in rounds.items()}
    return results.ratio(totals["PyTorch"], totals["ours"])


def mean(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean seconds of each part."""
    return {part: sum(parts.get(part, 0.0) for parts in rounds) / len(rounds) for part in PARTS}


def column(rounds: Sequence[Mapping[str, float]]) -> list[str]:
    """The cells of one side: median seconds and share of each part, and the total."""
    total = results.spread(sum(parts.values()) for parts in rounds)
    medians = [results.spread(parts[part] for parts in rounds).median for part in PARTS]
    cells = [f"{seconds:.2f} ({seconds / total.median:.0%})" if seconds else "-" for seconds in medians]
    return [*cells, str(total)]


if __name__ == "__main__":
    main()
