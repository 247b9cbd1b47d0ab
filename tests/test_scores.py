"""Files of scores and the figures of every split during training: what they hold, and that they say the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small import few_digits, prepared, small_config, with_settings

from jaxclust.config import from_file
from jaxclust.data.split import from_array
from jaxclust.errors import ConfigError, DataError, Stopped
from jaxclust.evaluation import groups
from jaxclust.features import score_file
from jaxclust.features.score_file import Scores
from jaxclust.runtime import StopSignal
from jaxclust.train import loop, validation

HEADER = "#origTarg,targ,pred[2],clust[3]"


def clustnet(**overrides):
    """Linear experts and a linear gate, three rounds of digits."""
    config = from_file(Path("configs/clustnet.py"), "digits")
    config.runtime.devices = 1
    small = {
        "cluster__k": 3, "rounds": 3, "batch_size": 16, "eval_batch_size": 64, "clustnet__lr": 0.1,
        "clustnet__gate__dense_layers": 1, "save_every": "3 steps", "keep_checkpoints": 20,
    }  # fmt: skip
    return with_settings(config, **{**small, **overrides})


def divided(train=100, test=40, unknown=(), untrained=()):
    """Digits to train on and to test with; some of either without a class."""
    source = few_digits(train + test)
    whole, parts = source.splits["train"], {}
    for name, own in (("train", slice(0, train)), ("test", slice(train, train + test))):
        labels = whole.labels[own].copy()
        labels[list(unknown if name == "test" else untrained)] = -1
        split = from_array(whole.images[own], whole.image_shape, f"{name}/{{}}".format)
        parts[name] = replace(split, labels=labels)
    return source._replace(splits=parts)


class StopAt(StopSignal):
    """A signal that is there at the n-th look."""

    def __init__(self, look):
        super().__init__()
        self.looks_left = look

    def asked(self):
        self.looks_left -= 1
        return self.looks_left <= 0


def files(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "scores").iterdir()}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def timeless(workdir):
    """The records without what depends on the clock."""
    clock = ("time", "seconds", "images_per_second")
    return [{k: v for k, v in of.items() if k not in clock} for of in records(workdir)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("scores") / "whole"
    loop.run_stage(prepared(clustnet(), workdir, divided()), StopSignal())
    return workdir


def test_checkpoints_that_are_kept_begin_with_the_new_network(done):
    """Which pictures of how weights move compare with."""
    kept = sorted(int(folder.name) for folder in (done / "checkpoints" / "clustnet").iterdir())
    assert kept == [*range(0, 22, 3)]


def test_each_epoch_has_a_file_of_the_test_images_and_one_of_those_trained_on(done):
    names = {f"epoch{epoch}.csv" for epoch in range(4)} | {f"epoch{epoch}_train.csv" for epoch in range(1, 4)}
    assert files(done).keys() == names
    source = divided()
    for name in names:
        lines = (done / "scores" / name).read_text().splitlines()
        assert lines[0] == HEADER and {line.count(",") for line in lines[1:]} == {2 + 2 + 3 - 1}
        scores = score_file.read(done / "scores" / name)
        labels = source.splits["train" if "train" in name else "test"].labels
        assert len(scores.label) == len(labels)
        np.testing.assert_array_equal(scores.group, scores.label < 5)
        np.testing.assert_allclose(np.exp(scores.log_probs).sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(scores.gate.sum(axis=1), 1, atol=1e-5)
        if "train" in name:  # each once, in the order of the epoch
            np.testing.assert_array_equal(np.sort(scores.label), np.sort(labels))
        else:
            np.testing.assert_array_equal(scores.label, labels)
    orders = [score_file.read(done / "scores" / f"epoch{epoch}_train.csv").label.tolist() for epoch in (1, 2, 3)]
    assert orders[0] != orders[1] != orders[2]


def test_figures_worked_out_of_a_file_are_those_of_the_log_and_all_splits_are_judged(done):
    found = {record["round"]: record for record in records(done) if "test/binary" in record}
    assert sorted(found) == [0, 1, 2, 3]
    for epoch, record in found.items():
        scores = score_file.read(done / "scores" / f"epoch{epoch}.csv")
        predictions = {
            "cluster": scores.gate.argmax(axis=1), "log_probs": np.log(scores.gate), "groups": scores.log_probs,
            "binary": scores.log_probs.argmax(axis=1),
        }  # fmt: skip
        values = groups.measure(predictions, scores.label, clustnet(), None)
        assert {"binary", "nll", "acc_p", "acc_n", "nmi_p", "usage0", "gate_entropy", "usage_entropy"} <= set(values)
        for name, value in values.items():
            assert record[f"test/{name}"] == pytest.approx(value, abs=1e-5), name
        assert {f"train/{name}" for name in values} <= set(record)


def test_rows_of_training_are_those_of_the_steps_before_the_gate_chose(done):
    rows = [dict(np.load(path)) for path in sorted(done.glob("rows/clustnet/*.npz"), key=lambda path: int(path.stem))]
    assert len(rows) > 3  # saved within the rounds too
    rows = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    second = (rows["position"] >= 7 * 16) & (rows["position"] < 7 * 16 + 100)  # 7 steps of 16 hold 100 images and 12
    scores = score_file.read(done / "scores" / "epoch2_train.csv")
    np.testing.assert_allclose(scores.gate, rows["gate"][second], rtol=1e-6)
    np.testing.assert_allclose(scores.log_probs, rows["groups"][second], rtol=1e-6)


@pytest.mark.medium
@pytest.mark.wide
def test_a_run_that_died_writes_the_same_files(done, tmp_path):
    with pytest.raises(Stopped):
        loop.run_stage(prepared(clustnet(), tmp_path, divided()), StopAt(18))
    assert files(tmp_path).keys() == {"epoch0.csv"} | {f"epoch{e}{of}.csv" for e in (1, 2) for of in ("", "_train")}
    for folder in (tmp_path / "checkpoints" / "clustnet").iterdir():
        if int(folder.name) > 9:  # so that it goes on in the middle of the second epoch
            shutil.rmtree(folder)
    for path in (tmp_path / "scores").glob("epoch2*"):
        path.write_text("half of")
    loop.run_stage(prepared(clustnet(), tmp_path, divided()), StopSignal())
    assert files(tmp_path) == files(done) and timeless(tmp_path) == timeless(done)


def test_a_run_that_goes_on_within_an_epoch_writes_the_same_files(done, tmp_path):
    """Check 18 of the specification: of the same seed, and after a kill."""
    workdir = tmp_path / "run"
    shutil.copytree(done, workdir)
    for folder in (workdir / "checkpoints" / "clustnet").iterdir():
        if int(folder.name) > 9:  # of 21 steps, 7 in an epoch
            shutil.rmtree(folder)
    for path in (*workdir.glob("scores/epoch2*"), *workdir.glob("scores/epoch3*")):
        path.write_text("half of")
    loop.run_stage(prepared(clustnet(), workdir, divided()), StopSignal())
    assert files(workdir) == files(done) and timeless(workdir) == timeless(done)


@pytest.mark.wide
def test_another_seed_writes_other_files(done, tmp_path):
    loop.run_stage(prepared(clustnet(seed=1, rounds=1), tmp_path, divided()), StopSignal())
    assert all(text != files(done)[name] for name, text in files(tmp_path).items())


@pytest.mark.wide
def test_files_come_as_often_as_asked_and_the_last_always(tmp_path):
    config = clustnet(scores__every="2 rounds", scores__index=True, save_every="never", eval_every="never")
    source = divided(unknown=(0, 7))
    loop.run_stage(prepared(config, tmp_path, source), StopSignal())
    epochs = {f"epoch{name}.csv" for name in ("0", "2", "2_train", "3", "3_train")}
    assert files(tmp_path).keys() == epochs and not any("test/binary" in record for record in records(tmp_path))
    scores = score_file.read(tmp_path / "scores" / "epoch2_train.csv")
    np.testing.assert_array_equal(scores.label, source.splits["train"].labels[scores.id])
    assert sorted(scores.id.tolist()) == [*range(100)]
    test = score_file.read(tmp_path / "scores" / "epoch3.csv")
    assert test.label[[0, 7]].tolist() == test.group[[0, 7]].tolist() == [-1, -1] and (test.label >= 0).sum() == 38


def test_images_without_a_class_are_not_trained_on_and_no_other_has_two_rows(tmp_path):
    config = clustnet(rounds=1, scores__index=True, save_every="never", eval_every="never")
    loop.run_stage(prepared(config, tmp_path, divided(untrained=range(30))), StopSignal())
    scores = score_file.read(tmp_path / "scores" / "epoch1_train.csv")
    assert sorted(scores.id.tolist()) == [*range(30, 100)]


def test_without_test_images_those_of_the_training_are_scored(tmp_path):
    config = clustnet(rounds=1)
    config.steps, config.rounds = 0, 0  # nothing is trained
    loop.run_stage(prepared(config, tmp_path, few_digits(50)), StopSignal())
    assert files(tmp_path).keys() == {"epoch0.csv"}
    labels = score_file.read(tmp_path / "scores" / "epoch0.csv").label
    np.testing.assert_array_equal(labels, few_digits(50).splits["train"].labels)


def test_scores_of_parts_of_a_round_or_of_a_method_without_a_gate_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="config.scores.every='10 steps' must be whole rounds, .*'1 epoch'"):
        prepared(clustnet(scores__every="10 steps"), tmp_path, few_digits(50))
    config = small_config(method="supervised", scores__every="1 round")
    with pytest.raises(ConfigError, match="config.method='supervised' of stage 'deepcluster' has no gate"):
        prepared(config, tmp_path, few_digits(300))


def test_rows_that_were_removed_are_missed(done, tmp_path):
    stage = prepared(clustnet(), tmp_path, divided())
    with pytest.raises(DataError, match="rows/clustnet has no longer what the steps 7 to 14 said"):
        validation.validate(stage, stage.first().state, 14)


def written(path, **changes):
    scores = Scores(np.array([3, 7]), np.array([1, 0]), np.log([[0.25, 0.75], [0.5, 0.5]]), np.full((2, 4), 0.25))
    score_file.write(path, scores._replace(**changes))
    return path


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = written(tmp_path / "a.csv")
    assert path.read_text().splitlines()[1] == "3,1,-1.38629436,-0.287682072,0.25,0.25,0.25,0.25"
    found = score_file.read(path)
    assert found.label.tolist() == [3, 7] and found.group.tolist() == [1, 0] and found.id is None
    np.testing.assert_allclose(np.exp(found.log_probs), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-8)
    found = score_file.read(written(tmp_path / "b.csv", id=np.array([9, 4])))
    assert found.id.tolist() == [9, 4] and found.gate.shape == (2, 4)
