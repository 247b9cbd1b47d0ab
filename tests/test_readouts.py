"""Retrieval and clusters of read-outs of features (check D12 of the specification of DSCL)."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import run
from test_comparisons import clouds, config, images, seen, slow_retrieval

from jaxclust import main
from jaxclust.errors import ConfigError
from jaxclust.evaluation import _similar, clustering, readouts, retrieval
from jaxclust.jobs import evaluate
from jaxclust.methods.base import DataInfo
from jaxclust.report import retrieval as page
from jaxclust.report import scores

# Six images of two classes on a circle, at these degrees; the second and third are the same picture.
DEGREES, LABELS = np.array([0, 10, 10, 25, 100, 110]), np.array([0, 0, 0, 1, 1, 1])
# Among the first R = 2 of each query are: both, both, both; 10 and 10, none; 110 and 25, both; 100 and 25, both.
BY_HAND = {"r@1": 5 / 6, "r@2": 5 / 6, "r@4": 1.0, "map@r": 5 / 6, "r-precision": 5 / 6}


def on_circle(degrees, lengths=1.0):
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.broadcast_to(lengths, len(degrees))[:, None]


def judged(rows, labels, cosine=True, at=(1, 2, 4, 8)):
    return retrieval.scores(seen(rows, labels).rows(), np.asarray(labels, np.int32), at, cosine=cosine)


@pytest.mark.parametrize("cosine", [True, False])
def test_d12_six_points_by_hand_with_a_picture_that_is_there_twice(cosine):
    """A query is left out by its place, so its double is found first."""
    got = judged(on_circle(DEGREES), LABELS, cosine, (1, 2, 4))
    assert got == pytest.approx(BY_HAND | {"queries": 6, "left_out": 0})
    only_double = judged(on_circle([0, 0, 90, 180]), [0, 0, 1, 1])
    assert only_double["r@1"] == pytest.approx(3 / 4)  # 90 is as far from its own 180 as from 0, which has a lower id
    table = retrieval.index_table(seen(on_circle(DEGREES), LABELS).rows(), LABELS, 3)
    assert table.tolist() == [
        [0, 1, 2, 3], [1, 2, 0, 3], [2, 1, 0, 3], [3, 1, 2, 0], [4, 5, 3, 1], [5, 4, 3, 1]
    ]  # fmt: skip


def test_the_table_of_neighbours_has_gaps_where_there_are_no_more():
    labels = np.array([0, 0, -1], np.int32)
    rows = seen(on_circle([0, 10, 20]), labels).rows()
    assert retrieval.index_table(rows, labels, 4).tolist() == [
        [0, 1, -1, -1, -1], [1, 0, -1, -1, -1], [2, 1, 0, -1, -1]
    ]  # fmt: skip


def slow_euclidean(rows, labels, ks):
    """R@K by distance, query by query."""
    rows = np.asarray(rows, np.float32).astype(np.float64)
    recalls = []
    for i in np.flatnonzero(labels >= 0):
        distances = np.square(rows - rows[i]).sum(axis=1)
        order = [j for j in np.argsort(distances, kind="stable") if j != i and labels[j] >= 0]
        right = [labels[j] == labels[i] for j in order]
        if any(right):
            recalls.append([any(right[:k]) for k in ks])
    return np.mean(recalls, axis=0)


@pytest.mark.parametrize("queries, bank", [(1024, 8192), (16, 13)])
def test_distances_and_cosines_in_blocks_are_those_of_the_slow_doubles(queries, bank, monkeypatch):
    monkeypatch.setattr(_similar, "_QUERIES", queries)
    monkeypatch.setattr(_similar, "_BANK", bank)
    rows, labels = clouds(101)
    rows *= np.exp(np.random.default_rng(3).standard_normal((101, 1)))  # so that both orders differ
    labels[5] = -1
    by_distance, by_cosine = judged(rows, labels, cosine=False), judged(rows, labels)
    expected = slow_euclidean(rows, labels, (1, 2, 4, 8))
    assert [by_distance[f"r@{k}"] for k in (1, 2, 4, 8)] == pytest.approx(expected.tolist())
    recalls, precision, share = slow_retrieval(rows, labels, (1, 2, 4, 8))
    assert [by_cosine[f"r@{k}"] for k in (1, 2, 4, 8)] == pytest.approx(recalls.tolist())
    assert (by_cosine["map@r"], by_cosine["r-precision"]) == pytest.approx((precision, share))
    assert by_cosine["r@1"] != by_distance["r@1"]


@given(st.integers(0, 10**6), st.lists(st.integers(-1, 4), min_size=4, max_size=30), st.booleans())
@settings(max_examples=25)
def test_d12_more_places_find_more_and_moving_features_changes_nothing(seed, labels, cosine):
    labels = np.array(labels, np.int32)
    assume((np.unique(labels[labels >= 0], return_counts=True)[1] > 1).any())
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((len(labels), 3))
    got = judged(rows, labels, cosine)
    assert 0 <= got["r@1"] <= got["r@2"] <= got["r@4"] <= got["r@8"] <= 1
    assert 0 <= got["map@r"] <= got["r-precision"] <= 1 and got["r@1"] >= got["map@r"] - 1
    turned = rows @ np.linalg.qr(rng.standard_normal((3, 3)))[0]
    moved = turned * rng.uniform(0.5, 2, (len(rows), 1)) if cosine else turned + rng.uniform(-1, 1, 3)
    order = rng.permutation(len(rows))
    assert judged(moved[order], labels[order], cosine) == pytest.approx(got)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.permutations(range(4)))
@settings(max_examples=25)
def test_d12_nmi_of_a_renamed_partition_is_one_and_of_a_constant_zero(labels, names):
    labels = np.array(labels)
    assume(len(np.unique(labels)) > 1)
    assert clustering.nmi(np.array(names)[labels], labels) == pytest.approx(1)
    assert clustering.nmi(np.zeros(len(labels), int), labels) == 0


def suite_config(**overrides):
    return config(evaluate__readouts="raw,l2,spectral,njw", evaluate__njw_neighbours=5, **overrides)


def test_every_read_out_of_groups_that_are_apart_is_perfect():
    """Three directions with lengths that raw distances are misled by."""
    group = np.arange(90) % 3
    rng = np.random.default_rng(0)
    rows = (np.eye(3)[group] + 0.05 * rng.standard_normal((90, 3))) * rng.choice([0.01, 1.0], (90, 1))
    labels = group.copy()
    labels[7] = -1
    got = readouts.compare(images((rng.standard_normal((4, 3)), [0, 1, 0, 1]), (rows, labels)), suite_config())
    for name in ("l2", "spectral", "njw"):
        for key in ("r@1", "r@8", "map@r", "r-precision", "nmi"):
            assert got[f"test/{name}/{key}"] == pytest.approx(1), (name, key)
    assert got["test/raw/map@r"] < 0.8 and got["test/raw/nmi"] < 0.6
    assert (got["test/queries"], got["test/left_out"]) == (89, 0) and len(got) == 4 * 7 + 2


def test_each_read_out_is_judged_by_its_own_rows():
    rows, labels = clouds(60)
    rows[:, 0] += 30  # a direction that all share, which spectral rows do not see once they are centred
    got = readouts.compare(images((rows, labels)), suite_config(evaluate__nmi_runs=0, evaluate__spectral_center=True))
    x = rows.astype(np.float32).astype(np.float64)
    u = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[0]
    for name, expected in (("l2", x), ("spectral", u)):
        recalls, precision, _ = slow_retrieval(expected, labels, (1, 2))
        assert [got[f"train/{name}/r@{k}"] for k in (1, 2)] == pytest.approx(recalls.tolist())
        assert got[f"train/{name}/map@r"] == pytest.approx(precision)
    assert got["train/raw/r@1"] == pytest.approx(slow_euclidean(x - x.mean(axis=0), labels, (1,))[0])
    assert not any(key.endswith("nmi") for key in got)


def test_a_read_out_of_fewer_images_than_dimensions_is_said_to_say_nothing(caplog):
    rows, labels = clouds(12, dim=10)
    readouts.compare(images((rows, labels)), config(evaluate__readouts="spectral", evaluate__nmi_runs=1))
    assert "the spectral read-out of 12 images has 10 dimensions" in caplog.text


def test_unknown_read_outs_are_refused():
    with pytest.raises(
        ConfigError, match="'spectrl' is unknown; did you mean 'spectral'.* There is: raw, l2, spectral"
    ):
        readouts.asked(config(evaluate__readouts="l2,spectrl"))
    with pytest.raises(ConfigError, match="'' is unknown"):
        readouts.asked(config(evaluate__readouts="l2,"))


def of_cars(source="cars196:/cars"):
    return {"data": {"source": source}}


def test_the_page_has_the_untrained_network_beside_the_trained_one():
    results = {
        "test/r@10": 1.0, "test/r@1": 0.5, "test/nmi": 0.25, "test/spectral/r@1": 0.625, "untrained/test/r@1": 0.125,
        "test/queries": 8131, "train/acc": 0.1, "self/test/nmi": 0.3, "untrained/test/spectral/r@1": 0.2,
        "untrained/knn/top1": 0.5,
    }  # fmt: skip
    assert list(scores.readouts(results)) == ["test", "test/spectral", "untrained/test", "untrained/test/spectral"]
    lines = page.table(results, of_cars("digits")).splitlines()
    assert lines == [
        "| network | images | read-out | r@1 | r@10 | nmi |",
        "|---|---|---|---|---|---|",
        "| untrained | test | l2 | 12.50 | – | – |",
        "| trained | test | l2 | 50.00 | 100.00 | 25.00 |",
        "| untrained | test | spectral | 20.00 | – | – |",
        "| trained | test | spectral | 62.50 | – | – |",
    ]
    published = page.table(results, of_cars()).splitlines()[6:]
    assert [line.split(" | ")[3] for line in published] == ["45.91", "67.54", "73.07"]
    assert len(page.table(results | {"test/queries": 30}, of_cars()).splitlines()) == 6
    assert page.table({"train/acc": 0.5, "test/nmi": 0.5}, of_cars()) == ""
    assert scores.agreement(results) == {"train": {"acc": 0.1}, "self/test": {"nmi": 0.3}}
    tables = scores.comparisons(results)
    assert tables[0].rows["untrained/test"] == {"r@1": "0.1250"} and tables[0].name == "readouts"


@pytest.mark.parametrize("text, value", [("(8,)", (8,)), ("(1,10)", (1, 10))])
def test_one_or_several_k_may_be_asked_for(text, value):
    command = main.parse(["jaxclust", "--config=configs/deepcluster.py", f"--config.evaluate.recall_at={text}"])
    assert command.config.evaluate.recall_at == value


def settings_of(workdir, *more):
    return (
        "--config=configs/spice.py:smoke", "--config.stages=moco", f"--workdir={workdir}", "--config.rounds=1",
        "--config.data.train_classes=0-4", "--config.evaluate.suite=readouts", "--config.evaluate.nmi_runs=2",
        "--config.report.pictures=", "--config.model.blocks=1", "--config.refresh_every=4 steps", *more,
    )  # fmt: skip


@pytest.mark.medium
def test_a_run_is_judged_before_and_after_training_on_unseen_classes(tmp_path):
    """A method that predicts nothing: what its main read-out says has plain names."""
    workdir = tmp_path / "run"
    start = settings_of(workdir, "--config.evaluate.untrained=True")
    assert run(*start, "--config.evaluate.save_retrieval=True") == 0
    results = json.loads((workdir / "results.json").read_text())
    keys = [
        f"{split}{name}/{key}" for split in ("test", "untrained/test") for name in ("", "/spectral")
        for key in ("r@1", "r@2", "r@4", "r@8", "map@r", "r-precision", "nmi")
    ]  # fmt: skip
    assert all(0 < results[key] <= 1 for key in keys) and results["test/queries"] == 896
    assert results["untrained/test/r@1"] != results["test/r@1"]
    text = (workdir / "retrieval.md").read_text()
    assert len(text.splitlines()) == 6 and "| untrained | test | spectral |" in text
    saved = np.load(workdir / "retrieval.npz")
    assert saved["neighbours"].shape == (896, 9) and (saved["neighbours"][:, 0] == np.arange(896)).all()
    right = saved["labels"][saved["neighbours"][:, 1]] == saved["labels"]
    assert right.mean() == pytest.approx(results["test/r@1"]) and len(saved["vectors"]) == 896

    assert run("--job=evaluate", *start, "--config.evaluate.readouts=l2", "--config.evaluate.recall_at=(16,)") == 0
    later = json.loads((workdir / "results.json").read_text())
    assert later["test/r@16"] >= later["test/r@8"] == results["test/r@8"]  # of the same checkpoint
    untrained = {key: value for key, value in results.items() if key.startswith("untrained/")}
    assert untrained.items() <= later.items() and later["test/nmi"] == pytest.approx(results["test/nmi"])


def test_what_a_training_began_with_is_judged_once_and_before_it_begins(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(evaluate, "compare", lambda stage, images: {"test/r@1": 0.25})
    monkeypatch.setattr(evaluate, "compared", lambda stage, state, source: None)
    info = DataInfo(1, (1, 1, 1), begun=True)
    stage = SimpleNamespace(
        workdir=tmp_path, config=config(evaluate__untrained=True), info=info, first=lambda: SimpleNamespace(state=None)
    )
    evaluate.write_untrained(stage, None)
    assert "has begun, so no network is untrained" in capfd.readouterr().out and not list(tmp_path.iterdir())
    fresh = SimpleNamespace(**{**vars(stage), "info": info._replace(begun=False)})
    evaluate.write_untrained(fresh, None)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {"untrained/test/r@1": 0.25}
    monkeypatch.setattr(evaluate, "compare", lambda stage, images: 1 / 0)
    evaluate.write_untrained(stage, None)  # and it is there
    evaluate.write_untrained(SimpleNamespace(**{**vars(fresh), "config": config()}), None)
    assert evaluate.lasting(found, stage.config) == found and not capfd.readouterr().out


def test_of_a_method_that_predicts_the_plain_nmi_is_that_of_its_clusters(tmp_path):
    rows, labels = clouds(120, classes=6)
    file = tmp_path / "v.npz"
    np.savez(file, features=rows.astype(np.float32), labels=labels)
    start = (
        "--job=evaluate", f"--config.data.source=features:{file}", "--config.data.train_classes=0.5",
        f"--workdir={tmp_path / 'run'}", "--config.cluster.k=2", "--config.evaluate.nmi_runs=1",
    )  # fmt: skip
    assert run(*start, "--config.evaluate.suite=clustering,readouts") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test/nmi"] != results["test/l2/nmi"] and "test/r@1" not in results
    assert results["test/queries"] == 60 and results["images"] == 120


def test_evaluations_of_features_that_nothing_asks_for_are_refused(tmp_path, capfd):
    for name in ("untrained", "save_retrieval"):
        wrong = ("--config.evaluate.suite=clustering", f"--config.evaluate.{name}=True")
        assert run(*settings_of(tmp_path / "run", *wrong)) == 2
        assert f"config.evaluate.{name} is about features" in capfd.readouterr().err
    assert run(*settings_of(tmp_path / "run", "--config.evaluate.readouts=spectrum")) == 2
    assert "readouts='spectrum': 'spectrum' is unknown; did you mean 'spectral'?" in capfd.readouterr().err
