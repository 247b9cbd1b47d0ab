"""Pictures of an experiment: files of scores that are read or skipped, the mathematics against slow doubles, and every
picture of a small sweep.
"""

import csv
import json
import re
import shutil
import tempfile
from functools import partial
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small import few_digits, prepared, run, small_config, with_settings
from test_report import Page

from jaxclust import config as config_lib
from jaxclust import pictures
from jaxclust.errors import ConfigError, DataError
from jaxclust.features import score_file
from jaxclust.features.score_file import Scores
from jaxclust.jobs import report as report_job
from jaxclust.kinds import spans
from jaxclust.methods import cae, mixture
from jaxclust.pictures import (
    Seen,
    _experts,
    accuracy,
    certainty,
    confusion,
    failures,
    map_variance,
    reconstructions,
    sparsity,
    tsne,
    weights,
)
from jaxclust.report import experiment, figures
from jaxclust.report.experiment import Net
from jaxclust.report.gallery import Gallery
from jaxclust.train.checkpoint import Checkpoints


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """They are drawn sooner."""
    monkeypatch.setattr(figures, "DPI", 48)


def some_scores(size=40, k=5, seed=0, classes=10):
    """Scores of images of which the first half of the classes is P."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(size) % classes)
    p = rng.uniform(0.01, 0.99, size)
    gate = rng.dirichlet(np.ones(k), size)
    return Scores(label, (label < classes // 2).astype(int), np.log(np.stack([1 - p, p], axis=1)), gate, None)


def written(folder, epoch, scores, suffix=""):
    """A file of scores/ in a workdir."""
    path = score_file.path_of(folder, epoch, suffix == "_train")
    score_file.write(path, scores)
    return path


def of_clustnet(**overrides):
    own = {"method": "clustnet", "stages": "clustnet", "groups": "0-4,5-9", "cluster__k": 5}
    return with_settings(small_config(), **own | overrides)


def net_in(folder, number=1, values=None, **overrides):
    return Net(number, values or {}, folder, of_clustnet(**overrides))


# Files.


@pytest.mark.parametrize("with_id", [False, True])
def test_scores_are_read_as_they_were_written(tmp_path, with_id):
    there = some_scores()._replace(id=np.arange(40)[::-1] if with_id else None)
    found = score_file.read(written(tmp_path, 3, there))
    for name in ("label", "group", "log_probs", "gate"):
        np.testing.assert_allclose(getattr(found, name), getattr(there, name), rtol=1e-8)
    assert (found.id is None) == (not with_id) and (not with_id or found.id.tolist() == there.id.tolist())


with tempfile.TemporaryDirectory() as folder:
    WHOLE = written(Path(folder), 1, some_scores(20)).read_text()
    FOUR = written(Path(folder), 1, some_scores(20, k=4)).read_text()
    OTHERS = written(Path(folder), 1, some_scores(20)._replace(group=np.arange(20) % 2)).read_text()
    CLASSES = written(Path(folder), 1, some_scores(20, classes=20)).read_text()
DAMAGE = {
    "cut in a line": (WHOLE[:-9], "ends in the middle of a line"),
    "cut between lines": (WHOLE[: WHOLE.rindex("\n", 0, -1) + 1], "has 19 rows, where the other epochs have 20"),
    "empty": ("", "begins with '', not with #origTarg"),
    "nothing but the first line": (WHOLE[: WHOLE.index("\n") + 1], "has no row"),
    "another file": ("id,path,cluster\n1,a,2\n", "begins with 'id,path,cluster', not with #origTarg"),
    "a column too few": (WHOLE.replace("clust[5]", "clust[6]"), "has 9 columns where its first line says 10"),
    "a short line": (WHOLE.replace("\n", "\n1,1\n", 2).replace("\n1,1\n", "\n", 1), "has 21 rows"),
    "words": (WHOLE.replace("-", "minus", 1), "is damaged: .*minus"),
    "no number": (WHOLE.replace("-0.", "nan", 1).replace("-1.", "nan", 1).replace("-2.", "nan", 1), "is damaged"),
    "a number changed": (WHOLE.rpartition(",")[0] + ",0.95\n", "is damaged: line 21 needs"),
    "bytes": (None, "cannot be read"),
    "of another number of experts": (FOUR, "is of 4 experts, the run has 5$"),
    "of other groups": (OTHERS, "contradicts the run: line [23] has class . in group ., which config.groups='0-4,5-9'"),
    "of other classes": (CLASSES, "contradicts the run: line .* has class 1. in group 0"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_skipped_and_named_and_the_others_are_read(tmp_path, name):
    text, words = DAMAGE[name]
    for epoch in (0, 2, 3, 10):
        written(tmp_path / "net7", epoch, some_scores(20, seed=epoch))
    path = tmp_path / "net7" / "scores" / "epoch2.csv"
    path.write_bytes(b"\xff\xfe\x00" if text is None else text.encode())
    found, (skipped,) = experiment.of_epochs(net_in(tmp_path / "net7"), lambda _, scores: len(scores.label))
    assert found == {0: 20, 3: 20, 10: 20}
    assert re.search(rf"^net7/scores/epoch2.csv: ({words})", skipped), skipped


def test_a_file_that_was_cut_between_lines_is_known_by_the_images_of_the_run(tmp_path):
    """Also if it is the only one, or as many files are cut as are whole."""
    net, size = net_in(tmp_path / "net7"), lambda _, scores: len(scores.label)
    for epoch, rows in ((1, 30), (2, 20)):
        written(net.workdir, epoch, some_scores(rows))
    (net.workdir / "data.json").write_text('{"size": 20}')
    for splits, images in ((["train", "test"], 20), (["train"], 20)):
        lines = [f"{name},{i},{name}{i}.png\n" for name in splits for i in range(images if name == "test" else 50)]
        (net.workdir / "images.csv").write_text("split,id,path\n" + "".join(lines))
        found, (skipped,) = experiment.of_epochs(net, size)
        assert found == {2: 20}
        assert re.fullmatch(
            "net7/.*/epoch1.csv: has 30 rows, where images.csv and .* of the run have 20 images", skipped
        )
    for path in ("scores/epoch2.csv", "data.json"):
        (net.workdir / path).unlink()
    assert experiment.of_epochs(net, size)[0] == {1: 30}  # nothing says how many there are


def test_where_no_file_can_be_read_all_are_named(tmp_path):
    with pytest.raises(DataError, match="scores has no epoch1.csv and the like; a training of a mixture"):
        experiment.of_epochs(net_in(tmp_path), len)
    written(tmp_path, 1, some_scores()).write_text("torn")
    with pytest.raises(DataError, match="no file of scores can be used; .*/scores/epoch1.csv: begins with 'torn'"):
        experiment.of_epochs(net_in(tmp_path), len)
    with pytest.raises(DataError, match="has no epoch1_train.csv and the like"):
        experiment.of_epochs(net_in(tmp_path, report__split="train"), len)


def test_epochs_and_splits_are_those_that_are_asked_for(tmp_path):
    for epoch in (0, 1, 2, 10, 11):
        written(tmp_path, epoch, some_scores(30))
        written(tmp_path, epoch, some_scores(32), "_train")
    (tmp_path / "scores" / "epochs.csv").write_text("")
    size = lambda _, scores: len(scores.label)  # noqa: E731
    assert list(experiment.of_epochs(net_in(tmp_path), size)[0].items()) == [(e, 30) for e in (0, 1, 2, 10, 11)]
    assert experiment.of_epochs(net_in(tmp_path), size, last=True)[0] == {11: 30}
    assert list(experiment.of_epochs(net_in(tmp_path, report__epochs="1-10,50"), size)[0]) == [1, 2, 10]
    assert experiment.of_epochs(net_in(tmp_path, report__split="train"), size, last=True)[0] == {11: 32}
    with pytest.raises(DataError, match="config.report.epochs='5-9': there is: 0-2,10-11"):
        experiment.of_epochs(net_in(tmp_path, report__epochs="5-9"), size)


def test_whole_numbers_and_spans_are_read_and_anything_else_is_refused():
    assert [*spans(" 1-3, 7")] == [range(1, 4), range(7, 8)] and spans("") == ()
    for text in ("3-1", "a", "-1", "1-", "1.5", "1--3"):
        with pytest.raises(ConfigError, match="is no whole number or span of them"):
            spans(text)
        with pytest.raises(ConfigError, match="report.nets=.* must be whole numbers and spans of them such as '1-4,7'"):
            of_clustnet(report__nets=text)


def experiment_of(tmp_path, values, begun=None):
    """A sweep's workdir with nets of these values of the learning rate, of which `begun` have a config."""
    for number in range(1, len(values) + 1):
        if begun is None or number in begun:
            folder = tmp_path / f"net{number}"
            folder.mkdir(parents=True)
            config_lib.save(of_clustnet(seed=number), folder / "config.json")
    runs = [{"clustnet.lr": value} for value in values]
    (tmp_path / "sweep.json").write_text(json.dumps({"fields": ["clustnet.lr"], "runs": runs}))
    return tmp_path


