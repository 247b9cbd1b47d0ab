"""launch/slurm.sbatch in a real Slurm: stopped, requeued, and finished as if nothing had happened."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from one_node_slurm import missing, one_node_slurm
from runs import ARGUMENTS, ROUNDS, outcome

pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"not installed: {', '.join(missing())}; apt-get install slurm-wlm munge"
)
SCRIPT = Path("launch/slurm.sbatch").absolute()
OPTIONS = ("--ntasks-per-node=2", "--cpus-per-task=1", "--time=20")
# Stands in for python: says when it starts, and stops after saving the first time it is told to. Slurm signals what a
# task started too, so the task must not wait for the end of anything.
STUB = """#!/bin/bash
trap 'echo "task $SLURM_PROCID stops"; exit 75' TERM
echo "task $SLURM_PROCID of $SLURM_NTASKS, start ${SLURM_RESTART_COUNT:-0}: $*"
while [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; do sleep 0.1; done
"""


class Slurm:
    """What a user types."""

    def __init__(self, environment, folder):
        self.environment, self.folder = environment, folder

    def command(self, *words, **options):
        return subprocess.run(
            words, env=self.environment, check=True, capture_output=True, text=True, timeout=60, **options
        ).stdout

    def submit(self, name, *options, arguments=(), cwd=None):
        options = (*OPTIONS, f"--output={self.log(name)}", *options)
        return self.command("sbatch", "--parsable", *options, str(SCRIPT), *arguments, cwd=cwd).strip()

    def log(self, name):
        return self.folder / f"{name}.log"

    def state(self, job):
        pairs = (word.partition("=") for word in self.command("scontrol", "show", "job", job).split())
        return {name: value for name, _, value in pairs}

    def wait_for_words(self, job, name, *words, seconds=180):
        deadline = time.monotonic() + seconds
        while not (self.log(name).exists() and all(word in self.log(name).read_text() for word in words)):
            assert time.monotonic() < deadline, self.said(job, name)
            assert self.state(job)["JobState"] in ("PENDING", "RUNNING"), self.said(job, name)
            time.sleep(0.2)

    def wait_for_end(self, job, name, seconds=300):
        deadline = time.monotonic() + seconds
        while self.state(job)["JobState"] in ("PENDING", "RUNNING", "REQUEUED", "COMPLETING"):
            assert time.monotonic() < deadline, self.said(job, name)
            time.sleep(0.5)
        return self.state(job)

    def said(self, job, name):
        log = self.log(name).read_text() if self.log(name).exists() else "nothing"
        return f"{self.state(job)}\n{log}"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with one_node_slurm() as environment:
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment["JAX_PLATFORMS"] = "cpu"
        environment["PYTHONPATH"] = os.getcwd()
        yield Slurm(environment, tmp_path_factory.mktemp("logs"))


@pytest.fixture
def stubbed(tmp_path):
    """A folder to submit from, whose .venv has the stub."""
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    return tmp_path


def test_every_task_gets_the_arguments_and_the_time_limit_stops_and_requeues(slurm, stubbed):
    # The signal comes 15 seconds before the limit, or up to 30 earlier: Slurm looks twice a minute.
    arguments = ("--config=x", "--workdir=a folder")
    job = slurm.submit("limit", "--time=1", "--signal=TERM@15", arguments=arguments, cwd=stubbed)
    state = slurm.wait_for_end(job, "limit")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), slurm.said(job, "limit")
    log = slurm.log("limit").read_text()
    for task in (0, 1):
        for start in (0, 1):
            words = f"task {task} of 2, start {start}: -m jaxclust.main --config=x --workdir=a folder"
            assert log.count(words) == 1, log
        assert log.count(f"task {task} stops") == 1, log
    assert log.count("back into the queue") == 1


def test_a_cancelled_job_stays_cancelled(slurm, stubbed):
    job = slurm.submit("cancelled", cwd=stubbed)
    slurm.wait_for_words(job, "cancelled", "task 0", "task 1")
    slurm.command("scancel", job)
    state = slurm.wait_for_end(job, "cancelled")
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "0"), slurm.said(job, "cancelled")


def test_a_job_that_was_stopped_goes_on_to_the_results_of_one_that_was_not(slurm, tmp_path):
    workdirs = {name: tmp_path / name for name in ("whole", "stopped")}
    for name, workdir in workdirs.items():
        job = slurm.submit(name, arguments=(*ARGUMENTS, f"--workdir={workdir}"))
        if name == "stopped":
            slurm.wait_for_words(job, name, f"deepcluster 2/{ROUNDS}")
            slurm.command("scancel", "--signal=TERM", job)
        state = slurm.wait_for_end(job, name)
        assert state["JobState"] == "COMPLETED", slurm.said(job, name)
        assert state["Restarts"] == str(int(name == "stopped")), slurm.said(job, name)
    log = slurm.log("stopped").read_text()
    assert "back into the queue" in log and "going on from step" in log
    assert outcome(workdirs["stopped"]) == outcome(workdirs["whole"])
