"""Whole jobs on two hosts give what one process gives: images evaluated in every way, and a frozen body's features."""

import csv
import json
import shlex
import shutil

import numpy as np
import pytest
from host_runs import all_well, jaxclust, snippet
from PIL import Image
from safetensors import numpy as safetensors
from small import few_digits, run

pytestmark = pytest.mark.slow

SIZES = {"train": 101, "test": 51}  # which divide by neither hosts nor devices
JOBS = """
import shlex
from jaxclust.main import main
for command in sys.argv[1:]:
    if code := main(["jaxclust", *shlex.split(command)]):
        sys.exit(code)
"""
SETTINGS = (
    "--config=configs/deepcluster.py:smoke", "--config.data.image_size=8", "--config.data.channels=1",
    "--config.data.cache_bytes=0", "--config.batch_size=24", "--config.eval_batch_size=24", "--config.cluster.k=4",
    "--config.cluster.pca_dim=6", "--config.cluster.backend=faiss", "--config.refresh_every=1 epoch",
    "--config.optimizer.body.schedule=none", "--config.runtime.dtype=float64", "--config.runtime.devices=0",
)  # fmt: skip
EVALUATE = (
    "--job=evaluate", "--config.evaluate.suite=clustering,silhouette,linear,knn,kmeans,retrieval,readouts,lowlabel",
    "--config.evaluate.readouts=raw,l2,spectral,njw", "--config.evaluate.njw_neighbours=5",
    "--config.evaluate.nmi_runs=2", "--config.evaluate.spectral_center=True", "--config.evaluate.save_retrieval=True",
    "--config.evaluate.linear.epochs=3", "--config.evaluate.linear.lr=0.1", "--config.evaluate.linear.batch_size=24",
)  # fmt: skip


def photos(folder):
    """Digits of four classes as files, `train/` and `test/`."""
    whole = few_digits(600).splits["train"]
    ids = iter(np.flatnonzero(whole.labels < 4))
    for split, size in SIZES.items():
        for id in (next(ids) for _ in range(size)):
            path = folder / split / str(whole.labels[id]) / f"{id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(15 * whole.images[id, ..., 0]).save(path)
    return f"--config.data.source=folder:{folder}"


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """(of one process, of two hosts): `run`, trained by one process and evaluated, and `frozen`, which clusters its
    features, by the two hosts in two halves."""
    top = tmp_path_factory.mktemp("jobs")
    one, two, source = top / "one", top / "two", photos(top / "photos")
    trained = (*SETTINGS, source)
    frozen = (*trained, f"--config.init_from={one / 'run'}", "--config.freeze_body=True")

    def job(workdir, *arguments):
        return shlex.join([*arguments, f"--workdir={workdir}"])

    first = job(one / "run", *trained, "--config.rounds=1")
    with snippet(JOBS, first, job(one / "run", *EVALUATE), job(one / "frozen", *frozen), count=1) as processes:
        all_well(processes)
    evaluated = shutil.ignore_patterns("probes", "results.json", "assignments.csv", "confusion-*")
    shutil.copytree(one / "run", two / "run", ignore=evaluated)
    halves = job(two / "frozen", *frozen, "--config.rounds=1"), job(two / "frozen", *frozen)
    with snippet(JOBS, job(two / "run", *EVALUATE), *halves, devices=1) as processes:
        all_well(processes)
    return one, two


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def same_results(one, two):
    here, there = results(one), results(two)
    assert here.keys() == there.keys()
    different = {name for name in here if there[name] != pytest.approx(here[name], abs=1e-6)}
    assert different <= {"seconds"}, [(name, here[name], there[name]) for name in different]
    for found in (here, there):
        assert found["images"] == sum(SIZES.values())


def clusters(workdir):
    with (workdir / "assignments.csv").open() as table:
        return [(row["id"], row["path"], row["cluster"]) for row in csv.DictReader(table)]


