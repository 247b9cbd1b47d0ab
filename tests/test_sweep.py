"""Sweeps: what is asked for, what is trained, what is shared between processes, and what is said of it."""

import contextlib
import csv
import fcntl
import io
import json
import os
import re
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from host_runs import Process, all_well, jaxclust
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from small import few_digits, run, small_config

from jaxclust import config as config_lib
from jaxclust.errors import CollapseError, ConfigError, JaxclustError, Stopped
from jaxclust.files import write_json
from jaxclust.jobs import sweep, train
from jaxclust.jobs.options import Options
from jaxclust.report import figures, sweep_figure
from jaxclust.report import sweep as report

SHORT = [
    "--config=configs/deepcluster.py:smoke", "--config.refresh_every=3 steps", "--config.batch_size=64",
    "--config.model.blocks=1",
]  # fmt: skip
GRID = "--config.sweep=cluster.k=3,4;seed=0"
WHOLE = "--config.sweep=cluster.k=3,4;seed=0..1"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A few digits with labels, as a source."""
    split = few_digits(200).splits["train"]
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, images=split.images, labels=split.labels)
    return f"--config.data.source=npz:{path}"


def asked(text, **overrides):
    """A config that asks for a sweep."""
    config = small_config(**overrides)
    config.sweep = text
    return config


def swept(workdir, digits, *arguments):
    return run(*SHORT, digits, "--job=sweep", f"--workdir={workdir}", *arguments)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def folders(workdir):
    return {path.name for path in workdir.glob("net*")}


# What is asked for.


def test_values_take_the_type_of_their_setting():
    over = (
        "cluster.k = 5,10 ; optimizer.body.lr=1,1e-3;cluster.whiten=False,true;eval_every=1 epoch,never;seed=8..10,3;"
        "data.source=folder:../photos"
    )
    fields = sweep.parse(asked(over))
    assert fields == {
        "cluster.k": [5, 10], "optimizer.body.lr": [1.0, 0.001], "cluster.whiten": [False, True],
        "eval_every": ["1 epoch", "never"], "seed": [8, 9, 10, 3], "data.source": ["folder:../photos"],
    }  # fmt: skip
    assert [type(values[0]) for values in fields.values()] == [int, float, bool, str, int, str]


def test_values_with_commas_of_their_own_stand_in_brackets():
    config = config_lib.from_file(Path("configs/clustnet.py"), "digits")
    config.sweep = (
        "gate.dense_size=(128, 64),(32),(16,);lr_next=(),(1e-2,1),.5;groups=(0-4,5-9),(0+2-4,1+5-9);"
        "data.source=folder:a (1),folder:b (2);lr=(0.1),0.2"
    )
    fields = sweep.parse(config)
    assert fields == {
        "clustnet.gate.dense_size": [(128, 64), (32,), (16,)], "clustnet.lr_next": [(), (0.01, 1.0), (0.5,)],
        "groups": ["0-4,5-9", "0+2-4,1+5-9"], "data.source": ["folder:a (1)", "folder:b (2)"],
        "clustnet.lr": [0.1, 0.2],
    }  # fmt: skip
    assert {type(number) for size in fields["clustnet.gate.dense_size"] for number in size} == {int}
    config.sweep = "gate.dense_size=32;data.mean=0.3"  # one value, and no doubt which
    assert sweep.parse(config) == {"clustnet.gate.dense_size": [(32,)], "data.mean": [(0.3,)]}


def test_settings_of_the_method_may_be_called_by_the_end_of_their_name():
    config = config_lib.from_file(Path("configs/clustnet.py"), "cae")  # whose first stage has another method
    config.sweep = "lr=0.01,0.05,0.001;gate.layers=0;batch_size=4;cluster.k=5"
    fields = sweep.parse(config)
    assert list(fields) == ["clustnet.lr", "clustnet.gate.layers", "batch_size", "cluster.k"]
    assert fields["clustnet.lr"] == [0.01, 0.05, 0.001]
    wrong = {
        "layers=1": "'layers' may be clustnet.encoder.layers or clustnet.experts.layers or clustnet.gate.layers",
        "diversty=1": r"config.diversty is unknown; did you mean 'diversity'\?",
        "k=5": r"config.k is unknown; did you mean 'cluster.k'\?",
        "lr=0.1;clustnet.lr=0.2": "config.clustnet.lr is swept twice",
    }
    for text, words in wrong.items():
        config.sweep = text
        with pytest.raises(ConfigError, match=words):
            sweep.parse(config)


BAD = {
    "nothing": ([], "needs config.sweep, NAME=VALUE,VALUE;NAME=FIRST..LAST, such as"),
    "unknown end": (["lr=0.1"], r"config.lr is unknown; did you mean 'evaluate.linear.lr'\?"),
    "itself": (["sweep=a"], "config.sweep is the same for all runs"),
    "a span that falls": (["seed=5..1"], "seed=5..1 must rise"),
    "a span without end": (["seed=5.."], "has an empty value"),
    "a span of all numbers": (["seed=0..100000000"], "to 10,000 values at most"),
    "a span of no whole numbers": (["optimizer.body.lr=0.1..0.5"], "'0.1..0.5' must be of type float"),
    "unknown": (["cluster.kk=3"], r"config.cluster.kk is unknown; did you mean 'cluster.k'\?"),
    "section": (["cluster=3"], "config.cluster is unknown"),
    "wrong type": (["cluster.k=5,ten"], r"cluster.k: 'ten' must be of type int \(at least 2\)"),
    "no whole number": (["cluster.k=5.5"], "'5.5' must be of type int"),
    "neither true nor false": (["cluster.l2=1"], "'1' must be of type bool"),
    "out of range": (["cluster.k=5,1"], r"config.cluster.k=1 must be at least 2"),
    "no number": (["optimizer.body.lr=nan"], "lr=nan must be at least 0"),
    "empty": (["cluster.k="], "has an empty value"),
    "no values": (["cluster.k"], "has an empty value"),
    "gap": (["cluster.k=5,,10"], "has an empty value"),
    "same value": (["cluster.k=5,10,05"], "5 is there twice"),
    "same field": (["cluster.k=5", "cluster.k=10"], "cluster.k is swept twice"),
    "several numbers": (
        ["data.mean=0.5,0.4"],
        r"in brackets; data.mean=\(0.5,0.4\) is one, data.mean=\(0.5\),\(0.4\) are several",
    ),
    "an open bracket": (["data.mean=(0.5),(0.4,0.3"], r"the bracket of '\(0.4' is not closed"),
    "a word among numbers": (["data.mean=(0.5),(0.4,b)"], "data.mean: 'b' must be of type float"),
    "a gap in brackets": (["data.mean=(0.5,,0.4)"], "data.mean: '' must be of type float"),
    "as many numbers as there are not": (["data.mean=(0.5),(0.4,0.3)"], r"mean=\(0.4, 0.3\) must be one number or"),
    "the same numbers": (["data.mean=(0.5),(.5,)"], r"\(0.5,\) is there twice"),
    "runtime": (["runtime.dtype=float32,float64"], "the same for all runs of a process"),
    "at odds": (["steps=0,10"], "config.rounds=2 and config.steps=10: only one"),
    "unknown model": (["model.name=convnet,convnets"], "model.name=convnets: .*did you mean 'convnet'"),
    "more clusters than images": (["cluster.k=10,1798"], "cluster.k=1798: .* there are 1797"),
    "folder that is not there": (
        ["data.source=digits,folder:nowhere"],
        "data.source=folder:nowhere: 'nowhere': no",
    ),
    "body that is not there": (["init_from=nowhere"], "init_from=nowhere: .* holds no run"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_before_anything_is_written(name, tmp_path, capsys):
    over, words = BAD[name]
    arguments = [f"--config.sweep={';'.join(over)}"]
    code = run("--config=configs/deepcluster.py:smoke", "--job=sweep", f"--workdir={tmp_path / 'sweep'}", *arguments)
    error = capsys.readouterr().err
    assert code in (2, 3) and re.search(words, error), error
    assert "Traceback" not in error and error.count("jaxclust: ") == 1
    assert not (tmp_path / "sweep").exists()


def test_groups_that_were_parted_at_their_comma_are_told_of_brackets(tmp_path, capsys):
    code = run("--config=configs/clustnet.py:smoke", "--job=sweep", f"--workdir={tmp_path / 'sweep'}",
               "--config.sweep=groups=0-4,5-9")  # fmt: skip
    assert code == 2 and not (tmp_path / "sweep").exists()
    error = capsys.readouterr().err
    assert "groups=0-4: config.groups='0-4' has 1 groups and must have two" in error
    assert "in config.sweep in brackets: groups=(0-4,5-9)" in error


def test_every_combination_is_a_run_of_its_own_and_measures_the_silhouette():
    config = small_config()
    config.cluster.k = 0  # still to be said
    runs = sweep.plan(config, {"cluster.k": [5, 10], "seed": [0, 1]})
    assert [run.values for run in runs] == [{"cluster.k": k, "seed": seed} for k in (5, 10) for seed in (0, 1)]
    assert {run.config.sweep for run in runs} == {""}
    assert [(run.config.cluster.k, run.config.seed) for run in runs] == [(5, 0), (5, 1), (10, 0), (10, 1)]
    assert {run.config.evaluate.suite for run in runs} == {"clustering,silhouette"}
    assert config.cluster.k == 0 and config.evaluate.suite == "clustering"
    config.evaluate.suite = "silhouette, clustering"
    assert sweep.plan(config, {"cluster.k": [5]})[0].config.evaluate.suite == "silhouette, clustering"


def test_a_sweep_is_for_its_job_alone(tmp_path, capsys):
    code = run("--config=configs/deepcluster.py:smoke", f"--workdir={tmp_path / 'run'}", "--config.sweep=seed=0,1")
    assert code == 2 and not (tmp_path / "run").exists()
    assert "config.sweep='seed=0,1' is for --job=sweep" in capsys.readouterr().err


# What is trained. A training is replaced by one that writes its results at once.


class Trainings:
    """Stands for `jobs.train`: remembers which runs it was asked for, and fails where told to."""

    def __init__(self):
        self.done, self.failing, self.during = [], {}, lambda name: None

    def run(self, config, workdir, options):
        self.done.append(workdir.name)
        self.during(workdir.name)
        if workdir.name in self.failing:
            raise self.failing[workdir.name]
        write_run(workdir, config)


def write_run(workdir, config, clusters=None, **results):
    """What a training leaves, for a sweep to read."""
    k, seed = config.cluster.k, config.seed
    clusters = np.arange(40) % k if clusters is None else clusters
    workdir.mkdir(parents=True, exist_ok=True)
    config_lib.save(config, workdir / "config.json")
    share = np.bincount(clusters) / len(clusters)
    numbers = {
        "train/acc": 0.5, "train/silhouette": 0.1 * k + 0.01 * seed, "clusters": len(set(clusters.tolist())),
        "train/entropy": -(share[share > 0] * np.log(share[share > 0])).sum(), "train/largest_share": share.max(),
        "seconds": 10.0 + seed, **results,
    }  # fmt: skip
    (workdir / "results.json").write_text(
        json.dumps({key: value for key, value in numbers.items() if value is not None})
    )
    with (workdir / "assignments.csv").open("w") as file:
        csv.writer(file).writerows(
            [("id", "path", "cluster", "distance"), *((i, i, c, 0) for i, c in enumerate(clusters))]
        )


@pytest.fixture
def trainings(monkeypatch):
    fake = Trainings()
    monkeypatch.setattr(sweep, "train", fake)
    monkeypatch.setattr(sweep, "check_runs", lambda *_: None)  # real ones are checked above and below
    monkeypatch.setattr(sweep, "SECONDS_BETWEEN_LOOKS", 0.0)
    return fake


def start(workdir, *over, **overrides):
    sweep.run(asked(";".join(over), **overrides), workdir, Options())


def test_a_second_start_trains_nothing_again_and_more_values_are_added(trainings, tmp_path):
    start(tmp_path, "cluster.k=3,5", "seed=0,1")
    first = ["net1", "net2", "net3", "net4"]
    assert trainings.done == first
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    start(tmp_path, "seed=0,1", "cluster.k=5,3")
    assert trainings.done == first
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == before
    start(tmp_path, "seed=1", "cluster.k=10,3")
    assert trainings.done == [*first, "net5"]
    assert list(report.read_plan(tmp_path).runs.items())[3:] == [
        ("net4", {"cluster.k": 5, "seed": 1}), ("net5", {"cluster.k": 10, "seed": 1}),
    ]  # fmt: skip
    assert [(row["cluster.k"], row["seed"]) for row in table(tmp_path / "sweep.csv")] == [
        ("3", "0"), ("3", "1"), ("5", "0"), ("5", "1"), ("10", "1"),
    ]  # fmt: skip
    assert [(row["cluster.k"], row["seeds"]) for row in table(tmp_path / "summary.csv")] == [
        ("3", "2"), ("5", "2"), ("10", "1"),
    ]  # fmt: skip


@pytest.mark.wide
def test_settings_may_come_in_another_order(trainings, tmp_path):
    start(tmp_path, "cluster.k=3", "sampler=upstream", "seed=0")
    start(tmp_path, "seed=1,0", "sampler=upstream", "cluster.k=3")
    assert len(trainings.done) == 2
    (row,) = table(tmp_path / "summary.csv")
    assert (row["cluster.k"], row["sampler"], row["seeds"]) == ("3", "upstream", "2")


@pytest.mark.wide
def test_a_longer_training_or_another_evaluation_goes_on_and_other_settings_are_refused(trainings, tmp_path):
    start(tmp_path, "seed=0")
    start(tmp_path, "seed=0", rounds=3)
    start(tmp_path, "seed=0", rounds=3, evaluate__silhouette_sample=50)
    start(tmp_path, "seed=0", rounds=3, evaluate__silhouette_sample=50, runtime__devices=2, features__memory_bytes=9)
    assert len(trainings.done) == 3
    with pytest.raises(ConfigError, match=r"(?s)a sweep with other settings:\n  config.model.width: 8 there, 4 now"):
        start(tmp_path, "seed=0", model__width=4)
    with pytest.raises(ConfigError, match="a sweep over seed, not seed, cluster.k"):
        start(tmp_path, "seed=0", "cluster.k=3")
    assert len(trainings.done) == 3
    start(
        tmp_path, "seed=0,1", seed=7, rounds=3, evaluate__silhouette_sample=50
    )  # is swept, so the config's does not count
    assert trainings.done[3:] == ["net2"]


@pytest.mark.wide
def test_results_that_were_removed_are_made_again(trainings, tmp_path):
    start(tmp_path, "seed=0,1")
    (tmp_path / "net2" / "results.json").unlink()
    start(tmp_path, "seed=0,1")
    assert trainings.done == ["net1", "net2", "net2"]


@pytest.mark.parametrize("file", ["config.json", "results.json"])
def test_a_finished_net_with_a_torn_file_is_taken_up_again(file, trainings, tmp_path):
    start(tmp_path, "seed=0..2")
    torn = tmp_path / "net2" / file
    torn.write_text(torn.read_text()[:20])
    start(tmp_path, "seed=0..2")
    assert trainings.done == ["net1", "net2", "net3", "net2"]
    assert [row["status"] for row in table(tmp_path / "sweep.csv")] == ["done"] * 3


def test_a_longer_training_that_died_does_not_pass_for_finished(trainings, tmp_path):
    start(tmp_path, "seed=0")
    (longer,) = sweep.plan(small_config(rounds=3), {"seed": [0]})

    def die(name):
        config_lib.save(longer.config, tmp_path / name / "config.json")  # which a training writes first
        raise KeyboardInterrupt

    trainings.during = die
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, "seed=0", rounds=3)
    trainings.during = lambda name: None
    start(tmp_path, "seed=0", rounds=3)
    assert len(trainings.done) == 3


@pytest.mark.parametrize(("file", "words"), [("config.json", "a single run and no sweep"), ("a.txt", "other files")])
def test_a_folder_of_something_else_is_left_alone(file, words, trainings, tmp_path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError, match=words):
        start(tmp_path, "seed=0")
    assert [path.name for path in tmp_path.iterdir()] == [file] and not trainings.done


def test_settings_of_several_numbers_are_known_again_and_shown(trainings, tmp_path, capsys):
    over = "views.train.erase_fill=(0.5),(0.1, 0.2, 0.3),()", "seed=0"
    start(tmp_path, *over)
    start(tmp_path, *over)
    assert trainings.done == ["net1", "net2", "net3"]
    filled = [values["views.train.erase_fill"] for values in report.read_plan(tmp_path).runs.values()]
    assert filled == [(0.5,), (0.1, 0.2, 0.3), ()]
    assert config_lib.load(tmp_path / "net2" / "config.json").views.train.erase_fill == (0.1, 0.2, 0.3)
    shown = [row["views.train.erase_fill"] for row in table(tmp_path / "summary.csv")]
    assert shown == ["()", "(0.1, 0.2, 0.3)", "(0.5,)"]  # in rising order
    assert "(0.1, 0.2, 0.3)" in (tmp_path / "report" / "index.html").read_text()
    assert "views.train.erase_fill=(0.1, 0.2, 0.3), seed=0" in capsys.readouterr().out


def test_a_run_that_fails_is_recorded_and_the_others_go_on(trainings, tmp_path, capsys):
    trainings.failing["net3"] = CollapseError("all images, <every> one")
    with pytest.raises(
        JaxclustError, match=r"1 of 4 runs failed.*\n  net3 \(cluster.k=5, seed=0\): all images, <every> one"
    ) as error:
        start(tmp_path, "cluster.k=3,5", "seed=0,1")
    assert error.value.exit_code == 1 and len(trainings.done) == 4
    rows = table(tmp_path / "sweep.csv")
    assert [row["status"] for row in rows] == ["done", "done", "failed", "done"]
    assert rows[2]["failed"] == "all images, <every> one" and rows[2]["train/silhouette"] == ""
    assert [row["seeds"] for row in table(tmp_path / "summary.csv")] == ["2", "1"]
    assert capsys.readouterr().out.splitlines()[-1] == f"results: {tmp_path / 'report' / 'index.html'}"
    assert "all images, &lt;every&gt; one" in (tmp_path / "report" / "index.html").read_text()
    trainings.failing.clear()  # a new start tries again what failed, and that alone
    start(tmp_path, "cluster.k=3,5", "seed=0,1")
    assert trainings.done[4:] == ["net3"]
    assert [row["seeds"] for row in table(tmp_path / "summary.csv")] == ["2", "2"]


def test_all_runs_may_fail(trainings, tmp_path, capsys):
    trainings.failing = {f"net{number}": CollapseError("no") for number in (1, 2)}
    with pytest.raises(JaxclustError, match="2 of 2 runs failed"):
        start(tmp_path, "seed=0,1")
    assert "nothing to compare" in capsys.readouterr().out
    assert not (tmp_path / "report" / "sweep.png").exists()


def test_a_run_that_another_process_has_is_passed_over_and_taken_when_it_is_left(
    trainings, tmp_path, monkeypatch, capsys
):
    (tmp_path / "locks").mkdir()
    other = (tmp_path / "locks" / "net1.lock").open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            other.close()  # as when its process dies

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    start(tmp_path, "seed=0,1,2")
    assert trainings.done == ["net2", "net3", "net1"] and len(naps) == 3
    assert capsys.readouterr().out.count("waiting for another process, which has 1 of the 3 runs") == 1


def test_what_another_process_does_or_fails_at_meanwhile_is_not_done_again(trainings, tmp_path):
    config = small_config()

    def meanwhile(name):
        if name == "net1":
            trainings.during = lambda name: None
            for run in sweep.numbered(sweep.plan(config, {"seed": [1, 2]}), sweep.registered(tmp_path)):
                with sweep.locked(tmp_path / "locks" / f"{run.name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
                    assert mine
                trainings.failing = {"net3": CollapseError("no")}
                sweep.train_one(run, tmp_path)

    trainings.during = meanwhile
    with pytest.raises(JaxclustError, match=r"1 of 3 runs failed.*\n  net3 \(seed=2\): no"):
        start(tmp_path, "seed=0,1,2")
    assert trainings.done == ["net1", "net2", "net3"]


def test_what_failed_is_tried_again_by_one_of_two_that_start_after_it(trainings, tmp_path):
    config, goes_on = small_config(), SimpleNamespace(received=False)
    runs = sweep.register(config, tmp_path, {"seed": [0, 1]}, sweep.plan(config, {"seed": [0, 1]}))
    trainings.failing = {"net2": CollapseError("no")}
    sweep.train_one(runs[1], tmp_path)
    os.utime(tmp_path / "outcomes" / "net2.json", (1, 1))  # long ago

    def meanwhile(name):
        trainings.during = lambda name: None
        sweep.work(runs[1:], tmp_path, goes_on)  # as another process

    trainings.during, trainings.done = meanwhile, []
    sweep.work(runs, tmp_path, goes_on)
    assert trainings.done == ["net1", "net2"]
    sweep.work(runs, tmp_path, goes_on)  # a later start tries it again
    assert trainings.done == ["net1", "net2", "net2"]


def test_a_lock_is_held_by_one_and_freed_by_an_error(tmp_path):
    how = fcntl.LOCK_EX | fcntl.LOCK_NB
    with (
        pytest.raises(ZeroDivisionError),
        sweep.locked(tmp_path / "a", how) as mine,
        sweep.locked(tmp_path / "a", how) as two,
    ):
        assert mine and not two
        1 / 0  # noqa: B018
    with sweep.locked(tmp_path / "a", how) as mine:
        assert mine


def test_a_signal_ends_the_sweep_between_two_runs(trainings, tmp_path):
    trainings.during = lambda name: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="the same command goes on"):
        start(tmp_path, "seed=0,1")
    assert trainings.done == ["net1"] and not (tmp_path / "sweep.csv").exists()
    trainings.during = lambda name: None
    start(tmp_path, "seed=0,1")
    assert trainings.done == ["net1", "net2"]


def test_who_waits_for_another_process_obeys_a_signal(trainings, tmp_path, monkeypatch):
    naps = []
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: naps.append(os.kill(os.getpid(), signal.SIGTERM)))
    with (
        sweep.locked(tmp_path / "locks" / "net1.lock", fcntl.LOCK_EX) as mine,
        pytest.raises(Stopped, match="the same command goes on"),
    ):
        assert mine
        start(tmp_path, "seed=0")
    assert len(naps) == 1 and not trainings.done


def test_two_that_begin_at_once_may_not_want_different_things(trainings, tmp_path):
    config = small_config()
    (tmp_path / "locks").mkdir()
    (tmp_path / ".123.sweep.json").write_text("")  # which the other is writing
    sweep.check_workdir(config, tmp_path, {"seed": [0]})
    first = sweep.register(config, tmp_path, {"seed": [0]}, sweep.plan(config, {"seed": [0]}))
    second = sweep.register(config, tmp_path, {"seed": [5, 0]}, sweep.plan(config, {"seed": [5, 0]}))
    assert [[run.name for run in runs] for runs in (first, second)] == [["net1"], ["net2", "net1"]]
    assert report.read_plan(tmp_path).runs == {"net1": {"seed": 0}, "net2": {"seed": 5}}
    with pytest.raises(ConfigError, match="other settings"):
        sweep.register(small_config(model__width=4), tmp_path, {"seed": [0]}, [])


def test_two_that_ask_for_numbers_at_once_get_different_ones(trainings, tmp_path, monkeypatch):
    """A lock is of an open file, so threads stand for processes; without it both would read before either writes."""
    config, there, both = small_config(), sweep.registered, Barrier(2, timeout=0.5)
    plans = [sweep.plan(config, {"seed": [seed]}) for seed in range(2)]

    def registered(workdir):
        nets = there(workdir)
        with contextlib.suppress(BrokenBarrierError):  # with the lock the other cannot come
            both.wait()
        return nets

    monkeypatch.setattr(sweep, "registered", registered)
    with ThreadPoolExecutor(2) as pool:
        with sweep.locked(tmp_path / "locks" / "sweep.lock", fcntl.LOCK_EX):
            asked = [pool.submit(sweep.register, config, tmp_path, {"seed": []}, runs) for runs in plans]
        found = [run.name for future in asked for run in future.result()]
    assert sorted(found) == ["net1", "net2"]
    assert sorted(values["seed"] for values in report.read_plan(tmp_path).runs.values()) == [0, 1]


def test_another_process_may_write_the_sweep_while_this_one_looks_at_the_folder(trainings, tmp_path, monkeypatch):
    config, there = small_config(), Path.iterdir

    def looked(folder):  # the other is done by then
        if folder == tmp_path:
            monkeypatch.setattr(Path, "iterdir", there)
            (one,) = sweep.register(config, tmp_path, {"seed": [0]}, sweep.plan(config, {"seed": [0]}))
            sweep.train_one(one, tmp_path)
        return there(folder)

    monkeypatch.setattr(Path, "iterdir", looked)
    sweep.check_workdir(config, tmp_path, {"seed": [0]})
    assert trainings.done and (tmp_path / "net1").exists()


START_ONE = """
import sys
from pathlib import Path
from small import small_config
from jaxclust.jobs import sweep, train
from jaxclust.jobs.options import Options
from test_sweep import write_run
seed, workdir = sys.argv[1], Path(sys.argv[2])
train.run = lambda config, folder, options: write_run(folder, config)
sweep.check_runs = lambda *_: None
config = small_config()
config.sweep = f"seed={seed}"
Path(f"{workdir}-{seed}").touch()
sweep.run(config, workdir, Options())
"""


@pytest.mark.wide
def test_sweeps_started_at_once_number_their_nets_without_gaps_and_later_ones_go_on(trainings, tmp_path):
    workdir = tmp_path / "sweep"
    with sweep.locked(workdir / "locks" / "sweep.lock", fcntl.LOCK_EX):  # so that all four ask for a number at once
        started = [
            Process(START_ONE, (str(seed), str(workdir)), tmp_path / f"out{seed}", tmp_path / f"err{seed}")
            for seed in range(4)
        ]
        until(lambda: len([*tmp_path.glob("sweep-*")]) == 4)
    assert [process.wait(120) for process in started] == [0] * 4, [path.read_text() for path in tmp_path.glob("err*")]
    start(workdir, "seed=4..11")
    names = [f"net{number}" for number in range(1, 13)]
    assert trainings.done == names[4:] and folders(workdir) == set(names)
    plan = report.read_plan(workdir)
    assert list(plan.runs) == names and [values["seed"] for values in plan.runs.values()][4:] == [*range(4, 12)]
    assert sorted(values["seed"] for values in plan.runs.values()) == [*range(12)]
    for name, values in plan.runs.items():
        assert config_lib.load(workdir / name / "config.json").seed == values["seed"]
    assert [row["run"] for row in table(workdir / "sweep.csv")] == names


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# What is said of it.


def summarized(workdir, fields, runs):
    """The summary of made-up runs [(values, clusters, results)]."""
    for number, (values, clusters, results) in enumerate(runs, 1):
        name = report.name_of(number)
        overrides = {key.replace(".", "__"): value for key, value in values.items()}
        write_run(workdir / name, small_config(**overrides), clusters, **results)
        write_json(workdir / "outcomes" / f"{name}.json", {"status": "done", "why": ""})
    write_json(workdir / "sweep.json", {"fields": fields, "runs": [values for values, *_ in runs]})
    return report.write(workdir)


def test_the_summary_is_the_mean_over_seeds_and_the_agreement_between_them(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.integers(3, size=300)
    b, c, d = (np.where(rng.random(300) < 0.2, rng.integers(3, size=300), a) for _ in range(3))
    runs = [
        ({"cluster.k": 3, "seed": s}, x, {"train/silhouette": v}) for s, x, v in [(0, a, 0.1), (1, b, 0.2), (2, c, 0.6)]
    ]
    runs += [({"cluster.k": 20, "seed": 0}, d, {"train/silhouette": 0.4})]
    summary = summarized(tmp_path, ["cluster.k", "seed"], runs)
    three, twenty = table(tmp_path / "summary.csv")
    assert (three["cluster.k"], three["seeds"], twenty["cluster.k"], twenty["seeds"]) == ("3", "3", "20", "1")
    assert float(three["silhouette"]) == pytest.approx(0.3) and float(twenty["silhouette"]) == 0.4
    assert (
        float(three["silhouette_std"]) == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1))
        and twenty["silhouette_std"] == ""
    )
    pairs = [adjusted_rand_score(x, y) for x, y in [(a, b), (a, c), (b, c)]]
    assert float(three["stability"]) == pytest.approx(np.mean(pairs)) and twenty["stability"] == ""
    entropies = [-(p * np.log(p)).sum() / np.log(3) for p in (np.bincount(x) / 300 for x in (a, b, c))]
    assert float(three["normalised_entropy"]) == pytest.approx(np.mean(entropies))
    share = np.bincount(d) / 300  # three clusters of the twenty asked for
    assert float(twenty["normalised_entropy"]) == pytest.approx(-(share * np.log(share)).sum() / np.log(20))
    assert float(twenty["largest_share"]) == pytest.approx(share.max()) and float(twenty["clusters"]) == 3
    assert float(three["seconds"]) == 11 and float(three["seconds_std"]) == 1
    lines = summary.table.splitlines()
    assert len({len(line) for line in lines}) == 1 and re.search(r"^ *3 +3 +0.300 ± 0.265 +0\.\d{3} ", lines[1])
    assert "best silhouette: cluster.k=20 (0.400)" in summary.hint and "stability" not in summary.hint
    agreement = [np.mean(pairs[:2]), np.mean(pairs[::2]), np.mean(pairs[1:])]
    rows = table(tmp_path / "sweep.csv")
    assert [float(row["agreement"]) for row in rows[:3]] == pytest.approx(agreement) and rows[3]["agreement"] == ""
    chosen = f"of the 3 seeds with cluster.k=3 net{np.argmax(agreement) + 1} agrees most with the others"
    assert f"{chosen} ({max(agreement):.3f})" in summary.hint and np.argmax(agreement) != 2  # nor is it the last one


def test_a_number_of_clusters_that_nobody_asked_for_is_compared_with_what_was_found(tmp_path):
    runs = [
        ({"cluster.method": "pic", "seed": 0}, np.arange(40) % 20, {}),
        ({"cluster.method": "pic", "seed": 1}, np.zeros(40, int), {}),
    ]
    summarized(tmp_path, ["cluster.method", "seed"], runs)
    (row,) = table(tmp_path / "summary.csv")
    assert float(row["normalised_entropy"]) == pytest.approx(0.5)  # 1 for 20 even clusters, 0 for a single one


def test_what_is_missing_is_left_open(tmp_path):
    runs = [
        ({"sampler": name, "seed": s}, None, {"train/silhouette": None})
        for name in ("upstream", "uniform_image")
        for s in (0, 1)
    ]
    summary = summarized(tmp_path, ["seed", "sampler"], runs)
    (tmp_path / "outcomes" / "net2.json").unlink()
    summary = report.write(tmp_path)
    first, second = table(tmp_path / "summary.csv")
    assert [first["sampler"], second["sampler"]] == ["upstream", "uniform_image"]  # words as they were given
    assert (first["seeds"], first["silhouette"], first["stability"], second["stability"]) == ("1", "", "", "1")
    assert table(tmp_path / "sweep.csv")[1]["status"] == "not finished"
    assert " – " in summary.table and "nothing to compare" in summary.hint
    write_run(tmp_path / "net4", small_config(seed=1), np.arange(30) % 3)
    report.write(tmp_path)
    assert table(tmp_path / "summary.csv")[1]["stability"] == ""  # not of the same images
    cut = tmp_path / "net4" / "assignments.csv"
    cut.write_text(cut.read_text()[:-6])
    report.write(tmp_path)
    assert table(tmp_path / "summary.csv")[1]["stability"] == ""


@pytest.mark.parametrize("file", ["net2/config.json", "net2/results.json", "outcomes/net2.json"])
def test_a_run_with_a_torn_file_is_named_and_the_page_of_the_others_is_made(file, tmp_path):
    whole = summarized(tmp_path, ["cluster.k"], [({"cluster.k": k}, None, {}) for k in (3, 4, 5)])
    (tmp_path / file).write_text((tmp_path / file).read_text()[:20])
    summary = report.write(tmp_path)
    rows = table(tmp_path / "sweep.csv")
    status = "not finished" if "outcomes" in file else "damaged"
    assert [row["status"] for row in rows] == ["done", status, "done"]
    assert rows[1]["failed"].startswith(f"{tmp_path / file} is damaged") and rows[1]["train/silhouette"] == ""
    assert f"{tmp_path / file} is damaged" in summary.page.read_text()
    assert [row["seeds"] for row in table(tmp_path / "summary.csv")] == ["1", "0", "1"]
    assert summary.table.splitlines()[3] == whole.table.splitlines()[3]


def test_no_label_reaches_table_plot_or_hint(tmp_path):
    runs = [
        ({"cluster.k": k, "seed": s}, None, {"train/acc": 0.1 * k, "train/nmi": 0.5}) for k in (3, 5) for s in (0, 1)
    ]
    before = summarized(tmp_path, ["cluster.k", "seed"], runs)
    files = [*tmp_path.glob("report/*"), tmp_path / "summary.csv"]
    assert {path.name for path in files} == {"index.html", "sweep.png", "sweep-dark.png", "summary.csv"}
    contents = [path.read_bytes() for path in files]
    runs = [(values, clusters, {"train/acc": 0.9 - results["train/acc"]}) for values, clusters, results in runs]
    assert summarized(tmp_path, ["cluster.k", "seed"], runs) == before
    assert [path.read_bytes() for path in files] == contents
    assert [row["train/acc"] for row in table(tmp_path / "sweep.csv")] == ["0.6", "0.6", "0.4", "0.4"]


def test_groups_that_were_told_apart_stand_in_a_table_of_medians_and_ranges_of_their_own(tmp_path):
    runs = [
        ({"batch_size": size, "seed": seed}, None,
         {"test/binary": 0.9 + seed / 100, "train/binary": 0.0, "train/acc_p": seed / size, "test/acc_n": 0.2})
        for size in (4, 64) for seed in (0, 1, 5)
    ]  # fmt: skip
    summary = summarized(tmp_path, ["batch_size", "seed"], runs)
    first, second = summary.table.split("\n\n")
    assert "binary" not in first and "acc" not in first and "binary" not in summary.hint
    lines = [re.split(r"  +", line.strip()) for line in second.splitlines()]
    assert lines[0] == ["batch_size", "seeds", "test/binary", "train/acc_p", "test/acc_n"]
    assert lines[1] == ["4", "3", "0.910 (0.900 to 0.950)", "0.250 (0.000 to 1.250)", "0.200 (0.200 to 0.200)"]
    row = table(tmp_path / "summary.csv")[1]
    assert [float(row[f"test/binary_{part}"]) for part in ("median", "low", "high")] == pytest.approx([0.91, 0.9, 0.95])
    panels = report._judged_panels(plan := report.read_plan(tmp_path), report.summarize(
        tmp_path, report.by_values(plan, report.read_rows(tmp_path, plan))))  # fmt: skip
    assert [panel.title.rpartition(", ")[2] for panel in panels] == ["test", "train", "test"]
    (line,) = panels[0].series
    assert (list(line.x), line.y) == ([4, 64], pytest.approx([0.91, 0.91]))
    assert (line.below, line.above) == (pytest.approx([0.01, 0.01]), pytest.approx([0.04, 0.04]))
    page = (tmp_path / "report" / "index.html").read_text()
    assert {"judged.png", "judged-dark.png", "../net6/report/index.html"} <= set(Page(page).links)
    with Image.open(tmp_path / "report" / "judged.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


class Page(HTMLParser):
    """Links of a page."""

    def __init__(self, text):
        super().__init__()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset")]


@pytest.mark.parametrize(
    "x",
    [
        [1e-4, 1e-3, 1.0, 0.0],
        ["$\\frac{", "a" * 90, "漢"],
        ["one"],
        *(pytest.param(x, marks=pytest.mark.wide) for x in ([5, 10, 20], [*range(2, 60)], [True, False])),
    ],
)
def test_a_plot_of_any_values_is_drawn_without_a_warning(x, tmp_path):
    rng = np.random.default_rng(0)
    for lines, theme in ((1, figures.LIGHT), (2, figures.DARK), (9, figures.LIGHT)):
        series = [
            sweep_figure.Series(
                f"sampler={i} {'x' * 100}" if lines > 1 else "", x, rng.normal(size=len(x)), *[[np.nan] * len(x)] * 2
            )
            for i in range(lines)
        ]
        panels = [sweep_figure.Panel(f"panel {i}", series, i == 1) for i in range(5)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figures.save(sweep_figure.draw(panels, "cluster.k", theme), tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 3


def test_numbers_lie_on_an_axis_that_is_logarithmic_when_they_are_wide():
    def axis(x):
        series = [sweep_figure.Series("", x, [0.5] * len(x), [0.1] * len(x), [0.2] * len(x))]
        axes = sweep_figure.draw([sweep_figure.Panel("a", series)], "cluster.k").axes[0]
        return axes.get_xscale(), [text.get_text() for text in axes.get_xticklabels()]

    assert axis([5, 10, 20]) == ("linear", ["5", "10", "20"])
    assert axis([5, 10, 100]) == ("log", ["5", "10", "100"])
    assert axis([0.0, 1e-3, 1.0])[0] == "linear"
    assert axis(["cosine", "none"])[1] == ["cosine", "none"]
    assert len(axis(list(range(2, 60)))[1]) <= 7


# The real thing, small.


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    """A sweep that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("sweeps") / "done"
    assert swept(workdir, digits, GRID) == 0
    return workdir


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """The same over two seeds."""
    workdir = tmp_path_factory.mktemp("sweeps") / "whole"
    assert swept(workdir, digits, WHOLE) == 0
    return workdir


