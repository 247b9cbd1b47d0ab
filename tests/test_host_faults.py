"""Hosts that die, hang, fail or are told to stop: all end in time, with one reason, and nothing is lost."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import host_runs
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.clusters import cloud_tpu_cluster
from PIL import Image
from small import few_digits

from jaxclust import heartbeats, hosts, main, runtime
from jaxclust.errors import ConfigError
from jaxclust.heartbeats import End, Heartbeats, Place
from jaxclust.progress import progress

HEARTBEAT = 2.0
MARGIN = 8.0  # seconds for the looks of the watch, its last words, and hosts that share one core

# --- heartbeats, hand in hand with a store that is a dictionary ---


class Store:
    """The key-value store of a job, in this process."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def blocking_key_value_get(self, key, milliseconds):
        return self.values[key]


def watches(count, heartbeat=6.0):
    store = Store()
    return [Heartbeats(Place("first:1234", count, index), store, heartbeat) for index in range(count)]


def seconds_until(watch, others, passing=1.0):
    """How long it takes `watch`, which talks at every look like the `others`, to find a reason to end."""
    for look in range(1, 100):
        for other in (*others, watch):
            other.talk()
        if end := watch.look(passing):
            return look * passing, end
    raise AssertionError("never")


def test_a_silent_host_is_lost_after_the_heartbeat_and_named():
    first, second, third = watches(3)
    for watch in (first, second, third):
        watch.talk()
    assert first.look(1.0) is None
    seconds, end = seconds_until(first, [third])
    assert 6.0 <= seconds <= 8.0
    assert end == End(1, 1, "is lost: no sign of life for 6 s")
    seconds, end = seconds_until(second, [])
    assert end == End(1, 0, f"is lost, and so is host 2 ({os.uname().nodename}): no sign of life for 6 s")


def test_a_host_that_never_came_is_lost_too():
    first, _ = watches(2)
    assert seconds_until(first, [])[1] == End(1, 1, "is lost: no sign of life for 6 s")


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.floats(0.1, 1.0)), min_size=1, max_size=60))
def test_hosts_that_talk_in_time_are_never_lost(turns):
    first, second = watches(2)
    silent = 0.0
    for talks, passed in turns:
        silent = 0.0 if talks or silent + passed > 4.0 else silent + passed
        if silent == 0.0:
            second.talk()
        first.talk()
        assert first.look(passed) is None


def test_a_store_without_an_answer_is_host_0_and_the_others_are_not_blamed():
    first, second, third = watches(3)
    for watch in (first, second, third):
        watch.talk()
    assert second.look(1.0) is None
    ends = [second.look(1.0) for _ in range(7)]  # without talking: its call hangs
    assert ends[:5] == [None] * 5
    assert ends[6] == End(1, 0, "at first:1234 does not answer: no sign of life for 6 s")
    for watch in (third, second):
        watch.talk()
    assert second.look(1.0) is None, "it answers again, and nobody was silent"


def test_the_end_of_a_host_reaches_all_with_its_code_and_cause():
    first, second, third = watches(3)
    second.end = End(3, 1, "ended: torn.png")
    second.talk()
    first.talk()
    assert first.look(0.1) == End(3, 1, "ended: torn.png")
    first.end = first.look(0.1)
    first.talk()
    store = first._store
    store.values = {key: value for key, value in store.values.items() if not key.endswith("host/1")}
    third.talk()
    assert third.look(0.1) == End(3, 1, "ended: torn.png"), "from host 0 alone"


def test_a_host_that_slept_through_a_restart_of_the_job_is_alone():
    store = Store()
    old = Heartbeats(Place("first:1234", 2, 0), store, 6.0)
    del store.values["jaxclust/token"]
    new = Heartbeats(Place("first:1234", 2, 0), store, 6.0)
    old.end = End(1, 0, "ended: of old")
    old.talk()
    other = Heartbeats(Place("first:1234", 2, 1), store, 6.0)
    new.talk()
    other.talk()
    assert other.look(0.1) is None and new.look(0.1) is None
    assert seconds_until(old, [new, other])[1].said.startswith("is lost")


def working(monkeypatch, watches, *done):
    """All talk, each having done so much."""
    for watch, number in zip(watches, done, strict=True):
        monkeypatch.setattr(heartbeats, "_done", number)
        watch.talk()


