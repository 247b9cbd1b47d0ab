"""Pictures of a network: each against a slow double, and all by the command line on a run that is not even trained."""

import json
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image
from scipy.ndimage import gaussian_filter
from small import digit_files, few_digits, few_vectors, prepared, run, small_config, with_settings
from test_prototypes import first as best
from test_prototypes import slow_labels, unit
from test_report import Page

from jaxclust import models
from jaxclust import pictures as pictures_lib
from jaxclust.data.pipeline import images_at
from jaxclust.data.source import open_source
from jaxclust.errors import ConfigError, DataError
from jaxclust.jobs import report as report_job
from jaxclust.ops.images import gaussian_blur
from jaxclust.pictures import (
    Seen,
    _embedding,
    activations,
    filters,
    first_layer,
    prototypes,
    similarity,
    tsne,
    umap,
    views,
)
from jaxclust.pictures import _prototypes as shared
from jaxclust.pictures._layers import layers
from jaxclust.report import gallery
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.checkpoint import Checkpoints

# The network of the double: one convolution of which channel 2 never passes its ReLU.
SHIFT = np.array([0.0, 0.2, -1e6])


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), param_dtype=jnp.float64)(x) + SHIFT)
        self.sow("maps", "conv1", x)
        return nn.Conv(2, (1, 1), param_dtype=jnp.float64)(x)


def embed_tiny(params, extra, images, layers):
    _, captured = Tiny().apply(params, images, mutable=["maps"])
    return {name: captured["maps"][name][0] for name in layers}


def slow_ascent(x, channel, kernel, steps, lr, weight_decay, every, sigma):
    """The same with a matrix for the convolution, and the gradient by hand."""
    shape = x.shape
    matrix = np.stack([slow_convolution(basis.reshape(shape), kernel) for basis in np.eye(x.size)])  # [pixels, H, W, 3]
    x = x.ravel()
    for i in range(steps):
        before = np.tensordot(x, matrix, 1)
        passes = before + SHIFT > 0
        if passes[..., channel].any():
            answers, slopes = np.where(passes, before + SHIFT, 0).mean(axis=(0, 1)), (matrix * passes).mean(axis=(1, 2))
        else:
            answers, slopes = before.mean(axis=(0, 1)), matrix.mean(axis=(1, 2))
        share = np.exp(answers - answers.max())
        share /= share.sum()
        gradient = slopes[:, channel] - slopes @ share - 2 * weight_decay * x
        x = x + lr * gradient / (np.linalg.norm(gradient) + 1e-8)
        if i % every == 0:
            x = gaussian_filter(x.reshape(shape), (sigma, sigma, 0)).ravel()
    return x.reshape(shape)


def slow_convolution(x, kernel):
    height, width = x.shape[:2]
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((height, width, kernel.shape[3]))
    for i in range(height):
        for j in range(width):
            out[i, j] = np.tensordot(padded[i : i + 3, j : j + 3], kernel, 3)
    return out


@pytest.mark.parametrize("channel", [0, pytest.param(1, marks=pytest.mark.wide), 2])
def test_gradient_ascent_equals_the_slow_one(float64, channel):
    rng = np.random.default_rng(channel)
    x = 128 + 20 * rng.standard_normal((5, 4, 2))
    params = {"params": Tiny().init(jax.random.key(3), jnp.asarray(x[None]))["params"]}
    kernel = np.asarray(params["params"]["Conv_0"]["kernel"])
    ascent = filters.Ascent(steps=7, lr=3.0, weight_decay=1e-5, every=5, sigma=0.6)
    score = partial(filters.objective, embed_tiny, params, None, "conv1", ascent.weight_decay)
    climb = jax.jit(partial(filters.ascend, score, ascent))
    once = climb(jnp.asarray(x), channel, 0, 7)
    expected = slow_ascent(x, channel, kernel, *ascent)
    np.testing.assert_allclose(once, expected, rtol=1e-9)
    np.testing.assert_allclose(climb(climb(jnp.asarray(x), channel, 0, 3), channel, 3, 7), expected, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.1])
