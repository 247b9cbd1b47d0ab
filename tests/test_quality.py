"""The real thing: clusters of real digits that raw pixels do not give (k-means on pixels: ACC 0.793, NMI 0.742)."""

import json

import numpy as np
import pytest
from small import run

pytestmark = pytest.mark.usefixtures("optimized")

COLOURS = np.array([[220, 60, 60], [60, 200, 80], [70, 90, 220], [220, 200, 60]])


def digits(workdir, *arguments):
    arguments = ["--config=configs/deepcluster.py", f"--workdir={workdir}", *arguments]
    assert run(*arguments) == 0
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.wide
def test_deepcluster_beats_raw_pixels_on_digits_within_eight_rounds(tmp_path):
    """Two of three seeds do: so early one of seven was caught where two digits share a cluster (ACC 0.81)."""
    better = []
    for seed in range(3):
        results = digits(tmp_path / str(seed), "--config.rounds=8", f"--config.seed={seed}")
        better.append(results["train/acc"] >= 0.85 and results["train/nmi"] >= 0.80)
        assert results["clusters"] == 10
        if better.count(better[-1]) == 2:  # the majority, whatever a third would find
            break
    assert better.count(True) == 2


@pytest.mark.slow
def test_deepcluster_on_digits_over_five_seeds(tmp_path):
    runs = [digits(tmp_path / str(seed), f"--config.seed={seed}") for seed in range(5)]
    acc, nmi = (np.array([results[f"train/{name}"] for results in runs]) for name in ("acc", "nmi"))
    print("ACC", acc, "NMI", nmi, "seconds", [results["seconds"] for results in runs])
    assert acc.mean() >= 0.88 and nmi.mean() >= 0.85


def shapes(number, side=32):
    """Images with a disc, a square, a triangle or a cross, each in its colour, somewhere on a noisy ground; labels."""
    rng, pixels = np.random.default_rng(0), np.arange(side)
    labels = np.arange(number, dtype=np.int32) % 4
    centre, r = rng.uniform(10, side - 10, (2, number, 1, 1)), rng.uniform(5, 9, (number, 1, 1))
    below, x = pixels[:, None] - centre[0], np.abs(pixels - centre[1])
    y = np.abs(below)
    cross = (np.minimum(y, x) < r / 3) & (np.maximum(y, x) < r)
    each = np.stack([np.hypot(y, x) < r, np.maximum(y, x) < 0.8 * r, (y < r) & (2 * x < below + r), cross])
    inside = each[labels, np.arange(number)][..., None]
    light, ground = rng.uniform(0.6, 1, (number, 1, 1, 1)), rng.uniform(60, 160, (number, 1, 1, 1))
    images = np.where(inside, light * COLOURS[labels][:, None, None], ground)
    noisy = images + rng.normal(0, 15, (number, side, side, 3))
    return noisy.clip(0, 255).astype(np.uint8), labels


@pytest.mark.slow
def test_spice_finds_coloured_shapes_and_its_last_stage_loses_none(tmp_path):
    """Check S14 of its specification."""
    images, labels = shapes(2000)
    np.savez(tmp_path / "shapes.npz", images=images, labels=labels)
    moved = {"crop_area": 0.5, "brightness": 0.4, "contrast": 0.4, "flip": 0.5}  # the ground tells nothing
    views = [f"views.{name}.{field}={value}" for name in ("query", "key") for field, value in moved.items()]
    settings = ("data.image_size=32", "cluster.k=4", "stage.moco.rounds=25", "stage.semi.rounds=4", *views)
    arguments = [f"--config.{setting}" for setting in settings]
    source = f"--config.data.source=npz:{tmp_path / 'shapes.npz'}"
    assert run("--config=configs/spice.py", f"--workdir={tmp_path / 'run'}", source, *arguments) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    print({name: value for name, value in results.items() if name.endswith("train/acc")}, results["seconds"])
    assert results["self/train/acc"] > 0.9 and results["semi/train/acc"] >= results["self/train/acc"]