def looks_until(watch, monkeypatch, watches, *done):
    for look in range(1, 100):
        working(monkeypatch, watches, *done)
        if end := watch.look(1.0):
            return look, end
    raise AssertionError("never")


def test_a_host_that_beats_on_but_gets_no_further_hangs(monkeypatch):
    store = Store()
    watches = [Heartbeats(Place("first:1234", 3, index), store, 6.0, patience=10.0) for index in range(3)]
    for step in range(30):  # one that is the only one to get on, too
        working(monkeypatch, watches, 29, step, 29)
        assert not any(watch.look(1.0) for watch in watches)
    words = "nothing done for 10 s (config.runtime.deadline)"
    looks, end = looks_until(watches[2], monkeypatch, watches, 37, 29, 37)  # eight steps may be under way
    assert looks == 11 and end == End(1, 1, f"hangs, and the others wait for it: {words}")
    assert looks_until(watches[0], monkeypatch, watches, 40, 40, 40)[1] == End(1, 0, f"hangs, like all others: {words}")


def test_work_is_what_all_hosts_do(monkeypatch):
    monkeypatch.setattr(heartbeats, "_done", 5)
    assert list(progress(range(3), 3, "a loop")) == [0, 1, 2] and heartbeats._done == 8
    with pytest.raises(ValueError), heartbeats.uncounted():
        heartbeats.tick()
        raise ValueError
    assert heartbeats._done == 8


# --- the command line, and who is told to join ---

WRONG = {
    "two missing": (["--coordinator=a:1"], "--coordinator=a:1 without --num_processes and --process_id"),
    "one missing": (["--process_id=1", "--num_processes=2"], "without --coordinator"),
    "no port": (["--coordinator=a", "--process_id=1", "--num_processes=2"], "must be HOST:PORT"),
    "beyond the last": (["--coordinator=a:1", "--process_id=2", "--num_processes=2"], "must be from 0 to 1"),
    "negative": (["--coordinator=a:1", "--process_id=-1", "--num_processes=2"], "must be from 0 to 1"),
    "no number": (["--coordinator=a:1", "--process_id=0", "--num_processes=two"], "must be a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_half_given_and_wrong_flags_are_refused(name):
    arguments, words = WRONG[name]
    with pytest.raises(ConfigError, match=re.escape(words)):
        main.parse(["jaxclust", "--config=configs/deepcluster.py:smoke", *arguments])


def test_a_wrong_setting_is_said_by_host_0_alone(capsys):
    place = ["--coordinator=a:1", "--num_processes=2"]
    for index, words in enumerate(("jaxclust: config.cluster.kk is unknown; did you mean 'cluster.k'?\n", "")):
        arguments = ["--config=configs/deepcluster.py", *place, f"--process_id={index}", "--config.cluster.kk=3"]
        assert main.main(["jaxclust", *arguments]) == 2
        assert capsys.readouterr().err == words
    assert main.main(["jaxclust", "--config=nothing.py", *place, "--process_id=1"]) == 2
    assert capsys.readouterr().err.startswith("jaxclust: host 1: --config=nothing.py"), "this may be so only here"


def test_variables_take_the_place_of_flags(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "[::1]:80")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    arguments = ["jaxclust", "--config=configs/deepcluster.py:smoke"]
    assert main.parse(arguments).place == Place("[::1]:80", 3, 2)
    assert main.parse([*arguments, "--process_id=1"]).place == Place("[::1]:80", 3, 1)


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip


def test_a_job_of_slurm_says_where_a_process_stands(monkeypatch):
    assert hosts.place(None) is None
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    place = hosts.place(None)
    assert (place.processes, place.process, place.launcher) == (2, 1, "slurm")
    assert place.address.startswith("node3:")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert hosts.place(None) is None, "one task is a process like any other"
    assert hosts.place(Place("a:1", 1, 0)) is None


TPU_METADATA = {
    "agent-worker-number": "2", "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\n",
    "worker-network-endpoints": ",".join(f"unknown:unknown:127.0.0.{worker}" for worker in range(1, 5)),
}  # fmt: skip


@pytest.mark.parametrize("launcher", ["gcetpu", "gketpu"])
def test_a_tpu_pod_says_where_a_worker_stands(monkeypatch, launcher):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (TPU_METADATA[key], 200))
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES"):  # which are set where there is no TPU
        monkeypatch.delenv(name, raising=False)
    if launcher == "gketpu":
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "127.0.0.1,127.0.0.2,127.0.0.3,127.0.0.4")
        monkeypatch.setenv("TPU_WORKER_ID", "2")
    assert hosts.place(None) == Place("127.0.0.1:8482", 4, 2, launcher)