def test_blur_is_that_of_scipy(float64, sigma):
    images = np.random.default_rng(0).standard_normal((2, 3, 5, 2))  # the kernel of 1.1 is wider than an image
    expected = gaussian_filter(images, (0, sigma, sigma, 0)) if sigma else images
    np.testing.assert_allclose(gaussian_blur(jnp.asarray(images), sigma), expected, atol=1e-12)


@pytest.mark.parametrize("network", ["convnet", "resnet18"])
def test_a_map_comes_with_the_convolution_before_it(network):
    config = small_config(model__name=network, model__width=4, model__dim=0, model__stem="small", model__blocks=2)
    body, rng = models.get(config), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 6, 6, 1)), jnp.float32)
    shapes = jax.eval_shape(body.init, jax.random.key(0), x)
    same = {"bias": np.zeros, "mean": np.zeros, "scale": np.ones, "var": np.ones}  # batch norm then changes little
    variables = {
        kind: jax.tree_util.tree_map_with_path(
            lambda path, leaf: same.get(path[-1].key, rng.standard_normal)(leaf.shape).astype(np.float32), shapes[kind]
        )
        for kind in ("params", "batch_stats")
    }

    def embed(params, extra, images, layers):
        _, captured = body.apply(params, images, mutable=["maps"])
        return {name: captured["maps"][name][0] for name in layers}

    names = ("conv1", "conv2")
    for after, before in jax.jit(lambda x: [filters.maps(embed, variables, None, name, x) for name in names])(x):
        assert after.shape == before.shape and before.min() < 0 <= after.min()
    if network == "convnet":
        np.testing.assert_allclose(after, np.maximum(before, 0), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 40), st.integers(0, 12), st.integers(1, 7), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_strongest_images_equal_sorting_all(size, count, batch, random):
    values = np.array([[random.randrange(6) for _ in range(3)] for _ in range(size)], np.float32)  # with ties
    count = count or size
    parts = [(np.arange(i, min(i + batch, size)), values[i : i + batch]) for i in range(0, size, batch)]
    ids, found = activations.strongest(parts, count)
    expected = np.argsort(-values, axis=0, kind="stable")[:count]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(values, expected, axis=0))


def looked_at(tmp_path, source, **overrides):
    """What pictures are made from, of a network that is not trained."""
    stage = prepared(small_config(**overrides), tmp_path, source)
    return Seen(stage, stage.first().state, lambda: source)


def test_ascent_raises_what_it_climbs_and_sobel_networks_see_grey_images(tmp_path, monkeypatch):
    monkeypatch.setattr(filters, "AT_ONCE", 2)  # of three channels, so that they are worked on in two parts
    monkeypatch.setattr(filters, "STRIDE", 20)
    seen = looked_at(
        tmp_path,
        few_digits(20),
        model__sobel=True,
        model__blocks=1,
        report__layers="conv1",
        report__filters__steps=(50,),
    )
    (layer,), (ascent,) = layers(seen), filters.ascents(seen.stage.config, 1)
    climbed = np.stack(list(filters.ascended(seen, layer._replace(shown=3), ascent)))
    assert climbed.shape == (3, 8, 8, 1)
    first = filters.noise(jax.random.key(0), np.arange(3, dtype=np.int32), (8, 8, 1))
    assert abs(first.mean() - 128) < 10 and 15 < first.std() < 25 and np.ptp([x.mean() for x in first]) > 0

    state, embed = seen.state, seen.stage.method.embed
    score = partial(filters.objective, embed, state.params, state.extra, layer.name, ascent.weight_decay)
    table = jax.jit(jax.vmap(jax.vmap(score, (None, 0)), (0, None)))  # images by channels
    before, after = (np.asarray(table(images, np.arange(3))) for images in (first, climbed))
    assert np.all(np.diag(after) > before.max(axis=0) + 0.1), (before, after)
    assert first_layer.kernel(seen).shape == (3, 3, 2, 8)


