"""The real thing: clusters of real digits that raw pixels do not give (k-means on pixels: ACC 0.793, NMI 0.742)."""

import json

import numpy as np
import pytest
from small import run

pytestmark = pytest.mark.usefixtures("optimized")


def digits(workdir, *arguments):
    arguments = ["--config=configs/deepcluster.py", f"--workdir={workdir}", *arguments]
    assert run(*arguments) == 0
    return json.loads((workdir / "results.json").read_text())


@pytest.mark.medium
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