def test_nets_are_found_by_their_number_and_ordered_by_what_was_swept(tmp_path):
    folder = experiment_of(tmp_path, [0.1 * (13 - i) for i in range(12)], begun=set(range(1, 13)) - {4})
    nets = experiment.read(folder, of_clustnet())
    assert [net.number for net in nets] == [1, 2, 3, *range(5, 13)]
    assert [net.config.seed for net in nets] == [net.number for net in nets]
    assert [net.workdir.name for net in nets][-3:] == ["net10", "net11", "net12"]
    assert [net.number for net in experiment.by_field(nets)] == [*range(12, 4, -1), 3, 2, 1]
    words = [net._replace(values={"clustnet.lr": "ab"[net.number % 2]}) for net in nets[::-1]]
    assert [net.number for net in experiment.by_field(words)] == [net.number for net in nets]
    assert nets[0].legend == "1: lr=1.3" and nets[0].name == "net 1"
    asked = of_clustnet(report__nets="2-3,9-10", report__without_nets="3")
    assert [net.number for net in experiment.chosen(nets, asked)] == [2, 9, 10]
    with pytest.raises(ConfigError, match="config.report.nets='2,13': there is no net 13; there is: 1-3,5-12"):
        experiment.chosen(nets, of_clustnet(report__nets="2,13"))
    with pytest.raises(
        ConfigError, match="config.report.nets='2' without .*without_nets='1-3' leaves no net of 1-3,5-12"
    ):
        experiment.chosen(nets, of_clustnet(report__nets="2", report__without_nets="1-3"))


def test_a_single_run_is_an_experiment_of_one_net(tmp_path):
    (net,) = experiment.read(tmp_path, of_clustnet())
    assert (net.number, net.values, net.workdir, net.legend) == (1, {}, tmp_path, "net 1")
    with pytest.raises(ConfigError, match="there is no net 2; there is: 1"):
        experiment.chosen([net], of_clustnet(report__nets="2"))


@pytest.mark.parametrize("text", ['{"seed": 2, "mod', "", "[1]", "\0\0\0"])
def test_a_net_with_a_torn_config_alone_is_left_out_and_named(tmp_path, capsys, text):
    folder = experiment_of(tmp_path, [0.1, 0.2, 0.3])
    (folder / "net2" / "config.json").write_text(text)
    assert [net.number for net in experiment.read(folder, of_clustnet())] == [1, 3]
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(f"left out: net 2: {folder}/net2/config.json is damaged, such as by a copy that was cut off")


@pytest.mark.parametrize(
    "text", ['{"fields": ["clus', "[]", "{}", '{"fields": ["seed"], "runs": [{}]}', '{"fields": 3}']
)
def test_a_torn_list_of_nets_is_named_with_what_to_do(tmp_path, text):
    folder = experiment_of(tmp_path, [0.1, 0.2])
    (folder / "sweep.json").write_text(text)
    with pytest.raises(DataError, match=r"sweep.json is damaged.* Restore it .* --workdir=.*/net1 is of one") as error:
        experiment.read(folder, of_clustnet())
    assert '{"fields": [names of what is swept], "runs": [of net1, net2' in str(error.value)


TORN = {
    "in a line": lambda text: text[:-5],
    "between columns": lambda text: text[: text.rindex(",")] + "\n",
    "to nothing": lambda text: "",
    "to words": lambda text: text.replace("0.5", "half"),
    "to another file": lambda text: "id,path\n1,a\n",
}