def test_saved_images_are_grey_around_their_mean():
    x = np.array([[[100.0], [300.0]]])
    assert filters.saved(x).ravel().tolist() == [round(0.4 * 255), round(0.6 * 255)]
    assert filters.saved(np.full((2, 2, 3), 7.0)).max() == 128


@pytest.mark.parametrize(("channels", "shape"), [(1, (4, 66, 66, 1)), (2, (4, 66, 134, 1)), (3, (4, 66, 66, 3))])
def test_first_filters_are_images_with_zero_in_the_middle(channels, shape):
    kernel = np.zeros((3, 3, channels, 4), np.float32)
    kernel[0, 1, channels - 1, 2] = -0.02
    kernel[2, 2, 0, 3] = 5.0
    images = first_layer.enlarged(kernel)
    assert images.shape == shape and images.dtype == np.uint8
    assert set(np.unique(images[0])) <= {128, 255}  # all zero, and the line between channels
    assert (images[2, :22, -44:-22, -1] == 0).all() and (images[3, 44:, 44:66, 0] == 255).all()


def test_an_embedding_keeps_groups_together_and_is_the_same_each_time():
    rng = np.random.default_rng(0)
    group = np.arange(45) % 3
    rows = _embedding.unit((4 * np.eye(3, 5)[group] + 0.3 * rng.standard_normal((45, 5))).astype(np.float32))
    points = tsne.flatten(rows, 7)
    assert points.shape == (45, 2)
    np.testing.assert_array_equal(points, tsne.flatten(rows, 7))
    distance = np.linalg.norm(points[:, None] - points, axis=2) + np.where(np.eye(45, dtype=bool), np.inf, 0)
    assert np.mean(group[distance.argmin(axis=1)] == group) == 1.0


def test_clusters_have_the_colour_of_their_class():
    cluster, labels = np.array([0, 0, 1, 1, 2, 3]), np.array([1, 1, 0, 0, 0, -1])
    sample = _embedding.Sample(np.arange(6), np.zeros((6, 2)), cluster, labels)
    part = {"reliable": np.array([-1, -1, 1, -1, 1, 0])}
    clusters, reliable, classes = _embedding.colourings(sample, part, ("cat", "dog"))
    assert clusters.colour.tolist() == [1, 0, 2, 3] and classes.names == ("cat", "dog")
    assert reliable.colour.tolist() == [2, 0] and reliable.group is part["reliable"] and "reliable" in reliable.title
    nothing = sample._replace(labels=np.full(6, -1))
    assert [panel.title for panel in _embedding.colourings(nothing, {}, ())] == ["by cluster"]
    assert len(_embedding.colourings(nothing._replace(cluster=None), {}, ())) == 1
    assert len(np.unique(_embedding.palette(300, _embedding.figures.DARK), axis=0)) == 300


def test_vectors_pass_through_no_filters(tmp_path):
    seen = looked_at(tmp_path, few_vectors(20), freeze_body=True)
    for module in (filters, activations, first_layer, prototypes, similarity, views):
        with pytest.raises(DataError, match="vectors"):
            module.prepare(seen)


def test_umap_without_its_package_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxclust\[umap\]'"):
        umap.prepare(None)


# The pictures of SPICE, of a method that says of every image how probable each cluster is.


@pytest.fixture(scope="module")
def probable(tmp_path_factory):
    """50 digits in three clusters, which are nothing but the brightness of some places."""
    seen = looked_at(tmp_path_factory.mktemp("probable"), few_digits(50), model__blocks=2)

    def predict(params, extra, images):
        logs = jax.nn.log_softmax(images[:, 2:5, 3, 0] / 9.0)
        return {"cluster": jnp.argmax(logs, axis=1).astype(jnp.int32), "log_probs": logs}

    return seen._replace(stage=seen.stage._replace(method=seen.stage.method._replace(predict=predict), predict=predict))


