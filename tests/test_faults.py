"""Real signals to real processes: a run that was killed and started again ends as if nothing had happened."""

import json
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from host_runs import jaxclust, snippet
from small import run

# Dies by SIGKILL at a chosen moment: in the middle of the n-th clustering, search for neighbours, step or save.
DRIVER = """
import os, signal, threading

moment, count = sys.argv[1], int(sys.argv[2])
calls = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            die()
        return function(*args, **kwargs)
    return wrapper

def die_while_saving(function):
    def wrapper(self, *saved):
        global calls
        calls += 1
        folder = self._folder
        def watch():
            while not list(folder.glob("*tmp*/**/*")):
                pass
            die()
        if calls == count:
            threading.Thread(target=watch, daemon=True).start()
        return function(self, *saved)
    return wrapper

from jaxclust import main
from jaxclust.cluster import kmeans_faiss
from jaxclust.methods import reliable
from jaxclust.train import checkpoint, loop
if moment == "clustering":
    kmeans_faiss.engine = dying(kmeans_faiss.engine)
if moment == "neighbours":
    reliable.neighbours = dying(reliable.neighbours)
if moment == "step":
    loop.ImageRows.add = dying(loop.ImageRows.add)
if moment == "save":
    checkpoint.Checkpoints.save = die_while_saving(checkpoint.Checkpoints.save)
sys.exit(main.main(["jaxclust", *sys.argv[3:]]))
"""
ARGUMENTS = [
    "--config=configs/deepcluster.py:smoke", "--config.rounds=3", "--config.batch_size=128",
    "--config.model.blocks=1", "--config.runtime.devices=1",
    # A cosine would depend on how many rounds there will be.
    "--config.optimizer.body.schedule=none",
]  # fmt: skip


def go_on(workdir, *arguments):
    """The same command in this process, where nothing ends it."""
    assert run(*ARGUMENTS, f"--workdir={workdir}", *arguments) == 0


def outcome(workdir, stage="deepcluster"):
    """All that a run leaves of a stage, times aside; of a method that predicts no cluster there is no table."""
    folder = workdir / "checkpoints" / stage
    manager = ocp.CheckpointManager(folder.absolute(), item_handlers=ocp.StandardCheckpointHandler())
    arrays = manager.restore(manager.latest_step())
    results = json.loads((workdir / "results.json").read_text())
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    untimed = [{k: v for k, v in m.items() if k not in ("time", "seconds", "images_per_second")} for m in metrics]
    rounds = {path.name: dict(np.load(path)) for path in (workdir / "assignments" / stage).glob("*.npz")}
    del results["seconds"]
    tables = {path.name: path.read_bytes() for path in (*workdir.glob("assignments.csv"), *workdir.glob("scores/*"))}
    return arrays, tables, results, untimed, rounds


def assert_same_outcome(a, b, stage="deepcluster", numbers=range(4)):
    arrays, tables, results, metrics, rounds = outcome(a, stage)
    other_arrays, *others = outcome(b, stage)
    assert others[:3] == [tables, results, metrics]
    assert rounds.keys() == others[3].keys() == {f"{i}.npz" for i in numbers}
    for name in rounds:
        for key in rounds[name]:
            np.testing.assert_array_equal(rounds[name][key], others[3][name][key])
    assert arrays.keys() == other_arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], other_arrays[name], err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    go_on(workdir)
    return workdir