def test_jobs_for_one_process_refuse_to_be_several(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(hosts, "place", lambda given: Place("a:1", 2, 0))
    arguments = [
        "--config=configs/deepcluster.py:smoke",
        f"--workdir={tmp_path}",
        "--job=sweep",
        "--config.sweep=seed=1,2",
    ]
    assert main.main(["jaxclust", *arguments]) == 2
    assert "--job=sweep is for one process, and this is one of 2" in capsys.readouterr().err


class Device(NamedTuple):
    process_index: int


def devices(*counts):
    return [Device(host) for host, count in enumerate(counts) for _ in range(count)]


def test_hosts_with_different_numbers_of_devices_are_refused_naming_each():
    words = "(host 3: 7; host 0, 1, 2: 8)"
    with pytest.raises(ConfigError, match=re.escape(words)):
        runtime.require_equal_hosts(devices(8, 8, 8, 7))
    for same in (devices(4), devices(2, 2, 2)):
        runtime.require_equal_hosts(same)


def test_a_job_is_refused_before_it_starts_if_hosts_differ(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(hosts, "place", lambda given: Place("a:1", 2, 0))
    for name in ("join", "store", "leave"):
        monkeypatch.setattr(hosts, name, lambda *given: None)
    monkeypatch.setattr(main.watch, "together", lambda *given: nullcontext())
    monkeypatch.setattr(jax, "devices", lambda: devices(2, 1))
    workdir = tmp_path / "run"
    assert main.main(["jaxclust", "--config=configs/deepcluster.py:smoke", f"--workdir={workdir}"]) == 2
    assert "equally many devices, and these have (host 1: 1; host 0: 2)" in capsys.readouterr().err
    assert not workdir.exists()


# --- real processes ---

# Hosts that do nothing but wait for each other, as in a collective; what they are to do instead is argument 4.
IDLE = """
import sys, time
import jax, numpy as np
from jaxclust import errors, heartbeats, hosts, runtime, watch
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_platforms", "cpu")
address, count, index, heartbeat = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
place = heartbeats.Place(address, count, index)
hosts.join(place, heartbeat)
with watch.together(place, hosts.store(), heartbeat, *map(float, sys.argv[6:])):
    time.sleep(heartbeat / 2)  # all have heard of all
    print("begun", flush=True)
    exec(sys.argv[5])
hosts.leave()
print("done", flush=True)
"""
FOREVER = "while True: hosts.total(np.ones(3)); time.sleep(0.02)"


@contextmanager
def idle(what, *patience, count=3):
    port = host_runs.free_port()
    words = [f"127.0.0.1:{port}", str(count)]
    with host_runs.started(
        [(IDLE, [*words, *map(str, (index, HEARTBEAT, what, *patience))]) for index in range(count)]
    ) as started:
        for index in range(count):
            started.wait_for(index, "begun")
        yield started


def ended_in_time(started, victim, began, code, words):
    """All but the victim have ended, each with `code` and words that name it."""
    for index, process in enumerate(started.processes):
        if index != victim:
            process.wait(max(0.1, began + HEARTBEAT + MARGIN - time.monotonic()))
            error = started.err(index)
            assert process.returncode == code, error
            own = f"host {index}: " if index else ""
            assert re.search(rf"^jaxclust: {own}{words}", error, re.MULTILINE), error
            assert "Traceback" not in error


@pytest.mark.medium
@pytest.mark.parametrize(
    ("victim", "number"),
    [
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.wide),
        (0, signal.SIGSTOP),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.wide),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.wide),
    ],
)
def test_a_host_that_is_killed_or_suspended_ends_the_others_in_time(victim, number):
    with idle(FOREVER) as started:
        began = time.monotonic()
        started.processes[victim].send_signal(number)
        words = {
            0: r"host 0 \(.+\) at 127.0.0.1:\d+ (has ended|does not answer: no sign of life for 2 s)",
            1: r"host 1 \(.+\) is lost: no sign of life for 2 s",
        }
        ended_in_time(started, victim, began, 1, words[victim])
        if number == signal.SIGSTOP:  # and what wakes up alone does not stay
            started.processes[victim].send_signal(signal.SIGCONT)
            assert started.processes[victim].wait(HEARTBEAT + MARGIN) == 1, started.err(victim)
            assert "this process was suspended for" in started.err(victim)