def said_of_all(seen):
    """Features, last maps and log-probabilities of all images, float64."""
    stage, state, images = seen.stage, seen.state, seen.source().splits["train"].images
    of = (state.params, state.extra, jnp.asarray(images))
    found = (
        stage.method.embed(*of),
        stage.method.embed(*of, layers=("conv2",))["conv2"],
        stage.predict(*of)["log_probs"],
    )
    return images, *(np.asarray(part, np.float64) for part in found)


def test_the_images_of_a_prototype_are_those_of_the_slow_one(probable, tmp_path):
    shown = prototypes.prepare(probable)(tmp_path)
    images, features, _, logs = said_of_all(probable)
    expected, _, _ = slow_labels(unit(features), logs, top=50 // 3 // 2, members=10)
    rows = [line.split(",") for line in (tmp_path / "prototypes.csv").read_text().splitlines()[1:]]
    assert [int(row[2]) for row in rows] == expected
    assert rows[10] == ["1", "1", str(expected[10]), f"digits/{expected[10]}"]
    assert [picture.file for picture in shown.images] == ["prototypes.png"]
    with Image.open(tmp_path / "prototypes.png") as picture:
        assert picture.width == 1584


def slow_colours(image, similar):
    """One pixel after the other: bilinear between the middles of cells, and matplotlib's jet."""
    (h, w), (height, width) = similar.shape, image.shape[:2]
    similar = (similar - similar.min()) / (similar.max() - similar.min())
    out = np.zeros((height, width, 3))
    for i in range(height):
        for j in range(width):
            y, x = (np.clip((p + 0.5) * n / m - 0.5, 0, n - 1) for p, n, m in ((i, h, height), (j, w, width)))
            (a, b), (s, t) = (int(y), int(x)), (y % 1, x % 1)
            c, d = min(a + 1, h - 1), min(b + 1, w - 1)
            value = (1 - s) * ((1 - t) * similar[a, b] + t * similar[a, d])
            value += s * ((1 - t) * similar[c, b] + t * similar[c, d])
            out[i, j] = 0.4 * 255 * np.array(matplotlib.colormaps["jet"](value)[:3]) + 0.6 * image[i, j]
    return out


def test_similarity_maps_are_those_of_the_slow_one(probable, tmp_path):
    split, places = probable.source().splits["train"], similarity.last_map(probable)
    found = shared.find(probable, split, partial(similarity.mean, places), 4, tmp_path)
    images, _, maps, logs = said_of_all(probable)
    rows = unit(maps.mean(axis=(1, 2)))
    for c, drawn in enumerate(similarity.pairs(probable, split, places, found)):
        centre = rows[best(logs[:, c], 8)].mean(axis=0)
        nearest = best(rows @ centre, 4)
        assert found.ids[c].tolist() == nearest
        np.testing.assert_array_equal(drawn[0::2], np.broadcast_to(images[nearest], (4, 8, 8, 3)))
        for number, id in enumerate(nearest):
            expected = slow_colours(images[id], maps[id] @ centre)
            step = np.abs(np.diff(matplotlib.colormaps["jet"](np.arange(256))[:, :3], axis=0)).max() * 255 * 0.4
            assert np.abs(drawn[2 * number + 1] - expected).max() < step + 1  # rounding may take the next colour


def test_a_map_without_differences_has_one_colour_and_other_sizes_fit():
    assert not similarity.scaled(np.full((2, 3, 5), 0.7, np.float32)).any()
    image = np.full((1, 7, 11, 3), 200, np.uint8)
    flat = similarity.mixed(image, np.ones((1, 3, 5), np.float32))
    assert flat.shape == image.shape and flat[0].reshape(-1, 3).tolist() == [[120, 120, 171]] * 77  # blue of jet: 0.5


def test_many_clusters_take_several_sheets_and_have_the_names_of_their_classes(probable, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "ROWS", 2)
    cluster = np.arange(50, dtype=np.int32) % 3
    split = replace(probable.source().splits["train"], labels=(cluster + 1) % 3)
    assert shared.names_of(cluster, split, "abc") == {0: "b", 1: "c", 2: "a"}
    assert shared.names_of(cluster, replace(split, labels=None), "abc") == {}
    found = shared.Prototypes(np.zeros((3, 1)), np.zeros((3, 1), np.int32), cluster)
    images = iter(np.zeros((3, 1, 8, 8, 1), np.uint8))
    shown = shared.sheets(images, found, {}, "", tmp_path, "some")
    assert [(picture.file, picture.title) for picture in shown] == [
        ("some.png", "clusters 0 to 1"),
        ("some-2.png", "clusters 2 to 2"),
    ]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_method_that_knows_no_probabilities_has_no_prototypes(probable, tmp_path):
    blind = probable._replace(stage=probable.stage._replace(method=probable.stage.method._replace(predict=None)))
    for module in (prototypes, similarity):
        with pytest.raises(DataError, match=r"'deepcluster' does not predict how probable .* config.report.stage"):
            module.prepare(blind)
    few = probable._replace(source=lambda: few_digits(5))
    with pytest.raises(DataError, match="5 images for 3 clusters leave a prototype without an image"):
        prototypes.prepare(few)


def test_views_are_what_a_step_of_training_sees(probable, tmp_path):
    config = ConfigDict(probable.stage.config.to_dict())
    with config.unlocked():
        config.views = ConfigDict({"mirror": {"flip": 1.0}, "copies": {"number": 3}})
    method = probable.stage.method._replace(views=("mirror", "copies"))
    seen = probable._replace(stage=probable.stage._replace(config=config, method=method))
    image, mirror, copies = views.columns(seen, seen.source())
    assert [column.name for column in (image, mirror, copies)] == ["image", "mirror", "copies"]
    assert image.images.shape == (views.ROWS, 1, 8, 8, 1) and copies.images.shape == (views.ROWS, 3, 8, 8, 1)
    np.testing.assert_array_equal(mirror.images, image.images[:, :, :, ::-1])
    np.testing.assert_array_equal(copies.images, np.repeat(image.images, 3, axis=1))
    assert len({picture.tobytes() for picture in image.images}) == views.ROWS
    assert views.prepare(seen)(tmp_path).images[0].dark == "views-dark.png"
    with pytest.raises(DataError, match="'deepcluster' has config.freeze_body=True"):
        views.prepare(seen._replace(stage=seen.stage._replace(config=with_settings(config, freeze_body=True))))


def test_stages_that_leave_images_out_are_found(probable, tmp_path):
    clusters = {"self": [[0, 1, 2, 0], [1, 1, 2, 0]], "reliable": [[-1, 1, -1, 0], [0, -1, -1, 2]]}
    for stage, rounds in clusters.items():
        (tmp_path / "assignments" / stage).mkdir(parents=True)
        for number, cluster in zip((9, 10), rounds, strict=True):
            np.savez(tmp_path / "assignments" / stage / f"{number}.npz", cluster=np.array(cluster, np.int32))
    seen = probable._replace(stage=probable.stage._replace(workdir=tmp_path))
    found = _embedding.partial_assignments(seen, np.array([0, 1, 3, 7]))
    assert {name: cluster.tolist() for name, cluster in found.items()} == {"reliable": [0, -1, 2, -1]}


def test_another_stage_than_the_last_may_be_pictured(capsys):
    config = small_config(stages="moco, self,semi")
    assert report_job.until_pictured(config).stages == "moco,self,semi"
    assert report_job.until_pictured(with_settings(config, report__stage="self")).stages == "moco,self"
    with config.unlocked():
        config.stage.reliable = {"method": "reliable"}
    capsys.readouterr()
    assert report_job.until_pictured(with_settings(config, report__stage="reliable")).stages == "moco,self,semi"
    assert "pictures are of stage 'semi': this run leaves out config.report.stage='reliable'" in capsys.readouterr().out
    assert config.stages == "moco, self,semi"


# By the command line.


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Digits as files in class folders."""
    return digit_files(tmp_path_factory.mktemp("data") / "photos", 40, 3)


@pytest.fixture(scope="module")
def workdir(photos, tmp_path_factory):
    """A run before its first step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = small_config(data__source=f"folder:{photos}", data__image_size=8, data__channels=1, model__blocks=2)
    source = open_source(config)
    stage = prepared(config, folder, source)
    snapshot = stage.first()
    Checkpoints(folder / "checkpoints" / stage.name, keep=1).save(0, snapshot)
    workdir_lib.write(config, folder, source, 1)
    return folder


@pytest.fixture(scope="module")
def drawn(workdir, tmp_path_factory):
    """The same after a report with all pictures that need no further package."""
    folder = tmp_path_factory.mktemp("drawn") / "run"
    shutil.copytree(workdir, folder)
    assert report(folder, "filters,activations,first_layer,tsne,neighbours", "--config.report.filters.steps=2") == 0
    return folder


def report(folder, names, *arguments):
    few = ["--config.report.layers=conv1,conv2", "--config.report.channels=3"]
    return run("--job=report", f"--workdir={folder}", f"--config.report.pictures={names}", *few, *arguments)


def test_every_picture_is_on_the_page_and_every_file_has_its_name(drawn):
    found = drawn / "pictures"
    names = {"conv1", "conv2", "conv1.png", "conv2.png", gallery.NAME}
    assert {path.name for path in (found / "filters").iterdir()} == names
    jpegs = sorted(path.name for path in (found / "filters" / "conv2").iterdir())
    assert jpegs == [f"layer2-channel{c}.jpeg" for c in range(3)]
    with Image.open(found / "filters" / "conv2" / "layer2-channel2.jpeg") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (8, 8), "L")
    assert not list(drawn.rglob(".*"))

    page = Page(drawn / "report" / "index.html")
    for name in (
        "filters/conv2.png",
        "activations/conv1-dark.png",
        "first_layer/first_layer.png",
        "tsne/tsne-dark.png",
        "neighbours/neighbours-dark.png",
    ):
        assert f"../pictures/{name}" in page.links
    assert all((drawn / "report" / link).exists() for link in page.links)
    assert "What filters look for" in page.text and "channels 0 to 2 of 16" in page.text
    assert "Drawn from the checkpoint at step 0" in page.text