@pytest.mark.medium
def test_a_sweep_leaves_runs_tables_and_a_plot(done, digits, capsys):
    assert folders(done) == {"net1", "net2"}
    rows = table(done / "sweep.csv")
    for row in rows:
        results = json.loads((done / row["run"] / "results.json").read_text())
        assert {"train/silhouette", "train/entropy", "train/largest_share", "train/acc"} <= results.keys()
        assert all(float(row[name]) == pytest.approx(value) for name, value in results.items())
        assert -1 <= results["train/silhouette"] <= 1 and results["clusters"] == int(row["cluster.k"])
        metrics = [json.loads(line) for line in (done / row["run"] / "metrics.jsonl").read_text().splitlines()]
        assert all("train/silhouette" in record for record in metrics)
    summary = table(done / "summary.csv")
    assert [row["cluster.k"] for row in summary] == ["3", "4"] and not any("acc" in name for name in summary[0])
    with Image.open(done / "report" / "sweep.png") as image:
        assert min(image.size) > 150 and np.asarray(image.convert("L")).std() > 10
    links = Page((done / "report" / "index.html").read_text()).links
    assert len(links) == 6 and all((done / "report" / unquote(link)).exists() for link in links)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in done.rglob("net*/*")}
    assert swept(done, digits, GRID) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    assert {path: path.stat().st_mtime_ns for path in done.rglob("net*/*")} == before
    assert len(printed) == 5 and printed[0].split()[:3] == ["cluster.k", "seeds", "silhouette"]
    assert "best silhouette" in printed[3] and printed[4] == f"results: {done / 'report' / 'index.html'}"