@pytest.mark.medium
def test_an_error_of_one_host_ends_all_with_its_message_and_code():
    what = f"if index == 1: time.sleep(1); raise errors.DataError('torn.png is torn')\n{FOREVER}"
    with idle(what) as started:
        ended_in_time(started, 1, time.monotonic(), 3, r"host 1 \(.+\) ended: torn.png is torn$")
        assert started.processes[1].wait(MARGIN) == 3
        assert "jaxclust: host 1: torn.png is torn\n" in started.err(1)


@pytest.mark.medium
def test_a_bug_on_one_host_ends_all_and_shows_its_traceback_there():
    with idle(f"if index == 2: [][0]\n{FOREVER}") as started:
        ended_in_time(started, 2, time.monotonic() + HEARTBEAT, 1, r"host 2 \(.+\) ended: IndexError: list index")
        assert started.processes[2].wait(MARGIN) == 1
        assert "Traceback" in started.err(2)


@pytest.mark.medium
def test_an_error_that_all_hosts_have_is_said_once():
    """Here they differ in their number of devices."""
    what = "jax.config.update('jax_num_cpu_devices', 1 + (index == 2)); runtime.require_equal_hosts(jax.devices())"
    with idle(f"time.sleep(0.3 * (2 - index)); {what}") as started:  # host 0, which says it, comes last
        ended = started.finish(HEARTBEAT + MARGIN)
    assert [host.code for host in ended] == [2, 2, 2]
    assert [host.err.count("(host 0, 1: 1; host 2: 2)") for host in ended] == [1, 0, 0]


@pytest.mark.medium
def test_a_host_that_hangs_and_beats_on_ends_all():
    patience = 6.0
    with idle(f"hosts.total(np.ones(3))\nif index == 1: time.sleep(1000)\n{FOREVER}", patience, count=2) as started:
        words = r"host 1 \(.+\) hangs, and the others wait for it: nothing done for 6 s"
        ended_in_time(started, None, time.monotonic() + patience, 1, words)


@pytest.mark.wide
def test_hosts_that_are_slow_but_alive_are_waited_for():
    with idle(f"time.sleep({3 * HEARTBEAT} if index == 0 else 0); hosts.total(np.ones(3))", count=2) as started:
        ended = host_runs.all_well(started)
    assert all("done" in host.out for host in ended)


@pytest.mark.medium
@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.wide), 1])
def test_hosts_wait_for_each_other_only_so_long_at_the_start(index):
    address = f"127.0.0.1:{host_runs.free_port()}"
    command = [sys.executable, "-c", IDLE, address, "2", str(index), "0.5", ""]
    alone = subprocess.run(command, capture_output=True, text=True, env=host_runs.ENVIRONMENT, timeout=60)
    assert alone.returncode == 1
    words = f"host 0 does not answer at {address}" if index else f"not all 2 hosts came to {address}"
    assert re.search(rf"{words} (after|within) 5 s", alone.stderr), alone.stderr


# Says where it is, and takes its time there.
TRAINING = """
import sys, time
from jaxclust import hosts, main
from jaxclust.train import loop
slow = sys.argv.pop(1)
if slow == "steps":
    add, n = loop.ImageRows.add, 0
    def slowly(self, rows):
        global n
        n += 1
        print("step", n, flush=True)
        time.sleep(0.2 if n > 3 else 0)
        return add(self, rows)
    loop.ImageRows.add = slowly
if slow == "clustering":
    from_first = hosts.from_first
    def slower(make, what, deadline):
        def waiting():
            print("clustering", flush=True)
            time.sleep(6)
            return make()
        return from_first(waiting, what, deadline)
    hosts.from_first = slower
if slow.startswith("torn="):
    from pathlib import Path
    from jaxclust.train import refresh
    extract, torn = refresh.extract, Path(slow.removeprefix("torn="))
    def tearing(*arguments):
        torn.write_bytes(torn.read_bytes()[:60])  # after the scan of the folder
        return extract(*arguments)
    refresh.extract = tearing
sys.exit(main.main(["jaxclust", *sys.argv[1:]]))
"""
SMALL = [
    "--config=configs/deepcluster.py:smoke", "--config.batch_size=128", "--config.rounds=2",
    "--config.optimizer.body.schedule=none", "--config.save_every=never", "--config.cluster.backend=faiss",
    "--config.runtime.cpu_devices=1", "--config.evaluate.suite=clustering", "--config.model.blocks=1",
]  # fmt: skip