def test_retrieved_files_are_those_with_the_strongest_answers(drawn, photos):
    config = small_config(data__source=f"folder:{photos}", data__image_size=8, data__channels=1, model__blocks=2)
    source = open_source(config)
    split, stage = source.splits["train"], prepared(config, drawn, source)
    state = Checkpoints(drawn / "checkpoints" / stage.name).restore(stage.first(), stage.method.fresh).state
    images = images_at(split, np.arange(split.size, dtype=np.int32))
    embed = jax.jit(partial(stage.method.embed, layers=("conv2",)))
    map2 = embed(state.params, state.extra, jnp.asarray(images))["conv2"]
    means = np.asarray(map2).mean(axis=(1, 2))
    for channel in range(3):
        best = [i for i in np.argsort(-means[:, channel], kind="stable")[:9] if means[i, channel] > 0]
        folder = drawn / "pictures" / "activations" / "conv2" / f"layer2-channel{channel}"
        assert {path.name for path in folder.iterdir()} == {
            f"{rank}_{Path(split.path(i)).name}" for rank, i in enumerate(best, 1)
        }
        first = next(folder.glob("1_*"))
        assert first.read_bytes() == (photos / split.path(best[0])).read_bytes()


def test_without_images_the_network_alone_is_drawn(workdir, photos, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "run")
    saved = json.loads((workdir / "config.json").read_text())
    saved["data"]["source"] = "folder:/nowhere"
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert report(tmp_path / "run", "activations,first_layer,tsne") == 0
    said = capsys.readouterr().out
    assert "left out: tsne: '/nowhere': no such folder" in said and "left out: activations: " in said
    assert [path.name for path in (tmp_path / "run" / "pictures").iterdir()] == ["first_layer"]
    assert "../pictures/first_layer/first_layer.png" in Page(tmp_path / "run" / "report" / "index.html").links