@pytest.mark.medium
@pytest.mark.parametrize(
    "deaths",
    [
        pytest.param([("save", 2)], id="save"),  # what is half written must not pass for a checkpoint
        pytest.param([("step", 20), ("save", 2), ("clustering", 1)], id="each", marks=pytest.mark.wide),
    ],
)
def test_killed_it_goes_on_to_the_same(uninterrupted, tmp_path, capsys, deaths):
    workdir = tmp_path / "killed"
    for moment, count in deaths:
        with snippet(DRIVER, moment, count, *ARGUMENTS, f"--workdir={workdir}", count=1, devices=8) as started:
            (ended,) = started.finish()
        assert ended.code == -signal.SIGKILL, (moment, ended)
        assert not (workdir / "results.json").exists()
    go_on(workdir)
    assert "going on from step" in capsys.readouterr().out
    assert_same_outcome(uninterrupted, workdir)


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, marks=pytest.mark.medium), pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_saves_once_and_exits_75(uninterrupted, tmp_path, number):
    workdir = tmp_path / "stopped"
    arguments = [*ARGUMENTS, f"--workdir={workdir}", "--config.save_every=never"]
    with jaxclust(*arguments, count=1, devices=8) as started:
        started.wait_for(0, "deepcluster 1/3")
        started.processes[0].send_signal(number)
        (ended,) = started.finish()
    assert ended.code == 75, ended
    assert "the same command goes on" in ended.err
    assert len([p for p in (workdir / "checkpoints" / "deepcluster").iterdir() if p.name.isdigit()]) == 1
    go_on(workdir, "--config.save_every=never")
    assert_same_outcome(uninterrupted, workdir)


@pytest.mark.wide
def test_more_rounds_later_equal_more_rounds_at_once(uninterrupted, tmp_path):
    for rounds in ("--config.rounds=1", "--config.rounds=3"):
        go_on(tmp_path / "extended", rounds)
    assert_same_outcome(uninterrupted, tmp_path / "extended")


@pytest.mark.medium
def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, capsys):
    before = outcome(uninterrupted)
    began = time.monotonic()
    go_on(uninterrupted)
    assert "finished" in capsys.readouterr().out and time.monotonic() - began < 60
    assert str(outcome(uninterrupted)) == str(before)


def code(moment, count, command, workdir):
    """How a command that the driver watches over ends."""
    arguments = (command, "--config.runtime.devices=1", f"--workdir={workdir}")
    with snippet(DRIVER, moment, count, *arguments, count=1, devices=8) as started:
        (ended,) = started.finish(timeout=300)
    return ended.code


@pytest.mark.slow
def test_spice_killed_in_each_stage_goes_on_to_the_same(tmp_path):
    command = "--config=configs/spice.py:smoke"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert code("never", 0, command, whole) == 0
    stages = ("moco", "embed", "self", "reliable", "semi")
    deaths = [("step", 25), ("clustering", 1), ("step", 10), ("neighbours", 1), ("step", 5)]
    for (moment, count), stage in zip(deaths, stages, strict=True):  # those with steps have 40, saved after 20
        assert code(moment, count, command, killed) == -signal.SIGKILL
        assert [name for name in stages if (killed / "checkpoints" / name).exists()][-1] == stage
    assert code("never", 0, command, killed) == 0
    numbers = {"embed": [0], "self": range(3), "reliable": [0], "semi": range(1, 3)}  # an untrained network has none
    for stage, own in numbers.items():
        assert_same_outcome(whole, killed, stage, own)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "steps"), [("dscl", 10), ("clustnet", 20)])
def test_what_learns_from_labels_killed_in_a_step_and_a_save_goes_on_to_the_same(stage, steps, tmp_path):
    command = f"--config=configs/{stage}.py:smoke"  # of two rounds of so many steps
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert code("never", 0, command, whole) == 0
    for moment, count in (("step", steps + 5), ("save", 1), ("step", steps - 5)):
        assert code(moment, count, command, killed) == -signal.SIGKILL
        saved = [int(path.name) for path in (killed / "checkpoints" / stage).iterdir() if path.name.isdigit()]
        assert 0 < max(saved) < 2 * steps
    assert code("never", 0, command, killed) == 0
    assert_same_outcome(whole, killed, stage, [])
    scores = {path.name for path in (whole / "scores").glob("*")}
    assert len(scores) == (5 if stage == "clustnet" else 0)  # of the untrained network, and two of each round
