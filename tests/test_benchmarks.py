"""The benchmarks run, and the networks of their PyTorch side compute what ours do."""

import argparse
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks import results, uad_ablation
from benchmarks.round import linked
from jaxclust import config as config_lib
from jaxclust import models

ROOT = Path(__file__).parents[1]
SIDES = {"convnet": 28, "alexnet": 224, "vgg16": 224, "resnet18": 32}


def benchmark(name, folder, *arguments):
    """The section that a quick run of a benchmark writes; it imports nothing of the tests."""
    path = folder / "RESULTS.md"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", f"--results={path}", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return path.read_text()


@pytest.mark.wide
def test_k_means_are_compared_and_agree(tmp_path):
    text = benchmark("kmeans", tmp_path)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith(("| faiss", "| sklearn", "| kmeans_"))]
    assert [float(row[4]) for row in rows] == pytest.approx([1.0] * 4, abs=1e-4)
    assert Image.open(tmp_path / "kmeans.png").size[0] > 500


@pytest.mark.wide
def test_clustering_at_scale_agrees_with_faiss(tmp_path):
    text = benchmark("clustering_scale", tmp_path)
    assert "Objective, ours / faiss: 1.0000" in text and "Peak memory 0." in text


@pytest.mark.wide
def test_m_steps_are_compared_and_agree(tmp_path):
    text = benchmark("spice_mstep", tmp_path)
    assert "20 minibatches of 20" in text and "| loop | " in text and "| scan over vmapped heads | " in text
    assert float(text.partition("difference of the losses ")[2].split()[0].rstrip(".")) < 1e-4


@pytest.mark.slow
def test_a_gradient_in_two_passes_needs_less_memory(tmp_path):
    text = benchmark("dscl_memory", tmp_path)
    assert float(text.partition("temporaries **")[2].partition("**")[0]) > 3
    losses = [
        line.split("|")[-2].strip() for line in text.splitlines() if line.startswith(("| one shot", "| two pass"))
    ]
    assert len(losses) == 2 and float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-3)


@pytest.mark.slow
def test_train_steps_are_compared(tmp_path):
    text = benchmark("train_step", tmp_path)
    assert text.count("| train |") == text.count("| features |") == 1


@pytest.mark.slow
def test_a_round_is_compared(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(60):
        folder = tmp_path / "photos" / f"class{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.jpg")
    text = benchmark("round", tmp_path, f"--data={tmp_path / 'photos'}")
    assert "60 images" in text and "| total |" in text and str(tmp_path) not in text


def test_a_round_without_images_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match="0 JPEG files in 0 class folders; 60 are needed"):
        linked(tmp_path, tmp_path / "links", 60)


def test_a_section_is_replaced_and_the_others_stay(tmp_path):
    options = argparse.Namespace(results=tmp_path / "RESULTS.md", busy=0.5)
    for title, words in (("B", "one"), ("A", "two"), ("B", "three")):
        results.publish(options, title, "command", words)
    text = options.results.read_text()
    assert text.startswith("# Results") and text.index("two") < text.index("three") and "\none" not in text
    assert text.count("Others used 50% of the processor") == 2


def test_a_ratio_pairs_the_turns():
    assert results.ratio([4.0, 9.0, 2.0], [2.0, 3.0, 4.0]) == (2.0, 0.5, 3.0)


JOB = """
import json, pathlib, sys
flags = dict(a.split("=", 1) for a in sys.argv[1:])
run = pathlib.Path(flags["--workdir"])
(run / "probes").mkdir(parents=True, exist_ok=True)
seed, mode = int(run.name[-1]), flags.get("--config.uad.mode")
found = {"train/acc": 0.5 + 0.1 * seed * (mode == "full"), "train/nmi": 0.25, "train/loss": 9.0}
if flags["--job"] == "evaluate":
    found = json.loads((run / "results.json").read_text())
    found |= {"knn/top1": 0.75, "linear/conv1/top1": 0.5, "linear/conv1/top1_best": 0.625}
    found |= {"linear/feature/top1": 0.5, "linear/feature/top1_best": 0.5}
    (run / "probes/probes.json").write_text('{"linear": {"epochs": %s}}' % flags["--config.evaluate.linear.epochs"])
else:
    times = [0, 50, 52 + (mode == "full"), 90]
    certain = {"train/certainty_auc": 0.8, "features/low_share": 0.25} if mode == "full" else {}
    (run / "metrics.jsonl").write_text("".join(json.dumps({"time": t} | certain) + "\\n" for t in times))
(run / "results.json").write_text(json.dumps(found))
"""