def test_reading_checkpoints_leaves_what_another_process_is_writing(tmp_path):
    read, written = tmp_path / "read", tmp_path / "written"
    for folder in (read, written):
        (folder / "7.orbax-checkpoint-tmp-1").mkdir(parents=True)
    assert Checkpoints(read).latest() is None
    Checkpoints(written, keep=1)  # who saves removes it, in a thread
    until = time.monotonic() + 10
    while list(written.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not list(written.iterdir()) and list(read.iterdir())


def test_without_a_checkpoint_there_is_still_a_page(workdir, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert report(tmp_path / "run", "first_layer,tsne") == 0
    assert "left out: first_layer, tsne: there is no checkpoint of stage 'deepcluster' yet" in capsys.readouterr().out
    assert (tmp_path / "run" / "report" / "index.html").exists() and not (tmp_path / "run" / "pictures").exists()


def test_what_a_run_has_not_the_files_or_the_parts_for_is_left_out_and_said_why(workdir, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "run")
    reasons = {
        "weights": "it needs checkpoints from the first on, and there are those of epochs 0; a training with",
        "sparsity": "method 'deepcluster' of stage 'deepcluster' has no experts that a gate chooses from",
        "map_variance": "method 'deepcluster' of stage 'deepcluster' has no experts that a gate chooses from",
        "reconstructions": "method 'deepcluster' of stage 'deepcluster' has no decoder; another stage may",
        **dict.fromkeys(("failures", "certainty", "confusion", "accuracy"), f"{tmp_path}/run/scores has no epoch1.csv"),
    }
    assert report(tmp_path / "run", ",".join(reasons)) == 0
    said = capsys.readouterr().out
    assert [name for name, reason in reasons.items() if f"left out: {name}: {reason}" not in said] == []


@pytest.mark.parametrize(
    ("names", "arguments", "said"),
    [
        ("first_layer,tnse", [], "did you mean 'tsne'? There is: accuracy, activations, batch, certainty, "),
        ("tsne", ["--config.report.stage=self"], "config.report.stage='self' is unknown. There is: deepcluster."),
        ("first_layer,filters", ["--config.report.layers=conv9"], "'conv9' is unknown; did you mean"),
        ("filters", ["--config.report.filters.lr=(1.0,2.0,3.0)"], "has 3 values for 2 layers"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_drawn(workdir, capsys, names, arguments, said):
    assert report(workdir, names, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and ("There is:" in error or "3 values" in error)
    assert not (workdir / "pictures").exists() and not (workdir / "report").exists()


def test_a_gallery_that_is_not_whole_is_not_shown(tmp_path):
    for name, content in (("torn", '{"title": '), ("lost", None), ("outside", None), (".9.new.tsne", None)):
        file = "../../secret.png" if name == "outside" else "gone.png"
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        gallery.save(gallery.Gallery(name, "", [gallery.Shown(file, "", "")]), folder)
        if content:
            (folder / gallery.NAME).write_text(content)
    Image.new("L", (3, 2)).save(tmp_path / "secret.png")
    Image.new("L", (3, 2)).save(tmp_path / "pictures" / ".9.new.tsne" / "gone.png")
    assert gallery.read(tmp_path) == {}
    Image.new("L", (3, 2)).save(tmp_path / "pictures" / "lost" / "gone.png")
    assert gallery.read(tmp_path)["lost"].images[0].size == (3, 2)


def test_every_picture_has_its_one_function():
    config = small_config(report__pictures="filters, activations, first_layer,tsne,umap,prototypes,similarity,views")
    assert len(pictures_lib.load(config)) == 8
    assert pictures_lib.load(small_config(report__pictures="")) == {}