@pytest.mark.parametrize("name", TORN)
def test_a_net_whose_zeros_cannot_be_read_is_skipped_and_named(tmp_path, name):
    folder = experiment_of(tmp_path, [0.1, 0.2, 0.3, 0.4])
    nets = experiment.read(folder, of_clustnet())
    for net in nets[:3]:
        path = net.workdir / "pictures" / "sparsity" / "sparsity.csv"
        path.parent.mkdir(parents=True)
        sparsity.write(path, {epoch: {"input": {"all": 0.5, "chosen": 0.25}} for epoch in (0, 2)})
    assert sparsity.read_back(path) == {epoch: {"input": {"all": 0.5, "chosen": 0.25}} for epoch in (0, 2)}
    torn = nets[1].workdir / "pictures" / "sparsity" / "sparsity.csv"
    torn.write_text(TORN[name](torn.read_text()))
    draw = sparsity.compare(nets)
    assert [net.number for net in draw.args[0]] == [1, 3]
    (tmp_path / "drawn").mkdir()
    (said,) = draw(tmp_path / "drawn").skipped
    assert re.fullmatch(f"net 2: {torn} is damaged: .*; --job=report --config.report.pictures=sparsity .*", said)
    with pytest.raises(DataError, match="no run of the sweep has it; net 2: .*sparsity.csv is damaged"):
        sparsity.compare([nets[1], nets[3]])


# Mathematics.


def test_total_variation_adds_up_what_an_accuracy_moves():
    assert experiment.total_variation([0, 1, 0]) == 2
    assert experiment.total_variation([0.5]) == experiment.total_variation([0.3, 0.3]) == 0
    epochs = {10: {"acc_p": 0.5}, 2: {"acc_p": 1.0}, 3: {"binary": 0.0}, 1: {"acc_p": 0.25}}
    assert accuracy.series(epochs, "acc_p") == ([1, 2, 10], [0.25, 1.0, 0.5])
    assert accuracy.variation(epochs, "acc_p") == 1.25 and accuracy.variation(epochs, "acc_n") == 0
    assert accuracy.variation(epochs | {0: {"acc_p": 0.9}}, "acc_p") == 1.25  # which files of train do not have