def test_two_hosts_evaluate_images_as_one_process_does(workdirs):
    one, two = (workdir / "run" for workdir in workdirs)
    kinds = {name.split("/")[0] for name in results(two)}
    assert {"train", "test", "linear", "knn", "kmeans", "retrieval", "lowlabel"} <= kinds
    assert "train/silhouette" in results(two)
    assert {f"test/{name}/nmi" for name in ("raw", "l2", "spectral", "njw")} <= results(two).keys()
    same_results(one, two)
    saved, others = (np.load(workdir / "retrieval.npz") for workdir in (one, two))
    np.testing.assert_allclose(saved["vectors"], others["vectors"], rtol=1e-6, atol=1e-9)
    for name in ("labels", "neighbours"):
        np.testing.assert_array_equal(saved[name], others[name])
    assert clusters(one) == clusters(two) and len(clusters(two)) == SIZES["train"]
    layers = sorted(path.name for path in (one / "probes").glob("*.safetensors"))
    assert len(layers) == 8  # conv1 to conv3 and the feature, the last and the best of each
    for name in layers:
        arrays, others = (safetensors.load_file(workdir / "probes" / name) for workdir in (one, two))
        assert arrays.keys() == others.keys()
        for part in arrays:
            np.testing.assert_allclose(arrays[part], others[part], rtol=1e-5, atol=1e-7)


def test_two_hosts_cluster_frozen_features_as_one_process_does_and_go_on(workdirs):
    one, two = (workdir / "frozen" for workdir in workdirs)
    same_results(one, two)
    features = [np.load(workdir / "features" / "deepcluster.npy") for workdir in (one, two)]
    assert len(features[0]) == SIZES["train"]
    np.testing.assert_allclose(*features, rtol=1e-5, atol=1e-6)
    assert clusters(one) == clusters(two)
    rounds = sorted(path.name for path in (one / "assignments" / "deepcluster").iterdir())
    assert rounds == ["0.npz", "1.npz", "2.npz"]
    for name in rounds:
        here, there = (np.load(workdir / "assignments" / "deepcluster" / name)["cluster"] for workdir in (one, two))
        np.testing.assert_array_equal(here, there, err_msg=name)


def test_all_stages_of_spice_on_two_hosts_can_be_pictured_by_one(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    with jaxclust("--config=configs/spice.py:smoke", workdir, "--config.runtime.devices=0") as processes:
        all_well(processes, timeout=900)
    found, stages = results(tmp_path / "run"), ("moco", "embed", "self", "reliable", "semi")
    assert all((tmp_path / "run" / "checkpoints" / stage).is_dir() for stage in stages)
    assert all(0.1 < found[f"{stage}/train/acc"] <= 1 for stage in stages[1:]) and found["step"] == 40
    log = np.load(tmp_path / "run" / "assignments" / "reliable" / "0.npz")["cluster"]
    counts = np.bincount(log[log >= 0])
    assert found["reliable/labelled"] == counts.sum() and set(counts) <= {0, counts.max()}
    drawn = {"moco": {"first_layer", "tsne", "views"}, "embed": {"first_layer", "tsne"}}
    for stage in ("moco", "embed", "self", "semi"):  # reliable shows what self does
        assert run("--job=report", workdir, f"--config.report.stage={stage}", "--config.report.sample=50") == 0
        said = capsys.readouterr().out
        names = {line.partition(":")[0] for line in said.splitlines() if f"{tmp_path}/run/pictures/" in line}
        assert names == drawn.get(stage, {"first_layer", "tsne", "prototypes", "similarity", "views"}), said


LABELLED = {
    # Experts that start with noise near one that was trained alone, with files of scores of every epoch.
    "clustnet": ("--config=configs/clustnet.py:digits,pretrained,smoke", "--config.batch_size=24"),
    "dscl": ("--config=configs/dscl.py:smoke", "--config.dscl.small_batch_size=24", "--config.dscl.bn=frozen"),
}


@pytest.mark.parametrize("method", LABELLED)
def test_what_learns_from_labels_on_two_hosts_is_what_one_process_makes(method, tmp_path):
    shared = (*LABELLED[method], "--config.runtime.dtype=float64", "--config.runtime.devices=0")
    for name, count in (("one", 1), ("two", 2)):
        job = shlex.join([*shared, f"--workdir={tmp_path / name}"])
        with snippet(JOBS, job, count=count, devices=2 // count) as processes:
            all_well(processes)
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert {name for name in one if two[name] != pytest.approx(one[name], abs=1e-6)} <= {"seconds"}
    there = sorted((tmp_path / "one" / "scores").glob("*.csv"))
    assert len(there) == (5 if method == "clustnet" else 0)
    for path in there:
        rows, others = (np.loadtxt(tmp_path / name / "scores" / path.name, delimiter=",") for name in ("one", "two"))
        np.testing.assert_allclose(rows, others, rtol=1e-5, atol=1e-7, err_msg=path.name)