@pytest.mark.wide
def test_stability_is_the_agreement_of_the_seeds(whole):
    of_three = [[int(row["cluster"]) for row in table(whole / name / "assignments.csv")] for name in ("net1", "net2")]
    summary = table(whole / "summary.csv")
    assert float(summary[0]["stability"]) == pytest.approx(adjusted_rand_score(*of_three)) and len(summary) == 2


@pytest.mark.wide
def test_torn_files_of_a_finished_net_are_said_by_name_with_what_to_do(done, digits, tmp_path, capsys):
    workdir = tmp_path / "sweep"
    shutil.copytree(done, workdir)
    config, results = workdir / "net1" / "config.json", workdir / "net2" / "results.json"
    whole, found = config.read_bytes(), json.loads(results.read_text())
    config.write_bytes(whole[: len(whole) // 2])
    results.write_bytes(results.read_bytes()[:-20])
    before = {path: path.read_bytes() for path in (workdir / "net1").rglob("*") if path.is_file()}
    assert swept(workdir, digits, GRID) == 1
    said = capsys.readouterr()
    assert re.search(
        rf"2 of 2 runs failed.*\n  net1 \(cluster.k=3, seed=0\): {config} is damaged, such as by a copy.*"
        rf"Restore it from a copy, or delete {workdir / 'net1'} to start anew\n"
        rf"  net2 \(cluster.k=4, seed=0\): {results} is damaged, .* or delete it: the same training",
        said.err,
    ), said.err
    assert "Traceback" not in said.err and [row["status"] for row in table(workdir / "sweep.csv")] == ["failed"] * 2
    assert {path: path.read_bytes() for path in (workdir / "net1").rglob("*") if path.is_file()} == before
    config.write_bytes(whole)
    results.unlink()
    assert swept(workdir, digits, GRID) == 0
    again = json.loads(results.read_text())
    assert 0 < again["seconds"] <= found["seconds"]  # until its last record
    assert again == pytest.approx(found | {"seconds": again["seconds"]})
    assert [row["status"] for row in table(workdir / "sweep.csv")] == ["done", "done"]
    assert (workdir / "net1" / "assignments.csv").read_bytes() == (done / "net1" / "assignments.csv").read_bytes()


@pytest.mark.medium
def test_a_run_of_a_sweep_can_be_looked_at_alone(done, tmp_path):
    single = done / "net1"
    before = (single / "results.json").read_bytes()
    assert run("--job=evaluate", f"--workdir={single}") == 0
    assert (single / "results.json").read_bytes() == before


@pytest.mark.wide
def test_a_loss_that_is_not_finite_fails_alone(digits, tmp_path, capsys):
    arguments = ["--config.sweep=optimizer.body.lr=1e30,1e-3", "--config.optimizer.body.name=sgd"]
    assert swept(tmp_path / "sweep", digits, *arguments) == 1
    assert re.search(
        r"1 of 2 runs failed.*\n  net1 \(optimizer.body.lr=1e\+30\): .*not finite", capsys.readouterr().err
    )
    assert [row["status"] for row in table(tmp_path / "sweep" / "sweep.csv")] == ["failed", "done"]


@pytest.mark.wide
def test_a_signal_before_or_after_the_steps_of_a_run_ends_the_sweep_too(digits, tmp_path, monkeypatch):
    arguments = ["--config.sweep=cluster.k=3;seed=0,1"]
    for module, moment in ((train, "open_source"), (train.evaluate, "write_results")):
        function, calls = getattr(module, moment), []

        def signalled(*arguments, function=function, calls=calls):
            calls.append(arguments)
            os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(module, moment, signalled)
            assert swept(tmp_path / "sweep", digits, *arguments) == 75 and len(calls) == 1
        trained = tmp_path / "sweep" / "outcomes" / "net1.json"
        assert trained.exists() == (moment == "write_results")
    assert swept(tmp_path / "sweep", digits, *arguments) == 0


def process(workdir, digits, *over):
    return jaxclust(
        *SHORT, digits, "--job=sweep", f"--workdir={workdir}", *over, "--config.runtime.devices=1", count=1, devices=8
    )


def assert_same_runs(names, whole, workdir):
    """`names`: of each net the one in `whole` with the same values."""
    assert folders(workdir) == set(names)
    for name, same in names.items():
        assert (workdir / name / "assignments.csv").read_bytes() == (whole / same / "assignments.csv").read_bytes()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((signal.SIGKILL, -9), marks=pytest.mark.slow),
        pytest.param((signal.SIGTERM, 75), marks=pytest.mark.wide),
    ],
)
def stopped(request, tmp_path_factory):
    """Half of a sweep, on images with wrong labels, that a signal ended in its second run; then the other half."""
    number, code = request.param
    folder = tmp_path_factory.mktemp("stopped")
    split = few_digits(200).splits["train"]
    np.savez(folder / "digits.npz", images=split.images, labels=np.random.default_rng(0).permutation(split.labels))
    source, over = f"--config.data.source=npz:{folder / 'digits.npz'}", "--config.sweep=cluster.k=3;seed=0,1"
    with process(folder / "sweep", source, over) as first:
        first.wait_for(0, r"\[2/2\] net2 .*deepcluster 1/2")
        first.processes[0].send_signal(number)
        (ended,) = first.finish()
    assert ended.code == code, ended
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert swept(folder / "sweep", source, over) == 0
    return folder / "sweep", output.getvalue()