def test_modes_are_compared_seed_by_seed_and_no_run_is_repeated(tmp_path, monkeypatch):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    data = uad_ablation.Data("toys", lambda place, out, quick: "npz:toys", "", (), "", 3)
    monkeypatch.setattr(uad_ablation, "DATA", {"toys": data})
    monkeypatch.setattr(uad_ablation, "PROGRAM", (sys.executable, "-S", str(script)))
    monkeypatch.setattr(results, "busy", lambda: 0.0)
    path = tmp_path / "RESULTS.md"
    places = ["--data=toys:DIR", f"--out={tmp_path / 'runs'}", f"--results={path}"]
    monkeypatch.setattr(sys, "argv", ["", "--seeds=1,3", "--runs=baseline,full,random", "--turns=1", *places])
    uad_ablation.main()
    text = path.read_text()
    assert "| baseline | 50.0 ± 0.0 | 25.0 ± 0.0 | 75.0 ± 0.0 | - | - | - | 2.0 ± 0.0 |" in text
    assert "| full | 70.0 ± 10.0 | 25.0 ± 0.0 | 75.0 ± 0.0 | 80.0 ± 0.0 | 80.0 ± 0.0 | 25.0 ± 0.0 | 3.0 ± 0.0 |" in text
    assert "| random | 50.0 ± 0.0 | 50.0 ± 0.0 |" in text and "| random | 62.5 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| ACC | +20.00 ± 10.00 (+10.00, +30.00) |" in text
    assert "full / baseline: **1.5 (1.5–1.5)**" in text and str(tmp_path) not in text

    script.write_text("raise SystemExit(3)")
    uad_ablation.main()
    assert path.read_text() == text
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--epochs=7"])
    with pytest.raises(SystemExit, match="--job=evaluate .*epochs=7\nended with 3; its output is in .*baseline-1.log"):
        uad_ablation.main()


@pytest.mark.medium
@pytest.mark.parametrize("network", SIDES)
def test_the_pytorch_side_computes_what_our_network_computes(network):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_networks

    # Every kernel is flat, so that the order in which either side keeps its weights does not matter.
    config = config_lib.base()
    config.model.name, config.model.width, config.model.stem = network, 3, "small"
    sizes = {} if network == "resnet18" else {"dim": 8}
    config.model.dim = sizes.get("dim", 0)
    body = models.get(config)
    images = np.random.default_rng(0).normal(size=(2, SIDES[network], SIDES[network], 3)).astype(np.float32)
    variables = body.init(jax.random.key(0), images)
    params = jax.tree_util.tree_map_with_path(lambda path, x: flat(path[-1].key, x.shape, x.ndim), variables["params"])
    ours = body.apply({**variables, "params": params}, images)

    theirs = getattr(torch_networks, network)(3, 5, width=3, side=SIDES[network], **sizes).eval()
    assert sum(p.numel() for p in theirs.body.parameters()) == sum(x.size for x in jax.tree.leaves(params))
    for module in theirs.modules():
        for name, p in module.named_parameters(recurse=False):
            norm = isinstance(module, torch.nn.BatchNorm2d) and name == "weight"
            kind = "scale" if norm else {"weight": "kernel"}.get(name, name)
            p.data = torch.tensor(flat(kind, p.shape, p.ndim, out_first=True))
    features = theirs.body(torch.tensor(images).permute(0, 3, 1, 2)).detach().numpy()
    assert np.ptp(features, axis=0).min() > 1e-4  # the two images do not look alike
    np.testing.assert_allclose(ours, features, rtol=1e-4)


def flat(name, shape, ndim, out_first=False):
    """A parameter of one value: kernels average their input."""
    if name == "kernel":
        return np.full(shape, 1 / np.prod(shape[1:] if out_first else shape[:-1]), np.float32)
    return np.full(shape, {"scale": 1.5, "bias": 0.1}[name], np.float32)