@contextmanager
def training(workdir, *arguments, slow="nothing", heartbeat=3.0, count=2):
    port = host_runs.free_port()
    flags = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--workdir={workdir}"]
    flags += [f"--config.runtime.heartbeat={heartbeat}", *SMALL, *arguments]
    with host_runs.started([(TRAINING, [slow, *flags, f"--process_id={i}"]) for i in range(count)]) as started:
        yield started


@pytest.mark.wide
def test_a_host_that_is_suspended_while_host_0_clusters_ends_the_training(tmp_path):
    with training(tmp_path / "run", slow="clustering") as started:
        started.wait_for(0, "clustering")
        began = time.monotonic()
        started.processes[1].send_signal(signal.SIGSTOP)
        assert started.processes[0].wait(3.0 + MARGIN) == 1
        assert time.monotonic() - began > 3.0 - 1.0
        assert re.search(r"jaxclust: host 1 \(.+\) is lost: no sign of life for 3 s\n", started.err(0))
        assert "Traceback" not in started.err(0)


@pytest.mark.medium
def test_an_image_that_goes_bad_for_one_host_ends_all_with_its_name(tmp_path):
    split = few_digits(60).splits["train"]
    for i in range(split.size):
        path = tmp_path / "photos" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(split.images[i, ..., 0]).save(path)
    torn = tmp_path / "photos" / "31.png"  # which host 1 alone reads for its features
    arguments = [f"--config.data.source=folder:{torn.parent}", "--config.data.cache_bytes=0", "--config.batch_size=16"]
    with training(tmp_path / "run", *arguments, slow=f"torn={torn}") as started:
        ended = started.finish(100)
    assert [host.code for host in ended] == [3, 3], [host.err for host in ended]
    assert "31.png" in ended[0].err and "jaxclust: host 1 (" in ended[0].err
    assert "31.png" in ended[1].err and "jaxclust: host 1: " in ended[1].err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with training(workdir) as started:
        host_runs.all_well(started)
    return workdir


@pytest.mark.parametrize(
    ("slow", "text"),
    [
        pytest.param("steps", "step 8\n", marks=pytest.mark.wide),
        pytest.param("clustering", "clustering", marks=pytest.mark.slow),
    ],
)
def test_sigterm_on_one_host_saves_one_step_everywhere_and_the_command_goes_on(uninterrupted, tmp_path, slow, text):
    workdir = tmp_path / "stopped"
    with training(workdir, slow=slow) as started:
        started.wait_for(0, text)
        started.processes[1].send_signal(signal.SIGTERM)
        ended = started.finish(100)
    assert [host.code for host in ended] == [75, 75], [host.err for host in ended]
    assert "the same command goes on" in ended[0].err
    assert ended[1].out == "", "host 0 alone speaks"
    saved = [path for path in (workdir / "checkpoints" / "deepcluster").iterdir() if path.name.isdigit()]
    assert len(saved) == 1
    with training(workdir) as started:
        host_runs.all_well(started)
    assert (workdir / "assignments.csv").read_bytes() == (uninterrupted / "assignments.csv").read_bytes()
    arrays, expected = newest(workdir), newest(uninterrupted)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def newest(workdir):
    """The arrays of the newest checkpoint, which two hosts wrote."""
    folder = workdir / "checkpoints" / "deepcluster"
    manager = ocp.CheckpointManager(folder.absolute(), item_handlers=ocp.StandardCheckpointHandler())
    about = manager.item_metadata(manager.latest_step()).tree
    like = {name: np.empty(array.shape, array.dtype) for name, array in about.items()}
    return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
