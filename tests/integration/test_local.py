"""launch/local.sh with real processes."""

import os
import signal
import subprocess
import sys
import time

from runs import ARGUMENTS, ROUNDS, outcome


def start(log, workdir, *arguments):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": os.getcwd()}
    command = ["launch/local.sh", "2", *ARGUMENTS, f"--workdir={workdir}", *arguments]
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def wait_for(words, log, process):
    deadline = time.monotonic() + 200
    while words not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def test_a_run_that_ctrl_c_stopped_goes_on_to_the_results_of_one_that_was_not(tmp_path):
    log = tmp_path / "log"
    assert start(log, tmp_path / "whole").wait(300) == 0, log.read_text()
    assert log.read_text().count("centroids are uncertain") == 1, log.read_text()  # host 0 warns for all
    process = start(log, tmp_path / "stopped")
    wait_for(f"deepcluster 2/{ROUNDS}", log, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(200) == 75, log.read_text()
    assert log.read_text().count("with everything saved") == 1, log.read_text()
    assert start(log, tmp_path / "stopped").wait(300) == 0, log.read_text()
    assert "going on from step" in log.read_text()
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


def test_a_wrong_setting_is_said_once_with_its_exit_code(tmp_path):
    log = tmp_path / "log"
    assert start(log, tmp_path / "run", "--config.batch_size=3").wait(200) == 2, log.read_text()
    assert log.read_text().count("config.batch_size=3 must divide by 2 devices") == 1, log.read_text()
    assert not (tmp_path / "run" / "results.json").exists()
