"""Pictures of retrieval: neighbours, the spectral read-out, its projector, and the curves of embeddings that learn."""

import csv
import json
from dataclasses import replace

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image
from small import few_digits, few_vectors, prepared, small_config

from jaxclust.data.split import from_array
from jaxclust.errors import DataError
from jaxclust.features.rows import Rows
from jaxclust.pictures import Seen, _readout, neighbours, projector, spectral
from jaxclust.report import curves, figures, html, workdir


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 48)


def filled(features, tmp_path):
    rows = Rows(len(features), features.shape[1:], features.dtype, 10**9, tmp_path)
    rows.append(features)
    return rows.finish()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A network that is not trained, which sees 60 digits as the training and 50 others as the test."""
    config = small_config(model__blocks=1, model__dim=6)
    whole = few_digits(110).splits["train"]
    parts = {"train": slice(0, 60), "test": slice(60, 110)}
    splits = {
        name: replace(from_array(whole.images[of], whole.image_shape, whole.name_of), labels=whole.labels[of])
        for name, of in parts.items()
    }
    source = few_digits(10)._replace(splits=splits)
    stage = prepared(config, tmp_path_factory.mktemp("seen") / "run", source)
    return Seen(stage, stage.first().state, lambda: source)


def of_test(seen):
    """Features of the test images."""
    split = seen.source().splits["test"]
    return np.asarray(seen.stage.embed(seen.state.params, seen.state.extra, np.asarray(split.images)), np.float64)


def test_neighbours_are_those_of_the_slow_one(tmp_path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5)).astype(np.float32)
    features[7] = features[3]  # a double of a query is found first, the query itself never
    labels = rng.integers(-1, 3, 40).astype(np.int32)
    query = np.array([3, 11, 39])
    hits = neighbours.nearest(filled(features, tmp_path), query, labels)
    unit = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True).astype(np.float64)
    for row, q in enumerate(query):
        similar = unit @ unit[q]
        expected = [i for i in np.argsort(-similar, kind="stable") if i != q][: neighbours.FOUND]
        assert hits.found[row].tolist() == expected
        np.testing.assert_allclose(hits.similarity[row], similar[expected], atol=1e-6)
        known = [-1 if min(labels[i], labels[q]) < 0 else int(labels[i] == labels[q]) for i in expected]
        assert hits.right[row].tolist() == known
    assert hits.found[0, 0] == 7
    assert (neighbours.nearest(filled(features, tmp_path), query, None).right == -1).all()


def test_frames_say_which_neighbours_are_right(seen, tmp_path):
    shown = neighbours.prepare(seen)(tmp_path)
    assert shown.images[0].dark == "neighbours-dark.png" and "of test" in shown.caption
    with (tmp_path / "neighbours.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == neighbours.QUERIES * neighbours.FOUND
    labels = seen.source().splits["test"].labels
    assert all(int(row["same_class"]) == (labels[int(row["query"])] == labels[int(row["id"])]) for row in rows)

    hits = neighbours.nearest(filled(of_test(seen), tmp_path), np.array([4, 9]), labels)
    hits = hits._replace(right=np.array([[1, 0, 0, -1, 1, 1, 1, 1], [-1] * 8]))
    figure = neighbours.panels(hits, seen.source().splits["test"], "0123456789")
    frames = [patch for axes in figure.axes for patch in axes.patches if isinstance(patch, Rectangle)]
    colours = [matplotlib.colors.to_hex(patch.get_edgecolor()) for patch in frames]
    assert colours == [figures.LIGHT.first, *[figures.LIGHT.alarm] * 2, *[figures.LIGHT.first] * 4]
    assert [patch.get_linestyle() == "solid" for patch in frames] == [True, False, False, True, True, True, True]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "5 of 7" in texts and len(texts) == 3  # of the second query no class is known but its own


def test_the_projector_is_that_of_the_features_of_the_whole_split(seen, tmp_path):
    found = _readout.read_out(seen, seen.source(), 20, tmp_path)
    features = of_test(seen)
    expected = features @ np.linalg.pinv(features)
    assert found.name == "test" and found.size == 50 and len(found.ids) == 20
    np.testing.assert_allclose(found.rows @ found.rows.T, expected[np.ix_(found.ids, found.ids)], atol=1e-4)
    p, labels = projector.projector(found.rows, found.labels)
    order = np.argsort(seen.source().splits["test"].labels[found.ids], kind="stable")
    assert (np.diff(labels) >= 0).all()
    np.testing.assert_allclose(p, expected[np.ix_(found.ids[order], found.ids[order])], atol=1e-4)


def test_directions_of_the_scatter_are_those_of_the_largest_variance():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 4)) * [1, 5, 0.1, 3] + 7
    points, share = spectral.flattened(rows)
    variance = np.sort(np.linalg.eigvalsh(np.cov(rows.T)))[::-1]
    np.testing.assert_allclose(points.var(axis=0, ddof=1), variance[:3])
    np.testing.assert_allclose(share, variance[:3] / variance.sum())
    flat, share = spectral.flattened(rows[:, :1])
    np.testing.assert_allclose(np.abs(flat[:, 0]), np.abs(rows[:, 0] - rows[:, 0].mean()))
    assert not flat[:, 1:].any() and share.tolist() == pytest.approx([1, 0, 0])
    assert not spectral.flattened(np.ones((5, 2)))[0].any()


@pytest.mark.parametrize("module", [spectral, projector])
def test_the_read_out_is_drawn_for_light_and_dark_pages(module, seen, tmp_path):
    shown = module.prepare(seen)(tmp_path)
    assert "images of test" in shown.caption
    for picture in shown.images:
        pages = [np.asarray(Image.open(tmp_path / file).convert("RGB")) for file in (picture.file, picture.dark)]
        assert pages[0][0, 0].tolist() == [255, 255, 255] and pages[1][0, 0].max() < 40
        assert all(len(np.unique(page.reshape(-1, 3), axis=0)) > 20 for page in pages)


def test_runs_that_have_not_what_they_are_made_from(seen, tmp_path):
    source = seen.source()
    bare = {name: replace(split, labels=None) for name, split in source.splits.items()}
    blind = seen._replace(source=lambda: source._replace(splits=bare, class_names=None))
    with pytest.raises(DataError, match="sorted by class, and no image of test has a label"):
        projector.prepare(blind)
    assert spectral.prepare(blind)(tmp_path).images  # in one colour
    few = seen._replace(source=lambda: few_digits(8))
    with pytest.raises(DataError, match="8 neighbours need more than the 8 images of train"):
        neighbours.prepare(few)
    with pytest.raises(DataError, match="needs 10 images, and there are 8 of train"):
        spectral.prepare(few)
    with pytest.raises(DataError, match="3 images of train span 3 dimensions"):
        _readout.read_out(seen, few_digits(3), 3, tmp_path)
    vectors = small_config(freeze_body=True)
    stage = prepared(vectors, tmp_path / "vectors", few_vectors(20))
    with pytest.raises(DataError, match="vectors"):
        neighbours.prepare(Seen(stage, stage.first().state, lambda: few_vectors(20)))


def logged(tmp_path, **more):
    rows = [
        {
            "stage": "dscl",
            "round": i,
            "step": i,
            "train/loss": 4.0 - i,
            "lr/top": 0.1,
            **{k: v[i] for k, v in more.items()},
        }
        for i in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir.read(tmp_path).metrics


def test_curves_of_embeddings_have_the_loss_of_random_ones_beside_theirs(tmp_path):
    more = {
        "train/reference": [4.9] * 3, "train/rank": [5.0] * 3, "train/effective_rank": [4.0, 4.2, 4.4],
        "train/condition": [10.0, 100.0, 1000.0], "train/gradient_norm": [2.0, 0.0, 0.5],
        "train/skipped_steps": [0, 1, 1], "test/r@1": [0.3, 0.4, 0.5],
    }  # fmt: skip
    panels = {panel.title: panel for panel in curves.panels(logged(tmp_path, **more), 0)}
    assert [(line.label, line.y.tolist()) for line in panels["loss"].lines] == [
        ("loss", [4.0, 3.0, 2.0]), ("random", [4.9] * 3),
    ]  # fmt: skip
    assert panels["loss"].reference is None
    (condition,) = panels["condition number, power of ten"].lines
    assert condition.y.tolist() == pytest.approx([1, 2, 3]) and condition.end == "1e+03"
    (gradient,) = panels["length of the gradient, power of ten"].lines
    assert gradient.x.tolist() == [0, 2] and gradient.end == "0.5"  # a skipped step has none
    assert [line.label for line in panels["R@1"].lines] == ["test"]
    assert [line.label for line in panels["learning rate, power of ten"].lines] == ["top"]
    assert {"rank of the embeddings", "steps that were skipped"} <= panels.keys()
    html.write(tmp_path)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Random embeddings of d numbers" in page and "pure guessing" not in page


def test_other_runs_have_no_curves_of_embeddings(tmp_path):
    assert [panel.title for panel in curves.panels(logged(tmp_path), 0)] == ["loss"]
