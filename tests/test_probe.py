"""Linear probes: their pooling, schedule and crops, and whole runs of them."""

import csv
import json
from dataclasses import replace

import host_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors
from small import few_digits, prepared, run, smaller_config, smoke
from small import trained as trained_on

from jaxclust import models
from jaxclust.data.pipeline import exact_batches, train_batches
from jaxclust.data.split import from_array
from jaxclust.data.subset import hold_out, subset, with_border
from jaxclust.errors import ConfigError, DataError, NonFiniteError, Stopped
from jaxclust.jobs import evaluate
from jaxclust.methods import probe
from jaxclust.models.alexnet import NETWORKS, AlexNet
from jaxclust.ops.images import ten_crops
from jaxclust.train import probes

NO_PARAMS = {"params": {}, "extra": {}}


def slow_windows(layer, side, padding):
    """Average pooling window by window, zeros of the padding counted."""
    padded = np.pad(layer.astype(np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    grid = padded.shape[1] // side
    means = np.zeros((len(layer), grid, grid, layer.shape[3]))
    for i in range(grid):
        for j in range(grid):
            means[:, i, j] = padded[:, i * side : (i + 1) * side, j * side : (j + 1) * side].mean(axis=(1, 2))
    return means


def alexnet_maps(side):
    network = AlexNet(NETWORKS["alexnet"], 96, 64, 0.0, True, jnp.float32, jnp.float32)
    images = jax.ShapeDtypeStruct((2, side, side, 3), np.float32)
    found = jax.eval_shape(network.init, jax.random.key(0), images)["maps"]
    return {name: shapes[0] for name, shapes in found.items()}


def test_alexnet_at_224_is_pooled_as_published():
    maps = alexnet_maps(224)
    pooled = {name: jax.eval_shape(lambda x, name=name: probe.pool(name, x), shape) for name, shape in maps.items()}
    assert [pooled[f"conv{i}"].shape[1] for i in range(1, 6)] == [9600, 9216, 9600, 9600, 9216]
    for name, shape in maps.items():
        x = np.random.default_rng(0).random(shape.shape, np.float32)
        window = probe.ALEXNET[name, shape.shape[1], shape.shape[3]]
        expected = slow_windows(x, *window).reshape(2, -1)
        np.testing.assert_allclose(probe.pool(name, jnp.asarray(x)), expected, atol=1e-6)


def test_zeros_of_the_padding_count_in_the_average():
    ones = jnp.ones((1, 13, 13, 384))
    pooled = np.asarray(probe.pool("conv3", ones)).reshape(5, 5, 384)
    assert pooled[2, 2, 0] == 1 and pooled[0, 2, 0] == pytest.approx(2 / 3) and pooled[0, 0, 0] == pytest.approx(4 / 9)


@pytest.mark.parametrize(
    ("channels", "side", "grid"),
    [(64, 224, 12), (128, 112, 8), (256, 56, 6), (512, 14, 4), (32, 8, 8), (64, 3, 3), (20_000, 4, 1)],
)
def test_elsewhere_the_grid_is_the_root_of_ten_thousand_over_the_channels(channels, side, grid):
    shape = jax.ShapeDtypeStruct((1, side, side, channels), np.float32)
    assert jax.eval_shape(lambda x: probe.pool("conv1", x), shape).shape == (1, grid * grid * channels)


def test_cells_are_means_of_the_map():
    x = np.random.default_rng(0).random((2, 7, 7, 600), np.float32)  # 4 x 4 cells of rows 0-1, 1-3, 3-5, 5-6
    got = np.asarray(probe.pool("conv2", jnp.asarray(x))).reshape(2, 4, 4, 600)
    np.testing.assert_allclose(got[:, 1, 3], x[:, 1:4, 5:7].mean(axis=(1, 2)), atol=1e-6)


def test_the_rate_falls_with_the_decay_over_all_steps():
    assert float(probe.schedule(0.01, 1e-4)(450_450)) == pytest.approx(0.0083, abs=5e-6)
    assert float(probe.schedule(0.01, 1e-7)(450_450)) / 0.01 == pytest.approx(0.9998, abs=1e-4)
    assert float(probe.schedule(0.01, 1e-4)(0)) == pytest.approx(0.01)


def test_the_optimiser_is_pytorchs_sgd_step_by_step():
    settings = smaller_config().evaluate.linear
    settings.lr, settings.wd = 0.5, -2.0
    rule = probe.optimizer(settings)
    w, v, rng = np.array([1.0, -2.0]), np.zeros(2), np.random.default_rng(0)
    weights, state = jnp.asarray(w), rule.init(jnp.asarray(w))
    for t in range(4):
        g = rng.standard_normal(2)
        v = 0.9 * v + g + 0.01 * w
        w = w - 0.5 / np.sqrt(1 + 0.5 * 0.01 * t) * v
        changes, state = rule.update(jnp.asarray(g), state, weights)
        weights = weights + changes
        np.testing.assert_allclose(weights, w, rtol=1e-6)


def test_a_new_classifier_is_uniform_within_the_root_of_its_inputs():
    head = probe.new_head(jax.random.key(0), 400, 50)
    limit = 1 / 20
    for leaf in head.values():
        assert np.abs(leaf).max() <= limit and np.std(leaf) == pytest.approx(limit / np.sqrt(3), rel=0.2)
    assert np.abs(head["kernel"]).max() > 0.99 * limit


def slow_ten(images, side):
    r = images.shape[1]
    crops = []
    for mirror in (False, True):
        for top, left in [(0, 0), (0, r - side), (r - side, 0), (r - side, r - side), ((r - side) // 2,) * 2]:
            crop = images[:, top : top + side, left : left + side]
            crops.append(crop[:, :, ::-1] if mirror else crop)
    return np.stack(crops)


def toy_probe(crop_side):
    def embed(params, extra, images, layers=()):
        flat = images.reshape(len(images), -1).astype(jnp.float32) / 255
        found = {"pixels": flat, "feature": flat[:, ::2]}
        return {name: found[name] for name in layers}

    return probe.Probe(embed, {"pixels": crop_side**2 or 64, "feature": crop_side**2 // 2 or 32}, 3, crop_side)


def heads(p):
    return {"heads": {n: probe.new_head(jax.random.key(i), w, 3) for i, (n, w) in enumerate(p.widths.items())}}


def test_ten_crops_average_probabilities_and_keep_the_centre():
    images = np.random.default_rng(0).integers(256, size=(5, 9, 9, 1), dtype=np.uint8)
    np.testing.assert_array_equal(ten_crops(jnp.asarray(images), 6), slow_ten(images, 6))
    p = toy_probe(6)
    params = heads(p)
    got = probe.log_probabilities(p, params, NO_PARAMS, jnp.asarray(images))
    for name, step in (("pixels", 1), ("feature", 2)):
        head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["heads"][name])
        x = slow_ten(images, 6).reshape(10, 5, -1)[:, :, ::step] / 255
        powers = np.exp(x @ head["kernel"] + head["bias"])
        probabilities = powers / powers.sum(axis=2, keepdims=True)
        np.testing.assert_allclose(np.exp(got[name]), probabilities.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(np.exp(got[f"{name}/centre"]), probabilities[4], atol=1e-6)


def test_mirrored_crops_of_a_symmetric_image_are_alike():
    half = np.random.default_rng(0).integers(256, size=(2, 8, 4, 1), dtype=np.uint8)
    crops = np.asarray(ten_crops(jnp.asarray(np.concatenate([half, half[:, :, ::-1]], axis=2)), 6))
    np.testing.assert_array_equal(crops[[0, 1, 2, 3, 4]], crops[[6, 5, 8, 7, 9]])


def test_rows_pooled_before_give_what_images_give():
    p = toy_probe(0)
    images = jnp.asarray(np.random.default_rng(0).integers(256, size=(4, 8, 8, 1), dtype=np.uint8))
    rows = probe.joined(p, {}, NO_PARAMS, images)
    assert rows.shape == (4, 96)
    from_images, from_rows = probe.vectors(p, NO_PARAMS, images), probe.vectors(p, NO_PARAMS, rows)
    jax.tree.map(np.testing.assert_array_equal, from_images, from_rows)
    crops = p._replace(crop_side=8)  # of rows there are none
    assert probe.log_probabilities(crops, heads(p), NO_PARAMS, rows).keys() == p.widths.keys()


def test_each_classifier_learns_as_if_it_were_alone():
    p = toy_probe(0)
    params = heads(p)
    images = jnp.asarray(np.random.default_rng(0).integers(256, size=(6, 8, 8, 1), dtype=np.uint8))
    batch = {"views": {"probe": images}, "target": jnp.arange(6) % 3, "weight": jnp.ones(6)}

    def loss(params, p):
        return probe.loss(p, params, NO_PARAMS, batch, jax.random.key(0))[0]

    both = jax.grad(loss)(params, p)
    alone = p._replace(widths={"pixels": 64})
    one = jax.grad(loss)({"heads": {"pixels": params["heads"]["pixels"]}}, alone)
    jax.tree.map(np.testing.assert_array_equal, both["heads"]["pixels"], one["heads"]["pixels"])


def wide_split(sides=(40, 52), size=35, n=4, array=True):
    """Images larger than their evaluation's crop."""
    pixels = np.random.default_rng(0).integers(256, size=(n, *sides, 3), dtype=np.uint8)
    return pixels, from_array(pixels, (size, size, 3), "image/{}".format)


def test_the_border_holds_what_evaluation_cuts_off():
    pixels, split = wide_split()  # R = 40: the short side, no interpolation
    bordered = with_border(split)
    assert bordered.image_shape == (40, 40, 3)
    images = next(exact_batches(bordered, 4))["image"]
    np.testing.assert_array_equal(images, pixels[:, :, 6:46])
    _, even = wide_split((32, 40), 28)
    middle = next(exact_batches(with_border(even), 4))["image"][:, 2:30, 2:30]
    np.testing.assert_array_equal(middle, next(exact_batches(even, 4))["image"])
    _, exact = wide_split((28, 28), 28)
    assert with_border(exact) is exact


def test_a_shifted_crop_lies_anywhere_in_the_central_square():
    pixels, split = wide_split((32, 40), 28, n=1)
    order, zeros, ones = np.zeros(64, np.int32), np.zeros(1, np.int32), np.ones(1, np.float32)
    place = {"start_position": 0, "first_step": 0, "last_step": 1, "batch_size": 64, "seed": 0, "stage_index": 0}

    def crops(shift):
        views = {"probe": {"crop_shift": shift}}
        return next(train_batches(split, views, order, zeros, ones, **place))["views"]["probe"]

    whole = pixels[0, :, 4:36].astype(float)
    places = {(y, x): whole[y : y + 28, x : x + 28] for y in range(5) for x in range(5)}

    def nearest(images):
        return np.array([min(places, key=lambda p: np.abs(places[p] - image).mean()) for image in images.astype(float)])

    anywhere, near = nearest(crops(1.0)), nearest(crops(0.4))
    assert all(set(axis) == {0, 1, 2, 3, 4} for axis in anywhere.T) and set(near.ravel()) == {1, 2, 3}
    np.testing.assert_array_equal(crops(0.0)[0], whole[2:30, 2:30])


def test_a_subset_is_the_images_it_names():
    source = few_digits(50)
    whole = source.splits["train"]
    part = subset(whole, np.array([7, 3, 40]))
    assert (part.size, part.path(2)) == (3, whole.path(40))
    np.testing.assert_array_equal(part.labels, whole.labels[[7, 3, 40]])
    np.testing.assert_array_equal(next(exact_batches(part, 3))["image"], whole.images[[7, 3, 40]])
    lazy = replace(part, gather=None, images=None)
    np.testing.assert_array_equal(next(exact_batches(lazy, 3))["image"], whole.images[[7, 3, 40]])


def test_what_is_held_out_is_a_fifth_of_each_class():
    labels = np.r_[np.repeat([0, 1, 2, 3], [50, 20, 2, 1]), -1]
    held = hold_out(labels, 0.2, (0,))
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 4, 1, 0]
    assert (held != hold_out(labels, 0.2, (1,))).any()


def test_layers_are_listed_in_their_order():
    config = smaller_config(model__name="vgg16", model__width=4)
    names = models.map_names(models.get(config), (32, 32, 1))
    assert names == tuple(f"conv{i}" for i in range(1, 14))


def linear_config(**overrides):
    settings = {"evaluate__suite": "linear", "evaluate__linear__epochs": 3, "evaluate__linear__lr": 0.1}
    return smaller_config(**{"rounds": 2, "refresh_every": "3 steps", "eval_batch_size": 64, **settings, **overrides})


def test_layers_and_batches_that_do_not_fit_are_refused_before_work(tmp_path):
    stage = prepared(linear_config(evaluate__linear__layers="conv1, cnv2"), tmp_path, few_digits())
    with pytest.raises(ConfigError, match=r"layers='conv1, cnv2': there is no layer 'cnv2'; did you mean 'conv2'\?"):
        probes.check(stage)
    eight = linear_config(evaluate__linear__batch_size=12)
    eight.runtime.devices, eight.batch_size = 8, 128
    with pytest.raises(ConfigError, match="linear.batch_size=12 must divide by 8 devices"):
        probes.check(prepared(eight, tmp_path / "b", few_digits()))


def probed(config, workdir, source=None):
    """The curves of the probes of a trained network."""
    source = source or few_digits()
    stage = prepared(config, workdir, source)
    state = trained_on(config, workdir, source).state
    before = jax.tree.map(np.asarray, jax.device_get((state.params, state.extra)))
    curves = probes.train(stage, state, source.splits["train"], source.splits.get("test"), 10)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.extra)))
    return curves


@pytest.mark.wide
def test_probes_are_trained_kept_and_read_again(tmp_path, capsys):
    config = linear_config()
    curves = probed(config, tmp_path)
    assert list(curves) == ["conv1", "conv2", "feature"]
    assert all(len(epochs) == 3 for epochs in curves.values())
    assert curves["conv1"][-1]["loss"] < curves["conv1"][0]["loss"] < np.log(10)
    folder = tmp_path / "probes"
    for name, epochs in curves.items():
        head = safetensors.load_file(folder / f"{name}.safetensors")
        assert head["params.kernel"].shape[1] == 10 and head["params.bias"].shape == (10,)
        with safetensors_file(folder / f"{name}-best.safetensors") as file:
            origin = json.loads(file.metadata()["jaxclust"])
        assert float(origin["top1"]) == max(epoch["top1"] for epoch in epochs)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test/conv2/top5"]) for row in rows] == [epoch["top5"] for epoch in curves["conv2"]]
    assert not (folder / "features").exists()
    capsys.readouterr()
    assert probed(config, tmp_path) == curves and "finished before" in capsys.readouterr().out
    config.evaluate.linear.epochs = 1
    again = probed(config, tmp_path)
    assert {name: epochs[0] for name, epochs in curves.items()} == {name: epochs[0] for name, epochs in again.items()}
    assert len(again["conv1"]) == 1


def safetensors_file(path):
    from safetensors import safe_open

    return safe_open(path, "numpy")


@pytest.mark.slow
def test_kept_layers_and_layers_made_anew_train_the_same_probes(tmp_path):
    config = linear_config(evaluate__linear__layers="conv2,feature")
    kept = probed(config, tmp_path / "a")
    config.evaluate.linear.cache_bytes = 0
    anew = probed(config, tmp_path / "b")
    for name in kept:
        for a, b in zip(kept[name], anew[name], strict=True):
            assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
def test_augmented_probes_with_ten_crops_stop_and_go_on(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(90, 16, 16, 1), dtype=np.uint8)
    pixels[np.arange(90) % 10 == 3, 4:12, 4:12] = 255
    labels = np.arange(90, dtype=np.int32) % 10
    split = replace(from_array(pixels, (14, 14, 1), "image/{}".format), labels=labels)
    source = few_digits()._replace(splits={"train": split, "test": split})
    settings = {"ten_crops": True, "crop_shift": 1.0, "flip": 0.5, "batch_size": 32, "layers": "conv1", "epochs": 4}
    config = linear_config(**{f"evaluate__linear__{name}": value for name, value in settings.items()})
    curves = probed(config, tmp_path / "a", source)
    asked = iter([False] * 5 + [True] * 99)
    with monkeypatch.context() as patch:
        patch.setattr("jaxclust.runtime.StopSignal.asked", lambda self: next(asked, False))
        patch.setattr("small.trained", trained_on)
        stage = prepared(config, tmp_path / "b", source)
        state = jax.tree.map(jnp.copy, stage.first().state)
        with pytest.raises(Stopped):
            probes.train(stage, state, split, split, 10)
    first = probes.train(stage, state, split, split, 10)
    whole = probes.train(stage._replace(workdir=tmp_path / "c"), state, split, split, 10)
    assert first == whole and len(first["conv1"]) == 4
    assert curves["conv1"][-1]["top1"] > 0.1


@pytest.mark.slow
def test_a_trained_network_is_better_than_random_weights_from_end_to_end(tmp_path):
    arguments = ["--config.evaluate.suite=linear,knn,retrieval,kmeans,lowlabel,clustering"]
    arguments += ["--config.evaluate.linear.epochs=15", "--config.evaluate.linear.lr=0.1"]
    supervised = ["--config=configs/supervised.py:smoke", "--config.refresh_every=1 epoch", "--config.rounds=6"]
    assert run(*supervised, f"--workdir={tmp_path / 'a'}", *arguments) == 0
    assert run(*supervised, f"--workdir={tmp_path / 'b'}", *arguments, "--config.optimizer.body.lr=0.0") == 0
    trained, fixed = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    for key in ("linear/feature/top1", "linear/conv3/top1", "knn/top1", "retrieval/map@r", "kmeans/nmi"):
        assert trained[key] > fixed[key] + 0.01, key
    assert trained["linear/feature/top1_best"] >= trained["linear/feature/top1"] > 0.9
    assert {"lowlabel/1pct/top1", "lowlabel/10pct/top1", "retrieval/r@8", "knn/top5", "kmeans/acc"} <= trained.keys()
    assert run("--job=evaluate", f"--workdir={tmp_path / 'a'}") == 0
    again = json.loads((tmp_path / "a" / "results.json").read_text())
    assert again == pytest.approx(trained)


def feature_file(path, n=240, **changes):
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 4
    rows = (3 * np.eye(4, 6)[labels] + rng.standard_normal((n, 6))).astype(np.float32)
    np.savez(path, **{"features": rows, "labels": labels} | changes)
    return f"--config.data.source=features:{path}"


SUITE = "--config.evaluate.suite=linear,knn,retrieval,kmeans,lowlabel,clustering"


@pytest.mark.wide
def test_a_file_of_features_needs_no_training(tmp_path):
    file, workdir = feature_file(tmp_path / "rows.npz"), tmp_path / "run"
    arguments = ["--job=evaluate", f"--workdir={workdir}", file, SUITE, "--config.cluster.k=4"]
    arguments += ["--config.evaluate.linear.epochs=20", "--config.evaluate.linear.lr=0.1"]
    assert run(*arguments) == 0
    results = json.loads((workdir / "results.json").read_text())
    for key in ("linear/feature/top1", "knn/top1", "retrieval/r@1", "kmeans/acc", "lowlabel/10pct/top1", "train/acc"):
        assert 0.75 < results[key] <= 1, key
    assert results["retrieval/map@r"] > 0.4 and not any(key.startswith("linear/conv") for key in results)
    assert run("--job=evaluate", f"--workdir={workdir}") == 0
    assert json.loads((workdir / "results.json").read_text()) == pytest.approx(results)
    feature_file(tmp_path / "rows.npz", features=np.random.default_rng(0).standard_normal((240, 6)).astype(np.float32))
    assert run(*arguments) == 0  # nothing of the vectors before is left
    results = json.loads((workdir / "results.json").read_text())
    assert max(results[key] for key in ("linear/feature/top1", "knn/top1", "kmeans/acc", "train/acc")) < 0.5


def test_bad_files_of_features_are_refused_before_work(tmp_path, capsys):
    workdir = tmp_path / "run"

    def refused(file, *arguments):
        code = run("--job=evaluate", f"--workdir={workdir}", file, *arguments)
        assert not workdir.exists()
        return code, capsys.readouterr().err

    rows = np.ones((240, 6), np.float32)
    rows[17, 2] = np.nan
    code, said = refused(feature_file(tmp_path / "a.npz", features=rows), SUITE)
    assert code == 3 and "row 17 of features holds NaN" in said
    code, said = refused(feature_file(tmp_path / "b.npz", labels=np.arange(239) % 4), SUITE)
    assert code == 3 and "labels are int64 (239,); they must be 240 integers" in said
    np.save(tmp_path / "c.npy", np.ones((50, 3), np.float32))
    code, said = refused(f"--config.data.source=features:{tmp_path / 'c.npy'}", SUITE)
    assert code == 2 and "asks for linear, knn, retrieval, kmeans, lowlabel, which compare with" in said
    code, said = refused(feature_file(tmp_path / "d.npz"), SUITE, "--config.evaluate.linear.layers=conv1")
    assert code == 2 and "there is no layer 'conv1'" in said and "There is: feature" in said


@pytest.mark.wide
def test_labels_and_layers_are_asked_about_before_a_training_begins(tmp_path, capsys):
    assert smoke(tmp_path / "a", "--config.evaluate.suite=linear", "--config.evaluate.linear.layers=conv9") == 2
    assert "There is: conv1, conv2, feature" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert run("--job=evaluate", f"--workdir={tmp_path / 'a'}") == 2
    assert smoke(tmp_path / "b", "--config.rounds=1", "--config.refresh_every=3 steps") == 0
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    saved["model"]["width"] = 4
    (tmp_path / "b" / "config.json").write_text(json.dumps(saved))
    capsys.readouterr()
    assert run("--job=evaluate", f"--workdir={tmp_path / 'b'}") == 2
    said = capsys.readouterr().err
    assert "this config makes" in said and "made by another model or method" in said


@pytest.mark.wide
def test_a_rate_that_is_too_high_is_named(tmp_path):
    with pytest.raises(NonFiniteError, match=r"the loss of step \d+ is not finite.*evaluate.linear.lr=1e\+30"):
        probed(linear_config(evaluate__linear__lr=1e30, evaluate__linear__layers="conv1"), tmp_path)


@pytest.mark.slow
def test_two_hosts_compare_as_one_does(tmp_path):
    file = feature_file(tmp_path / "rows.npz", n=203)
    arguments = ["--job=evaluate", file, SUITE, "--config.cluster.k=4", "--config.cluster.backend=jax"]
    arguments += ["--config.evaluate.linear.epochs=4", "--config.evaluate.linear.lr=0.1"]
    results = []
    for count in (1, 2):
        with host_runs.jaxclust(
            *arguments, f"--workdir={tmp_path / str(count)}", count=count, devices=2 // count
        ) as all:
            host_runs.all_well(all)
        results.append(json.loads((tmp_path / str(count) / "results.json").read_text()))
    one, two = results
    assert one.keys() == two.keys()
    different = {name for name in one if one[name] != pytest.approx(two[name], abs=1e-4)}
    assert different <= {"seconds"}


def test_a_layer_that_was_learnt_worse_than_by_guessing_is_named(tmp_path, caplog):
    losses = [{"pixels": 99.0, "feature": 9.0}, {"pixels": 1.0, "feature": 1.2}]  # of two epochs
    lines = [{f"train/{name}/loss": loss for name, loss in of_epoch.items()} for of_epoch in losses]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    probes.warn_of_divergence(tmp_path, toy_probe(0), 0.01)
    assert "of feature ended with a loss of 1.2, and guessing has 1.1: config.evaluate.linear.lr=0.01" in caplog.text
    assert "pixels" not in caplog.text


def test_a_class_of_one_image_alone_cannot_be_held_out():
    source = few_digits(20)
    split = replace(source.splits["train"], labels=np.arange(20, dtype=np.int32))
    with pytest.raises(DataError, match="no class has two training images"):
        probes.divided(split, 0)


@pytest.mark.medium
def test_evaluations_with_labels_never_reach_a_training_round(tmp_path):
    config = linear_config(evaluate__suite="clustering,knn,linear", model__blocks=1)
    source = few_digits(150)
    shuffled = replace(source.splits["train"], labels=np.roll(source.splits["train"].labels, 7))
    one = trained_on(config, tmp_path / "a", source)
    other = trained_on(config, tmp_path / "b", source._replace(splits={"train": shuffled}))
    jax.tree.map(np.testing.assert_array_equal, one.state.params, other.state.params)
    assert not (tmp_path / "a" / "probes").exists() and not evaluate.is_bare(config)