def test_a_sweep_that_was_stopped_goes_on(stopped, whole):
    workdir, output = stopped
    assert "[1/2]" not in output and "deepcluster: going on from step" in output
    assert_same_runs({"net1": "net1", "net2": "net2"}, whole, workdir)


def test_the_summary_of_permuted_labels_is_the_same(stopped, whole):
    def of_three(file):
        rows = [[row for row in table(workdir / file) if row["cluster.k"] == "3"] for workdir in (stopped[0], whole)]
        assert rows[0] and len(rows[0]) == len(rows[1])
        return rows

    wrong, true = (
        [{k: v for k, v in row.items() if "seconds" not in k} for row in rows] for rows in of_three("summary.csv")
    )
    assert wrong == true
    accuracies = [[row["train/acc"] for row in rows] for rows in of_three("sweep.csv")]
    assert accuracies[0] != accuracies[1]


@pytest.mark.slow
def test_two_processes_share_a_sweep_and_train_each_run_once(whole, digits, tmp_path):
    names, over = ["net1", "net2"], "--config.sweep=cluster.k=3,4;seed=0"
    with process(tmp_path / "sweep", digits, over) as one, process(tmp_path / "sweep", digits, over) as two:
        with contextlib.ExitStack() as locks:  # so that both begin at the same moment
            for name in names:
                locks.enter_context(sweep.locked(tmp_path / "sweep" / "locks" / f"{name}.lock", fcntl.LOCK_EX))
            for started in (one, two):
                started.wait_for(0, "waiting for another process")
        outputs = [host.out for started in (one, two) for host in all_well(started, 400)]
    trained = [re.findall(r"\[\d/2\] (\S+)", output) for output in outputs]
    assert sorted(trained[0] + trained[1]) == names and all(trained)
    assert all(line.startswith("results: ") for line in (output.splitlines()[-1] for output in outputs))
    assert_same_runs({"net1": "net1", "net2": "net3"}, whole, tmp_path / "sweep")
    assert [row["status"] for row in table(tmp_path / "sweep" / "sweep.csv")] == ["done"] * 2