@pytest.mark.parametrize("k", [2, 3, 5, 7])
def test_accuracies_of_a_file_are_those_of_the_best_pairing_of_all(k):
    scores = some_scores(k=k, classes=6)
    config = with_settings(of_clustnet(), groups="0-2,3-5")
    found = experiment.measured(config, scores)
    for name, classes in (("acc_p", [0, 1, 2]), ("acc_n", [3, 4, 5])):
        places = [*range(k), *[-1] * 3]
        best = max(
            sum(sum((scores.expert == e) & (scores.label == c)) for e, c in zip(experts, classes, strict=True))
            for experts in set(permutations(places, 3))
        )
        assert found[name] == pytest.approx(best / np.isin(scores.label, classes).sum())
    right = [int(b > a) == int(label < 3) for (a, b), label in zip(scores.log_probs, scores.label, strict=True)]
    assert found["binary"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("k", [3, 5, 8])
def test_a_matrix_has_the_best_pairing_on_its_diagonal_and_columns_that_add_up_to_one(k):
    scores = some_scores(k=k)
    of = confusion.matrix(scores, [5, 6, 7, 8, 9])
    assert sorted(of.experts) == list(range(k)) and sorted(of.classes) == [5, 6, 7, 8, 9]
    assert k < 5 or of.classes == [5, 6, 7, 8, 9]
    for row, expert in enumerate(of.experts):
        for column, label in enumerate(of.classes):
            assert of.counts[row, column] == sum((scores.expert == expert) & (scores.label == label))
    np.testing.assert_allclose(of.shares.sum(axis=0), 1)
    n = experiment.measured(of_clustnet(), scores)["acc_n"]
    assert np.trace(of.counts) / of.counts.sum() == pytest.approx(n)
    without = confusion.matrix(scores._replace(label=scores.label % 8), [7, 8, 9])
    np.testing.assert_array_equal(without.shares.sum(axis=0), [1, 0, 0])


def test_experts_that_stand_for_no_class_come_last():
    label = np.array([0, 0, 1, 1, 1, 2])
    gate = np.eye(4)[[3, 3, 1, 1, 3, 1]]
    of = confusion.matrix(Scores(label, label, np.zeros((6, 2)), gate, None), [0, 1, 2])
    assert of.experts == [3, 1, 0, 2] and of.counts.tolist() == [[2, 1, 0], [0, 2, 1], [0, 0, 0], [0, 0, 0]]


COLLAPSED = {  # K, images by (expert, class), the experts of the rows, the classes of the columns
    # None stands for class 1, so its place goes to expert 0, which stands for no class.
    "a class without an expert": (5, {(4, 0): 5, (4, 1): 3, (1, 2): 4, (2, 3): 2}, [4, 0, 1, 2, 3], [0, 1, 2, 3]),
    "all with one expert": (4, {(2, 0): 1, (2, 1): 3, (2, 2): 2, (2, 3): 1}, [0, 2, 1, 3], [0, 1, 2, 3]),
    "fewer experts than classes": (2, {(1, 1): 4, (1, 0): 1, (0, 3): 3, (0, 2): 1}, [1, 0], [1, 3, 0, 2]),
    "fewer, and one of them unused": (3, {(2, 1): 4, (2, 0): 1, (0, 3): 3, (0, 2): 1}, [2, 0, 1], [1, 3, 0, 2]),
}


@pytest.mark.parametrize("name", COLLAPSED)
def test_pairs_are_on_the_diagonal_where_others_are_alone(name):
    k, images, experts, classes = COLLAPSED[name]
    expert, label = np.repeat(list(images), list(images.values()), axis=0).T
    scores = Scores(label, label, np.zeros((len(label), 2)), np.eye(k)[expert], None)
    of = confusion.matrix(scores, [0, 1, 2, 3])
    assert (of.experts, of.classes) == (experts, classes)
    assert of.counts.tolist() == [[images.get((e, c), 0) for c in classes] for e in experts]
    whole = confusion.beside(confusion.matrix(scores, [3, 2]), confusion.matrix(scores, [0, 1]))
    assert sorted(whole.classes) == [0, 1, 2, 3] and set(whole.classes[:2]) == {2, 3}
    assert whole.counts.tolist() == [[images.get((e, c), 0) for c in whole.classes] for e in whole.experts]
    np.testing.assert_allclose(whole.shares.sum(axis=0), np.isin(whole.classes, label))


@given(st.integers(1, 30), st.integers(2, 7), st.integers(0, 1000))
@settings(max_examples=30)
def test_bars_of_certainty_add_up_to_one_and_fall(size, k, seed):
    gate = np.random.default_rng(seed).dirichlet(np.full(k, 0.3), size)
    found = certainty.ranked(gate)
    expected = [sum(sorted(row, reverse=True)[rank] for row in gate.tolist()) / size for rank in range(k)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.sum() == pytest.approx(1) and (np.diff(found) <= 1e-12).all()


def test_a_gate_that_is_sure_has_one_bar_and_one_that_knows_nothing_equal_ones():
    assert certainty.ranked(np.eye(5)[[0, 3, 3, 4]]).tolist() == [1, 0, 0, 0, 0]
    np.testing.assert_allclose(certainty.ranked(np.full((3, 4), 0.25)), 0.25)


def tree(rng):
    return {
        "gate": {"hidden1": {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}},
        "experts": {"stack": {"conv1_norm": {"scale": np.ones(2), "bias": np.zeros(2)}}},
    }


def test_weights_move_by_their_share_of_where_they_began():
    epochs = [tree(np.random.default_rng(seed)) for seed in range(3)]
    epochs[2]["experts"]["stack"]["conv1_norm"] = {"scale": np.array([1.0, 2.5]), "bias": np.array([0.0, 2.0])}
    found = weights.distances(map(weights.layers, epochs), False)
    elementwise = weights.distances(map(weights.layers, epochs), True)
    assert set(found) == {("gate", "hidden1"), ("experts", "stack/conv1_norm")}
    flat = [np.concatenate([e["gate"]["hidden1"]["bias"], e["gate"]["hidden1"]["kernel"].ravel()]) for e in epochs]
    for t in (1, 2):
        square = sum((a - b) ** 2 for a, b in zip(flat[t], flat[t - 1], strict=True))
        first = sum(w * w for w in flat[0])
        assert found["gate", "hidden1"][t - 1] == pytest.approx((square / first) ** 0.5)
        shares = sum(((a - b) / c) ** 2 for a, b, c in zip(flat[t], flat[t - 1], flat[0], strict=True))
        assert elementwise["gate", "hidden1"][t - 1] == pytest.approx(shares**0.5)
    assert found["experts", "stack/conv1_norm"] == [0, pytest.approx(2.5 / 2**0.5)]
    assert elementwise["experts", "stack/conv1_norm"] == [0, 1.5]  # what began at 0 does not count


def test_weights_that_stay_have_not_moved_and_those_that_began_at_zero_are_no_division_by_it():
    same = weights.layers(tree(np.random.default_rng(0)))
    for elementwise in (False, True):
        assert {d for of in weights.distances([same, same, same], elementwise).values() for d in of} == {0.0}
    zero, moved = {("gate", "bias"): np.zeros(3)}, {("gate", "bias"): np.full(3, 1e-9)}
    assert weights.distances([zero, moved], False)["gate", "bias"] == [pytest.approx(3**0.5 * 0.1)]
    panel = weights.panel("gate", [1, 2], {"a": [0.0, 1.0], "b": [1.0, 4.0]})
    assert (panel.lines[0].label, panel.lines[0].y) == ("mean", [0.5, 2.5])


def experts_of(found):
    """A stand-in for what a method says of its experts."""
    return lambda params, extra, images: {name: jnp.asarray(array)[images] for name, array in found.items()}


def mixture_of(size=23, k=3, seed=0):
    rng = np.random.default_rng(seed)
    choice = np.eye(k, dtype=np.float32)[rng.integers(0, k, size)]
    maps = rng.standard_normal((size, k, 4, 4, 2)).astype(np.float32)
    maps[rng.uniform(size=maps.shape) < 0.3] = 0
    maps[0, :] = 0
    return {"choice": choice, "input": choice[:, :, None, None, None] * maps, "conv1": np.maximum(maps, 0)}


def in_batches(function, found, size=7):
    """What a program says of all images, in batches."""
    ids = np.arange(len(found["choice"]))
    parts = np.split(ids, range(size, len(ids), size))
    return [jax.device_get(function(experts_of(found))(None, None, part)) for part in parts]


def test_sparsity_is_the_mean_share_of_zeros_over_all_pairs_and_over_chosen_ones():
    there = mixture_of()
    found = sparsity.shares(in_batches(lambda experts: partial(sparsity.zeros, experts), there))
    assert list(found) == ["input", "conv1"]
    for name, of in found.items():
        every, chosen = [], []
        for i, choice in enumerate(there["choice"].argmax(axis=1)):
            shares = [np.mean([x == 0 for x in expert.ravel().tolist()]) for expert in there[name][i]]
            every += shares
            chosen.append(shares[choice])
        assert of == {"all": pytest.approx(np.mean(every)), "chosen": pytest.approx(np.mean(chosen))}
    zeros = {name: np.zeros_like(array) for name, array in there.items()}
    found = sparsity.shares(in_batches(lambda experts: partial(sparsity.zeros, experts), zeros))
    assert found["conv1"] == {"all": 1.0, "chosen": 1.0}


@pytest.mark.parametrize("stat", ["std", "var"])
@pytest.mark.parametrize("layer", ["input", "conv1"])
def test_variance_of_maps_is_that_over_the_images_of_a_group_that_an_expert_is_given(stat, layer):
    there = mixture_of(size=40)
    group = np.random.default_rng(1).integers(-1, 2, 40)
    group[:2] = 1
    batches = in_batches(lambda experts: partial(map_variance.chosen_maps, experts, layer), there)
    found = map_variance.spread(batches, group, 3, stat)
    for g in (0, 1):
        for expert in range(3):
            own = (there["choice"].argmax(axis=1) == expert) & (group == g)
            maps = [m.astype(np.float64) for m in there[layer][own, expert] if np.any(m != 0)]
            expected = getattr(np, stat)(maps, axis=0, ddof=1).mean()
            assert found[g][expert] == pytest.approx(expected, rel=1e-6)


def test_maps_that_are_all_the_same_have_no_variance_and_a_single_one_has_none_to_tell():
    same = np.broadcast_to(np.random.default_rng(0).standard_normal((4, 4)), (6, 4, 4))
    batches = [{"expert": np.array([0, 0, 1]), "map": same[:3]}, {"expert": np.array([0, 0, 0]), "map": same[3:]}]
    for stat in ("std", "var"):
        found = map_variance.spread(batches, np.array([1, 1, 1, 0, 0, 1]), 2, stat)
        assert found[1][0] == pytest.approx(0, abs=1e-12) and found[0][0] == pytest.approx(0, abs=1e-12)
        assert np.isnan(found[1][1]) and np.isnan(found[0][1])


def test_failures_are_exactly_the_images_in_the_wrong_group():
    scores = some_scores(50)
    expected = [i for i in range(50) if int(scores.log_probs[i, 1] > scores.log_probs[i, 0]) != scores.group[i]]
    assert 10 < len(expected) < 40
    found = failures.wrong(50, True, scores)
    assert found.id.tolist() == expected
    np.testing.assert_array_equal(found.scores.gate, scores.gate[expected])
    ids = np.random.default_rng(0).permutation(90)[:50]
    named = failures.wrong(90, False, scores._replace(id=ids))
    assert named.id.tolist() == ids[expected].tolist()
    unknown = failures.wrong(50, True, scores._replace(group=np.full(50, -1)))
    assert not len(unknown.id)
    for size, in_order in ((51, True), (50, False)):
        with pytest.raises(DataError, match=f"50 rows for {size} images, and no column sampleIdx"):
            failures.wrong(size, in_order, scores)
    with pytest.raises(DataError, match="names image 89 of 40|names image .* of 40"):
        failures.wrong(40, False, scores._replace(id=ids))


def test_failures_in_training_are_of_the_images_that_the_steps_of_their_epoch_had(tmp_path):
    """Of 10 steps of 4 images, 3 in an epoch, written after steps 2, 4 and 10; the last batch is filled up."""
    rng, scores = np.random.default_rng(0), some_scores(10, k=3)
    ids, gate = rng.permutation(40).astype(np.int32), rng.dirichlet(np.ones(3), 40).astype(np.float32)
    gate[12:22] = scores.gate
    folder, lengths = tmp_path / "rows" / "clustnet", SimpleNamespace(round=3)
    folder.mkdir(parents=True)
    for step, of in ((2, range(8)), (4, range(8, 16)), (10, range(16, 40))):
        np.savez(folder / f"{step}.npz", id=ids[of], gate=gate[of], groups=gate[of], position=np.array(of))
    config = of_clustnet(batch_size=4, cluster__k=3)
    seen = Seen(SimpleNamespace(workdir=tmp_path, name="clustnet", lengths=lengths, config=config), None, None)
    found = failures.named(seen, 2, scores)
    assert found.id.tolist() == ids[12:22].tolist() and found.label is scores.label
    with pytest.raises(DataError, match="clustnet says other things of its images; a training with .*index=True"):
        failures.named(seen, 1, scores)
    (folder / "10.npz").write_bytes((folder / "10.npz").read_bytes()[:-30])
    with pytest.raises(DataError, match="no column sampleIdx, and .*10.npz is damaged, .*; a training with"):
        failures.named(seen, 2, scores)
    (folder / "10.npz").unlink()
    with pytest.raises(DataError, match="has no longer what the steps 3 to 6 said of their images; a training with"):
        failures.named(seen, 2, scores)


def test_an_image_is_stretched_to_all_values_and_enlarged_without_smoothing():
    image = np.array([[[10], [20]], [[30], [50]]], np.uint8)
    found = np.asarray(failures.enlarged(image))
    assert found.shape == (300, 300)
    assert [found[0, 0], found[0, 299], found[299, 0], found[299, 299]] == [0, 64, 128, 255]
    assert (found[:150, :150] == 0).all() and (found[150:, 150:] == 255).all()
    assert np.asarray(failures.enlarged(np.full((2, 2, 1), 7, np.uint8))).max() == 0
    colour = np.asarray(failures.enlarged(np.array([[[0, 100, 200]]], np.uint8)))
    assert colour.shape == (300, 300, 3) and colour[9, 9].tolist() == [0, 128, 255]


# Pictures of files alone.


def test_accuracies_are_joined_by_net_whatever_epochs_each_has(tmp_path):
    folder = experiment_of(tmp_path, [0.1 * (12 - i) for i in range(12)])
    for number in range(1, 13):
        for epoch in range(number % 3, 4):
            written(folder / f"net{number}", epoch, some_scores(seed=100 * number + epoch))
    (folder / "net3" / "scores" / "epoch2.csv").write_text("#origTarg,targ,pred[2],clust[5]\n1,1,-0.1")
    for path in (folder / "net5" / "scores").iterdir():
        path.unlink()
    nets = experiment.read(folder, of_clustnet())
    (folder / "drawn").mkdir()
    shown = accuracy.compare(nets)(folder / "drawn")
    assert [image.file for image in shown.images] == ["accuracy.png", "variation.png"]
    assert [words.partition(": ")[0] for words in shown.skipped] == ["net 5", "net3/scores/epoch2.csv"]
    with (folder / "drawn" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    order = [12, 11, 10, 9, 8, 7, 6, 4, 3, 2, 1]
    expected = [(n, e) for n in order for e in range(n % 3, 4) if (n, e) != (3, 2)]
    assert [(int(row["net"]), int(row["epoch"])) for row in rows] == expected
    assert [row["clustnet.lr"] for row in rows if row["net"] == "12"][0] == str(0.1 * 1)
    for row in rows[::5]:
        scores = some_scores(seed=100 * int(row["net"]) + int(row["epoch"]))
        values = experiment.measured(nets[0].config, scores)
        assert float(row["acc_p"]) == pytest.approx(values["acc_p"]) and float(row["nll"]) == pytest.approx(
            values["nll"]
        )
    with pytest.raises(DataError, match="scores has no epoch1.csv and the like"):
        accuracy.compare([nets[4]])


@pytest.mark.filterwarnings("error")
def test_of_images_without_labels_only_the_certainty_of_the_gate_is_shown(tmp_path):
    unknown, net = np.full(40, -1), net_in(tmp_path / "net7")
    for epoch in range(3):
        written(net.workdir, epoch, some_scores(seed=epoch)._replace(label=unknown, group=unknown))
    (tmp_path / "drawn").mkdir()
    for draw in (accuracy.compare([net]), confusion.read(net._replace(config=of_clustnet(report__epochs="0-2")))):
        with pytest.raises(DataError, match="can be used; net7/scores/epoch0.csv and 2 more: the images have no label"):
            draw(tmp_path / "drawn")
    assert [image.file for image in certainty.read(net)(tmp_path / "drawn").images] == ["certainty.png"]


def test_each_net_has_its_own_matrices_and_bars(tmp_path):
    for epoch in (0, 1, 4):
        written(tmp_path, epoch, some_scores(seed=epoch))
    (tmp_path / "drawn").mkdir()
    shown = confusion.read(net_in(tmp_path, report__epochs="1-4"))(tmp_path / "drawn")
    assert [image.file for image in shown.images] == [f"{g}-epoch{e}.png" for e in (1, 4) for g in ("p", "n", "all")]
    with (tmp_path / "drawn" / "n-epoch4.csv").open() as file:
        header, *rows = csv.reader(file)
    scores = some_scores(seed=4)
    of = confusion.matrix(scores, [5, 6, 7, 8, 9])
    assert header == ["expert", "5", "6", "7", "8", "9"] and [int(row[0]) for row in rows] == of.experts
    assert [[int(cell) for cell in row[1:]] for row in rows] == of.counts.tolist()
    report_job.draw(report_job.of_files({"confusion": confusion}, net_in(tmp_path)), tmp_path)
    report_job.page(tmp_path)
    links = Page(tmp_path / "report" / "index.html").links
    shown = [link.rpartition("/")[2] for link in links if link.startswith("../pictures/confusion/")]
    assert {file for file in shown if re.fullmatch(r"\w+-epoch\d+.png", file)} == {
        f"{of}-epoch4.png" for of in ("p", "n", "all")
    }
    with (tmp_path / "drawn" / "all-epoch4.csv").open() as file:
        header, *rows = csv.reader(file)
    experts = confusion.matrix(scores, [0, 1, 2, 3, 4]).experts
    assert header == ["expert", *map(str, range(10))] and [int(row[0]) for row in rows] == experts
    for expert, row in zip(experts, rows, strict=True):
        assert [int(n) for n in row[1:]] == [sum((scores.expert == expert) & (scores.label == c)) for c in range(10)]
    shown = certainty.read(net_in(tmp_path))(tmp_path / "drawn")
    with Image.open(tmp_path / "drawn" / shown.images[0].dark) as picture:
        assert picture.width > 300
    with (tmp_path / "drawn" / "certainty.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("epoch") for row in rows] == ["0", "1", "4"]
    assert all(sum(map(float, row.values())) == pytest.approx(1) for row in rows)


def second_layer(seen):
    """`prepare` of a picture of layer 2, of a net whose stage is replaced by how many layers it has."""
    if seen.stage < 2:
        raise ConfigError(f"layer=2: there is: {seen.stage}")
    return one_file


def one_file(folder):
    (folder / "drawn.txt").write_text("")
    return Gallery("a picture", "", [])


@pytest.mark.parametrize("layers", [(0, 2, 1, 3), (1, 0), (None, 1, 2)])
def test_a_net_that_alone_lacks_a_layer_is_named_and_what_none_has_is_refused_first(
    tmp_path, monkeypatch, capsys, layers
):
    folder = experiment_of(tmp_path, [0.1] * len(layers))
    of_net = {folder / f"net{number}": count for number, count in enumerate(layers, 1)}

    def look(config, workdir):
        if of_net[workdir] is None:
            raise DataError("there is no checkpoint yet")
        return Seen(of_net[workdir], None, None)

    monkeypatch.setattr(report_job, "look", look)
    monkeypatch.setattr(report_job, "origin", lambda seen: {})
    asked = {"second": SimpleNamespace(prepare=second_layer), "any": SimpleNamespace(prepare=lambda seen: one_file)}
    if layers == (1, 0):
        with pytest.raises(ConfigError, match="^layer=2: there is: 1$"):
            report_job.of_sweep(asked, of_clustnet(), folder)
        assert not [*folder.glob("net*/pictures"), *folder.glob("**/report")]
        return
    report_job.of_sweep(asked, of_clustnet(), folder)
    for path, count in of_net.items():
        drawn = {file.parent.name for file in path.glob("pictures/*/drawn.txt")}
        assert drawn == (set() if count is None else {"any"} if count < 2 else {"any", "second"})
        assert (path / "report" / "index.html").exists()
    said = re.findall(r"left out: second: layer=2: there is: (\d) \(other runs", capsys.readouterr().out)
    assert said == [str(count) for count in layers if count in (0, 1)]


# All of them, of a real sweep.

ALL = "weights,sparsity,accuracy,failures,certainty,map_variance,confusion"
FILES = {
    "certainty": {"certainty.png", "certainty.csv"},
    "confusion": {f"{of}-epoch3.{kind}" for of in ("p", "n", "all") for kind in ("png", "csv")},
    "failures": {"epoch3.csv", "epoch3"},
    "map_variance": {"p-conv1.png", "n-conv1.png", "conv1.csv"},
    "sparsity": {"sparsity.png", "sparsity.csv"},
    "weights": {"weights.png", "weights.csv"},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A few digits, some of them for testing."""
    split = few_digits(120).splits["train"]
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, images=split.images[:80], labels=split.labels[:80],
             test_images=split.images[80:], test_labels=split.labels[80:])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def swept(digits, tmp_path_factory):
    """Two nets, of three epochs and of two, which compile the same programs."""
    folder = tmp_path_factory.mktemp("runs") / "exp"
    train(folder, digits, "--job=sweep", "--config.sweep=rounds=3,2", "--config.keep_checkpoints=10",
          "--config.report.pictures=confusion,accuracy")  # fmt: skip
    return folder


def train(folder, digits, *arguments):
    sizes = (
        "gate.dense_layers=1",
        "gate.dense_size=(1,)",
        "experts.layers=2",
        "experts.channels=2",
        "experts.pool_out=2",
    )
    code = run("--config=configs/clustnet.py:digits", f"--workdir={folder}", f"--config.data.source=npz:{digits}",
               "--config.clustnet.lr=0.1", "--config.batch_size=16", "--config.cluster.k=3",
               "--config.eval_every=never", *arguments,
               *(f"--config.clustnet.{size}" for size in sizes))  # fmt: skip
    assert code == 0


def report(folder, *arguments):
    return run("--job=report", f"--workdir={folder}", *(f"--config.report.{argument}" for argument in arguments))


def there(folder):
    """The files of each picture, without those for dark pages."""
    return {
        path.name: {file.name for file in path.iterdir() if "-dark" not in file.name} - {"gallery.json"}
        for path in (folder / "pictures").iterdir()
    }


@pytest.mark.wide
def test_what_experts_see_and_get_wrong_is_pictured_of_a_net_and_side_by_side(tmp_path, monkeypatch):
    """Check 12 of the specification where no other test draws, of a network that is not trained; `wide`: of a sweep."""
    folder = experiment_of(tmp_path, [0.1, 0.2])
    config = of_clustnet(report__pictures="failures,sparsity,map_variance")
    asked, (net, other) = pictures.load(config), experiment.read(folder, config)
    seen = looked_at(net.workdir, "digits", report__map_variance__layer=1, **CONVOLUTIONS)
    written(net.workdir, 2, some_scores(k=3))
    monkeypatch.setattr(report_job, "look", lambda config, workdir: seen)
    report_job.draw(report_job.of_network(asked, config, net.workdir), net.workdir)
    expected = {name: {file.replace("epoch3", "epoch2") for file in FILES[name]} for name in asked}
    assert {name: of - {"epoch2.png"} for name, of in there(net.workdir).items()} == expected
    wrong = failures.wrong(40, True, some_scores(k=3)).id.tolist()
    found = net.workdir / "pictures" / "failures" / "epoch2"
    assert sorted(int(path.stem) for path in found.iterdir()) == wrong
    zeros = sparsity.read_back(net.workdir / "pictures" / "sparsity" / "sparsity.csv")
    assert sorted(zeros) == [0, 1, 2] and set(zeros[0]) == {"input", "conv1", "conv2"}
    for of in zeros.values():  # two of three experts see nothing of an image
        assert of["input"]["all"] == pytest.approx((2 + of["input"]["chosen"]) / 3) and of["input"]["chosen"] < 0.9
    shutil.copytree(net.workdir / "pictures", other.workdir / "pictures")
    report_job.draw(report_job.compared(asked, [net, other]), folder)
    assert there(folder) == {"sparsity": {"sparsity.png"}}


@pytest.mark.wide
def test_every_picture_of_a_sweep_is_drawn_and_on_its_page(swept, capsys):
    of_accuracy = {"accuracy": {"accuracy.png", "variation.png", "metrics.csv"}}
    assert there(swept / "net1") == {"confusion": FILES["confusion"]} | of_accuracy  # from the end of the training
    assert there(swept) == of_accuracy
    damaged = swept / "net2" / "scores" / "epoch1.csv"
    damaged.write_text(damaged.read_text()[:-9])
    assert report(swept, f"pictures={ALL}", "map_variance.layer=1") == 0
    said = capsys.readouterr().out
    assert "left out" not in said
    assert said.count("skipped: net2/scores/epoch1.csv: ends in the middle of a line") == 2  # certainty, accuracy
    for number, last in ((1, 3), (2, 2)):
        found = there(swept / f"net{number}")
        files = {name: {file.replace("epoch3", f"epoch{last}") for file in of} for name, of in FILES.items()}
        assert {name: of - {f"epoch{last}.png"} for name, of in found.items() if name in FILES} == files
    assert set(there(swept)) == {"accuracy", "sparsity"}
    page = Page(swept / "report" / "index.html")
    for name in ("accuracy/accuracy.png", "accuracy/variation-dark.png", "sparsity/sparsity.png"):
        assert f"../pictures/{name}" in page.links
    assert "net2/scores/epoch1.csv: ends in the middle of a line" in page.text
    page = Page(swept / "net2" / "report" / "index.html")
    assert "../pictures/map_variance/p-conv1.png" in page.links and "ends in the middle of a line" in page.text
    assert all((swept / "net2" / "report" / link).exists() for link in page.links)


@pytest.mark.wide
def test_training_images_are_shown_if_asked_and_what_cannot_be_is_said(swept, digits, capsys):
    assert report(swept / "net2", "pictures=failures,sparsity,confusion,tsne", "split=train", "pixels=True") == 0
    said = capsys.readouterr().out
    assert "left out" not in said and there(swept / "net2")["failures"] == {"epoch2.csv", "epoch2", "epoch2.png"}
    assert there(swept / "net2")["tsne"] == {"tsne.png", "tsne-pixels.png"}
    page = Page(swept / "net2" / "report" / "index.html")
    assert "over the train images" in page.text and "by the files of train in scores/" in page.text
    assert report(swept, "pictures=map_variance", "map_variance.layer=3", "nets=2") == 2
    assert "map_variance.layer=3: the experts have convolutions: 2; 0 is what they" in capsys.readouterr().err
    assert report(swept, "pictures=accuracy", "nets=1,3") == 2
    assert "config.report.nets='1,3': there is no net 3; there is: 1-2" in capsys.readouterr().err


@pytest.mark.medium
def test_failures_of_a_run_are_its_wrong_images_as_files(digits, tmp_path):
    train(tmp_path / "run", digits, "--config.rounds=0", "--config.steps=1", "--config.scores.every=never")
    label = np.load(digits)["test_labels"]
    path = written(tmp_path / "run", 2, some_scores(40, k=3)._replace(label=label, group=label < 5))
    expected = failures.wrong(40, True, score_file.read(path)).id.tolist()
    assert report(tmp_path / "run", "pictures=failures", "epochs=2") == 0
    folder = tmp_path / "run" / "pictures" / "failures"
    assert sorted(int(file.stem) for file in (folder / "epoch2").iterdir()) == expected
    images = np.load(digits)["test_images"]
    for id in expected[:3]:
        found = np.asarray(Image.open(folder / "epoch2" / f"{id}.png"))
        np.testing.assert_array_equal(found, np.asarray(failures.enlarged(images[id])))
    with (folder / "epoch2.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == expected
    assert all(row["target"] != row["predicted"] and row["path"].endswith(row["id"]) for row in rows)
    assert all(row["class"] == str(np.load(digits)["test_labels"][int(row["id"])]) for row in rows)
    assert all(float(row[f"p{row['expert']}"]) == max(float(row[f"p{k}"]) for k in range(3)) for row in rows)


# From the network.


def looked_at(tmp_path, variant, **overrides):
    """What pictures are made from, of a network that is not trained, with checkpoints of epochs 0, 1 and 2."""
    config = config_lib.from_file(Path("configs/clustnet.py"), variant)
    config.runtime.devices = 1
    source = few_digits(40)
    small = {"batch_size": 8, "eval_batch_size": 16, "rounds": 2, "cluster__k": 3, **overrides}
    stage = prepared(with_settings(config, **small), tmp_path, source)
    checkpoints, snapshot = Checkpoints(tmp_path / "checkpoints" / stage.name, keep=9), stage.first()
    for epoch in range(3):
        moved = jax.tree.map(lambda leaf, epoch=epoch: leaf * 1.5**epoch, snapshot.state.params)
        state = snapshot.state._replace(params=moved)
        checkpoints.save(epoch * stage.lengths.round, snapshot._replace(state=state))
    return Seen(stage, state, lambda: source)


CONVOLUTIONS = {
    "clustnet__experts__layers": 2, "clustnet__experts__channels": 2, "clustnet__experts__pool_out": 2,
    "clustnet__gate__dense_layers": 1, "clustnet__gate__dense_size": (1,),
}  # fmt: skip


@pytest.mark.parametrize("decision", ["sample", pytest.param("soft", marks=pytest.mark.wide)])
def test_experts_see_what_the_gate_gives_them_and_their_maps_are_made_of_that(tmp_path, decision):
    seen = looked_at(tmp_path, "digits", clustnet__decision=decision, **CONVOLUTIONS)
    assert _experts.layers(seen) == ["input", "conv1", "conv2"]
    images, (params, extra) = few_digits(9).splits["train"].images, (seen.state.params, seen.state.extra)
    found = jax.jit(seen.stage.method.experts)(params, extra, images)
    p = np.exp(jax.jit(seen.stage.method.predict)(params, extra, images)["log_probs"])
    np.testing.assert_allclose(found["choice"], p if decision == "soft" else np.eye(3)[p.argmax(axis=1)], atol=1e-6)
    x = (images / 255 - 0.3053) / 0.376
    net = mixture.build(seen.stage.config)
    for k in range(3):
        given_to_k = np.asarray(found["choice"])[:, k, None, None, None] * x
        np.testing.assert_allclose(found["input"][:, k], given_to_k, atol=1e-5)
        one = jax.tree.map(lambda leaf, k=k: leaf[k], {"params": params["experts"], **of_experts(extra)})
        maps = net.expert.apply(one, given_to_k, mutable=["maps"])[1]["maps"]["stack"]
        for name in ("conv1", "conv2"):
            np.testing.assert_allclose(found[name][:, k], maps[name][0], atol=1e-4)


def of_experts(extra):
    return {"batch_stats": extra["batch_stats"]["experts"]}


def test_weights_of_kept_checkpoints_are_compared_and_without_the_first_there_is_nothing_to_compare_with(tmp_path):
    seen = looked_at(tmp_path, "digits", **CONVOLUTIONS)
    (tmp_path / "drawn").mkdir()
    shown = weights.prepare(seen)(tmp_path / "drawn")
    with (tmp_path / "drawn" / "weights.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["group"], row["layer"]) for row in rows} >= {("experts", "stack/conv1_conv"), ("gate", "output")}
    assert all(float(row["distance"]) == pytest.approx({"1": 0.5, "2": 0.75}[row["epoch"]]) for row in rows)
    assert shown.images[0].file == "weights.png"
    for epochs in ("1-2", "0"):
        words = f"config.report.epochs='{epochs}' must include 0, .*, and a later one; there is: 0-2"
        with pytest.raises(DataError, match=words):
            weights.prepare(asked(seen, report__epochs=epochs))
    shutil.rmtree(tmp_path / "checkpoints" / "clustnet" / "0")
    with pytest.raises(
        DataError, match="there are those of epochs 1, 2; a training with --config.keep_checkpoints=1000"
    ):
        weights.prepare(seen)


def asked(seen, **overrides):
    config = with_settings(seen.stage.config.copy_and_resolve_references(), **overrides)
    return seen._replace(stage=seen.stage._replace(config=config))


def test_tsne_may_be_of_a_layer_with_a_learning_rate_of_its_own(tmp_path, monkeypatch):
    sizes = {"clustnet__encoder__channels": 4, "clustnet__encoder__kernel": 3, "clustnet__encoder__dim": 6}
    seen, told = looked_at(tmp_path, "cae", stages="cae", **sizes), []

    class Flat:
        def __init__(self, dimensions, **said):
            told.append(said["learning_rate"])

        def fit_transform(self, rows):
            told.append(rows)
            return rows[:, :2]

    monkeypatch.setattr(tsne, "TSNE", Flat)
    (tmp_path / "drawn").mkdir()
    for of in (seen, asked(seen, report__tsne__layer="encoder/conv1", report__tsne__rate=0.0)):
        tsne.prepare(of)(tmp_path / "drawn")
    rate, codes, auto, maps = told
    assert (rate, auto) == (20.0, "auto") and codes.shape == (40, 6) and maps.shape == (40, 8 * 8 * 4)
    np.testing.assert_allclose(np.linalg.norm(maps, axis=1), 1, rtol=1e-5)
    with pytest.raises(ConfigError, match="tsne.layer='conv' is unknown.* There is: feature, encoder/conv1"):
        tsne.prepare(asked(seen, report__tsne__layer="conv"))


def test_an_autoencoder_shows_what_it_makes_of_images(tmp_path):
    sizes = {"clustnet__encoder__channels": 4, "clustnet__encoder__kernel": 3, "clustnet__encoder__dim": 6}
    seen = looked_at(tmp_path, "cae", stages="cae", **sizes)
    (tmp_path / "drawn").mkdir()
    shown = reconstructions.prepare(asked(seen, report__epochs="0,2"))(tmp_path / "drawn")
    assert [image.file for image in shown.images] == ["reconstructions.png"]
    originals = sorted(int(path.stem) for path in (tmp_path / "drawn").glob("*.png") if path.stem.isdigit())
    assert len(originals) == 10
    images = few_digits(40).splits["train"].images
    params, extra = seen.state.params, seen.state.extra
    net = cae.network(seen.stage.config, (8, 8, 1))
    x = (images[originals] / 255 - 0.3053) / 0.376
    made, _ = jax.jit(partial(cae.reconstruct, net, train=False, rng=None))(params, extra["batch_stats"], x)
    expected = np.clip(np.round((np.asarray(made, np.float64) * 0.376 + 0.3053) * 255), 0, 255)
    for id, image, pixels in zip(originals, images[originals], expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "drawn" / f"{id}.png")), image[..., 0])
        found = np.asarray(Image.open(tmp_path / "drawn" / f"{id}-epoch2.png"), np.float64)
        assert np.abs(found - pixels[..., 0]).max() <= 1  # which may be rounded the other way
    with pytest.raises(DataError, match="'cae' of stage 'cae' has no experts that a gate chooses from"):
        sparsity.prepare(seen)
    with pytest.raises(DataError, match="config.report.epochs='5': there is: 0-2"):
        reconstructions.prepare(asked(seen, report__epochs="5"))
