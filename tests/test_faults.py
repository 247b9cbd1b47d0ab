"""Real signals to real processes: a run that was killed and started again ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

# Dies by SIGKILL at a chosen moment: in the middle of the n-th clustering, step or save.
DRIVER = """
import os, signal, sys, threading, time
from pathlib import Path

moment, count = sys.argv[1], int(sys.argv[2])
calls = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying(function):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            args[-1].after() if hasattr(args[-1], "after") else die()
        return function(*args, **kwargs)
    return wrapper

def die_while_saving(function):
    def wrapper(self, step, snapshot):
        global calls
        calls += 1
        folder = self._folder
        def watch():
            while not list(folder.glob("*tmp*/**/*")):
                pass
            die()
        if calls == count:
            threading.Thread(target=watch, daemon=True).start()
        return function(self, step, snapshot)
    return wrapper

from jaxclust import main
if moment == "clustering":
    from jaxclust.cluster import kmeans_faiss
    kmeans_faiss._engine = dying(kmeans_faiss._engine)
if moment == "step":
    from jaxclust.data import sampler
    from jaxclust.train import loop
    loop.ImageRows.add = dying(loop.ImageRows.add)
if moment == "save":
    from jaxclust.train import checkpoint
    checkpoint.Checkpoints.save = die_while_saving(checkpoint.Checkpoints.save)
sys.exit(main.main(["jaxclust", *sys.argv[3:]]))
"""
ARGUMENTS = [
    "--config=configs/deepcluster.py:smoke", "--config.rounds=3", "--config.batch_size=128",
    # A cosine would depend on how many rounds there will be.
    "--config.optimizer.body.schedule=none",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.getcwd()}


def start(workdir, *arguments, moment="never", count=0):
    command = [sys.executable, "-c", DRIVER, moment, str(count), *ARGUMENTS, f"--workdir={workdir}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def outcome(workdir):
    """All that a run leaves, times aside."""
    folder = workdir / "checkpoints" / "deepcluster"
    manager = ocp.CheckpointManager(folder.absolute(), item_handlers=ocp.StandardCheckpointHandler())
    arrays = manager.restore(manager.latest_step())
    results = json.loads((workdir / "results.json").read_text())
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    untimed = [{k: v for k, v in m.items() if k not in ("time", "images_per_second")} for m in metrics]
    rounds = {path.name: dict(np.load(path)) for path in (workdir / "assignments" / "deepcluster").glob("*.npz")}
    del results["seconds"]
    return arrays, (workdir / "assignments.csv").read_bytes(), results, untimed, rounds


def assert_same_outcome(a, b):
    arrays, csv, results, metrics, rounds = outcome(a)
    other_arrays, *others = outcome(b)
    assert others[:3] == [csv, results, metrics]
    assert rounds.keys() == others[3].keys() == {f"{i}.npz" for i in range(4)}
    for name in rounds:
        for key in rounds[name]:
            np.testing.assert_array_equal(rounds[name][key], others[3][name][key])
    assert arrays.keys() == other_arrays.keys()
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], other_arrays[name], err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    code, output = finish(start(workdir))
    assert code == 0, output
    return workdir


@pytest.mark.medium
def test_killed_in_a_step_a_save_and_a_clustering(uninterrupted, tmp_path):
    workdir = tmp_path / "killed"
    for moment, count in (("step", 20), ("save", 2), ("clustering", 1), ("step", 3)):
        code, output = finish(start(workdir, moment=moment, count=count))
        assert code == -signal.SIGKILL, (moment, output)
        assert not (workdir / "results.json").exists()
    code, output = finish(start(workdir))
    assert code == 0, output
    assert "going on from step" in output
    assert_same_outcome(uninterrupted, workdir)


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGTERM, marks=pytest.mark.medium), pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
)
def test_a_signal_saves_once_and_exits_75(uninterrupted, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = start(workdir, "--config.save_every=never")
    for line in process.stdout:
        if line.startswith("deepcluster 1/3"):
            break
    process.send_signal(number)
    code, output = finish(process)
    assert code == 75, output
    assert "the same command goes on" in output
    assert len([p for p in (workdir / "checkpoints" / "deepcluster").iterdir() if p.name.isdigit()]) == 1
    code, output = finish(start(workdir, "--config.save_every=never"))
    assert code == 0, output
    assert_same_outcome(uninterrupted, workdir)


@pytest.mark.medium
def test_more_rounds_later_equal_more_rounds_at_once(uninterrupted, tmp_path):
    workdir = tmp_path / "extended"
    for rounds in ("--config.rounds=1", "--config.rounds=3"):
        code, output = finish(start(workdir, rounds))
        assert code == 0, output
    assert_same_outcome(uninterrupted, workdir)


@pytest.mark.medium
def test_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    before = outcome(uninterrupted)
    began = time.monotonic()
    code, output = finish(start(uninterrupted))
    assert code == 0, output
    assert "finished" in output and time.monotonic() - began < 60
    assert str(outcome(uninterrupted)) == str(before)
