"""launch/: what the scripts start, what they pass on, what they end with, and that they leave nothing behind."""

import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxclust import config, main

LAUNCH = Path("launch").absolute()
# Stands in for python: keeps its arguments, then does what $BEHAVIOUR says, which may use $id.
STUB = f"""#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec {shlex.quote(sys.executable)} "$@"; fi
for argument; do case $argument in --process_id=*) id=${{argument#*=}} ;; esac; done
printf '%s\\0' "$@" >"$RECORD/$id.arguments"
echo "$JAX_PLATFORMS" >"$RECORD/$id.platforms"
echo $$ >>"$RECORD/pids"
trap 'echo TERM >>"$RECORD/$id.signals"; exit 75' TERM
rest() {{ sleep 100 & echo $! >>"$RECORD/pids"; wait $!; }}
eval "$BEHAVIOUR"
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


class Local:
    """launch/local.sh with the stub."""

    def __init__(self, folder):
        self.folder = folder
        self.python = executable(folder / "python", STUB)

    def start(self, count, *arguments, behaviour="exit 0", **environment):
        settings = {"PYTHON": self.python, "RECORD": self.folder, "BEHAVIOUR": behaviour, **environment}
        settings = {**os.environ, **{name: str(value) for name, value in settings.items()}}
        command = [LAUNCH / "local.sh", str(count), *arguments]
        return subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments, **settings):
        process = self.start(*arguments, **settings)
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors

    def arguments(self, id):
        return (self.folder / f"{id}.arguments").read_text().split("\0")[:-1]

    def pids(self):
        path = self.folder / "pids"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait_for(self, pids):
        wait_until(lambda: len(self.pids()) == pids)

    def left(self):
        """What is alive although a killed process has had the time to go."""
        deadline = time.monotonic() + 5
        while (alive := [pid for pid in self.pids() if is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return alive


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.fixture
def local(tmp_path):
    return Local(tmp_path)


def test_local_gives_every_process_its_place_and_all_arguments(local):
    arguments = ["--config=configs/deepcluster.py:smoke", "--workdir=a folder's *", "--config.rounds", "7"]
    assert local.run(3, *arguments) == (0, "")
    ports = set()
    for id in range(3):
        module, name, *flags = local.arguments(id)
        assert (module, name) == ("-m", "jaxclust.main")
        assert flags[-len(arguments) :] == arguments
        ours = dict(flag.lstrip("-").split("=") for flag in flags[: -len(arguments)])
        assert ours.pop("process_id") == str(id) and ours.pop("num_processes") == "3"
        host, port = ours.pop("coordinator").split(":")
        assert host == "127.0.0.1" and 1024 <= int(port) < 65536
        ports.add(port)
        cores = len(os.sched_getaffinity(0))
        assert ours == {"config.runtime.cpu_devices": str(max(1, cores // 3))}
        assert (local.folder / f"{id}.platforms").read_text() == "cpu\n"
    assert len(ports) == 1


@pytest.mark.parametrize("said", [["--config.runtime.cpu_devices=4"], ["-config.runtime.cpu_devices", "4"]])
def test_local_leaves_devices_and_platform_that_the_user_chose(local, said):
    assert local.run(2, "--config=x", *said, JAX_PLATFORMS="cuda") == (0, "")
    assert [flag for flag in local.arguments(1) if "cpu_devices" in flag] == said[:1]
    assert (local.folder / "1.platforms").read_text() == "cuda\n"


@pytest.mark.parametrize("arguments", [[], ["0"], ["two"], ["--config=x"], ["2.5"]])
def test_local_needs_a_number(local, arguments):
    done = subprocess.run([LAUNCH / "local.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launch/local.sh N" in done.stderr


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("exit 0", 0),
        ("exit 2", 2),
        ("exit 75", 75),
        ("exit $((id == 2 ? 3 : 0))", 3),
        ("if ((id == 1)); then exit 4; fi; sleep 0.7; exit 1", 4),  # the first, not the first by number
        ("if ((id == 1)); then exit 1; fi; sleep 0.7; exit 75", 75),
        ("if ((id == 1)); then exit 75; fi; sleep 0.7; exit 1", 75),
        ("if ((id == 1)); then kill -KILL $$; fi; sleep 0.7; exit 1", 137),
    ],
)
def test_local_returns_the_exit_code_that_matters(local, behaviour, code):
    assert local.run(3, behaviour=behaviour)[0] == code
    assert len(local.pids()) == 3 and not local.left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_local_passes_a_signal_on_once_and_returns_75(local, number):
    process = local.start(2, behaviour="rest")
    local.wait_for(4)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert [(local.folder / f"{id}.signals").read_text() for id in range(2)] == ["TERM\n"] * 2
    assert not local.left()


@pytest.mark.wide
def test_a_second_signal_ends_processes_that_do_not_listen(local):
    process = local.start(2, behaviour="trap '' TERM; rest")
    local.wait_for(4)
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert process.poll() is None and len(local.left()) == 4
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 137
    assert not local.left()


def test_local_ends_the_others_some_time_after_the_first_failed(local):
    code, errors = local.run(3, behaviour="if ((id == 1)); then exit 4; fi; rest", GRACE=1)
    assert code == 4
    assert "2 of 3 processes still ran 1 s after the first had ended" in errors
    assert len(local.pids()) == 5 and not local.left()


def test_what_a_process_started_ends_with_it(local):
    assert local.run(2, behaviour="sleep 100 & echo $! >>$RECORD/pids; exit 0")[0] == 0
    assert len(local.pids()) == 4 and not local.left()


def test_local_says_when_there_is_no_python(local):
    code, errors = local.run(2, PYTHON="no-such-python")
    assert code != 0 and "no-such-python" in errors


def test_slurm_requeues_what_stopped_and_nothing_else(tmp_path):
    record = tmp_path / "record"
    executable(tmp_path / "srun", f'#!/bin/bash\nprintf "%s\\n" srun "$@" >>{record}\nexit $CODE\n')
    executable(tmp_path / "scontrol", f'#!/bin/bash\nprintf "%s\\n" scontrol "$@" >>{record}\n')
    for code in (0, 1, 2, 75, 137):
        record.unlink(missing_ok=True)
        settings = {"CODE": str(code), "SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(tmp_path)}
        environment = {**os.environ, **settings, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", LAUNCH / "slurm.sbatch", "--config=x", "--workdir=a folder"]
        assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == code
        said = record.read_text().splitlines()
        called = ["python", "-m", "jaxclust.main", "--config=x", "--workdir=a folder"]
        requeued = ["scontrol", "requeue", "12"] if code == 75 else []
        assert said == ["srun", "--kill-on-bad-exit=0", *called, *requeued]


def test_slurm_options_stand_before_the_first_command():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options and set(options) <= set(head)
    assert {"#SBATCH --requeue", "#SBATCH --signal=TERM@300", "#SBATCH --open-mode=append"} <= set(options)


# Stands in for gcloud: keeps its arguments, then does what $BEHAVIOUR says; workers told to stop end the first call.
GCLOUD = """#!/usr/bin/env bash
printf '%s\\0' "$@" >>"$RECORD/gcloud"
if [[ $* == *pkill* ]]; then exec kill "$(<"$RECORD/pid")"; fi
echo $$ >"$RECORD/pid"
eval "$BEHAVIOUR"
"""


def start_tpu_pod(folder, *arguments, behaviour="exit 0"):
    bin = folder / "bin"
    bin.mkdir(exist_ok=True)
    executable(bin / "gcloud", GCLOUD)
    settings = {"RECORD": str(folder), "BEHAVIOUR": behaviour, "PATH": f"{bin}:{os.environ['PATH']}"}
    command = [LAUNCH / "tpu_pod.sh", *arguments]
    return subprocess.Popen(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True)


def test_tpu_pod_prints_the_command_that_it_would_run(tmp_path):
    arguments = ["pod", "us-west4-a", "--config=configs/deepcluster.py:smoke", "--workdir=it's a $HOME *"]
    dry = start_tpu_pod(tmp_path, "--dry-run", *arguments)
    printed, _ = dry.communicate(timeout=20)
    assert dry.returncode == 0 and not (tmp_path / "gcloud").exists()
    for code in (0, 75):
        (tmp_path / "gcloud").unlink(missing_ok=True)
        assert start_tpu_pod(tmp_path, *arguments, behaviour=f"exit {code}").wait(20) == code
        called = (tmp_path / "gcloud").read_text().split("\0")[:-1]
        assert shlex.split(printed) == ["gcloud", *called]
    *place, command = called
    assert place == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-west4-a", "--worker=all"]
    # A worker's shell makes of it what was meant.
    worker = tmp_path / "worker" / "jaxclust" / ".venv" / "bin"
    worker.mkdir(parents=True)
    executable(worker / "python", '#!/bin/bash\nprintf \'%s\\0\' "$PWD" "$@"\n')
    remote = ["bash", "-c", command.removeprefix("--command=")]
    done = subprocess.run(remote, cwd=tmp_path / "worker", capture_output=True, text=True, check=True)
    folder, *rest = done.stdout.split("\0")[:-1]
    assert folder == str(tmp_path / "worker" / "jaxclust") and rest == ["-m", "jaxclust.main", *arguments[2:]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_tpu_pod_tells_the_workers_to_stop_and_waits_for_them(tmp_path, number):
    behaviour = "trap 'kill $!; exit 75' TERM; sleep 100 & touch $RECORD/ready; wait"
    process = start_tpu_pod(tmp_path, "pod", "zone", "--config=x", behaviour=behaviour)
    wait_until((tmp_path / "ready").exists)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert (tmp_path / "gcloud").read_text().count("pkill -TERM -f '[j]axclust.main'") == 1


@pytest.mark.parametrize("arguments", [[], ["pod"], ["pod", "--config=x"], ["--dry-run", "pod"]])
def test_tpu_pod_needs_a_name_and_a_zone(arguments):
    done = subprocess.run([LAUNCH / "tpu_pod.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: launch/tpu_pod.sh" in done.stderr


@pytest.fixture
def job_set():
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def variables(container):
    return {entry["name"]: entry.get("value") or entry["valueFrom"] for entry in container["env"]}


def test_the_job_set_is_one_job_with_a_pod_for_each_host(job_set):
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = job_set["spec"]
    assert spec.keys() == {"network", "failurePolicy", "replicatedJobs"}
    (replicated,) = spec["replicatedJobs"]
    assert replicated.keys() == {"name", "replicas", "template"} and replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completionMode"] == "Indexed"
    assert variables(container)["JAX_NUM_PROCESSES"] == str(job["completions"]) == str(job["parallelism"])
    # The coordinator: pod 0 in the headless service that JobSet makes under the set's name.
    assert spec["network"] == {"enableDNSHostnames": True}
    name = job_set["metadata"]["name"]
    (port,) = [port["containerPort"] for port in container["ports"]]
    address = f"{name}-{replicated['name']}-0-0.{name}:{port}"
    assert variables(container)["JAX_COORDINATOR_ADDRESS"] == address
    field = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
    assert variables(container)["JAX_PROCESS_ID"] == {"fieldRef": field}
    volumes = {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1


def test_the_job_set_starts_again_after_exit_code_75(job_set):
    policy = job_set["spec"]["failurePolicy"]
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    exit_codes, disruption = job["podFailurePolicy"]["rules"]
    assert exit_codes["action"] == disruption["action"] == "FailJob"
    codes = exit_codes["onExitCodes"]
    assert codes == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [75]}
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # which a pod failure policy asks for
    (rule,) = policy["rules"]
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule.pop("name"))
    reasons = ["PodFailurePolicy"]  # why a job fails that one of the rules above ended
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": reasons}
    assert policy["restartStrategy"] == "BlockingRecreate" and policy["maxRestarts"] > 0


def test_the_command_line_takes_what_launch_gives_it(job_set, local, monkeypatch):
    assert local.run(2, "--config=configs/deepcluster.py:smoke")[0] == 0
    command = main.parse(["jaxclust", *local.arguments(1)[2:]])
    assert (command.place.processes, command.place.process) == (2, 1) and command.config.runtime.cpu_devices >= 1
    container = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "jaxclust.main"]
    for name, value in variables(container).items():
        monkeypatch.setenv(name, value if isinstance(value, str) else "3")
    command = main.parse(["jaxclust", *container["args"]])
    assert command.place[:3] == (variables(container)["JAX_COORDINATOR_ADDRESS"], 4, 3)


def test_what_launch_and_its_page_name_exists():
    known = {"config", "workdir", "job"}
    for path in [*LAUNCH.iterdir(), Path("docs/pods.md")]:
        text = path.read_text()
        for name in re.findall(r"config\.([a-z_]+(?:\.[a-z_]+)*)[=\s`\\]", text):
            assert config.field_of(name.replace("\\", "")) is not None, (path, name)
        for file, variant in re.findall(r"--config=(configs/\w+\.py)(?::([\w,]+))?", text):
            config.from_file(Path(file), variant)
        for script in re.findall(r"launch/[\w.]+\w", text):
            assert Path(script).exists(), (path, script)
        for flag in re.findall(r"jaxclust\.main.*?--([a-z]+)[= ]", text):
            assert flag in known, (path, flag)


@pytest.mark.parametrize("name", ["pretrain.sh", "eval_linear.sh"])
def test_what_the_scripts_of_the_originals_ask_for_is_understood(name, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nfor argument; do echo "$argument"; done\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(stub))
    monkeypatch.setenv("EXP", str(run))
    told = subprocess.run([LAUNCH / name, "--config.seed=7"], capture_output=True, text=True, check=True)
    module, *arguments = told.stdout.splitlines()[1:]
    assert module == "jaxclust.main"
    if name == "eval_linear.sh":
        config.save(config.from_file(Path("configs/uad.py"), "imagenet"), run / "config.json")
    command = main.parse(["jaxclust", *arguments])
    asked = command.config
    assert command.workdir == run and asked.seed == 7 and asked.method == "uad"
    if name == "pretrain.sh":
        assert (asked.model.name, asked.cluster.k, asked.optimizer.top.wd) == ("alexnet", 10_000, -5)
    else:
        assert command.job == "evaluate" and asked.evaluate.linear.ten_crops and asked.evaluate.linear.wd == -7


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch", "tpu_pod.sh", "pretrain.sh", "eval_linear.sh"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert name == "slurm.sbatch" or os.access(LAUNCH / name, os.X_OK)
    assert re.search('(python"?|PYTHON") -m jaxclust.main', (LAUNCH / name).read_text())


def docker_stages():
    """Instructions by stage; those of the stage that it starts from come first."""
    stages, current = {}, None
    text = re.sub(r"\\\n\s*", " ", (LAUNCH / "Dockerfile").read_text())
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = stages[name] = [*stages.get(base, [(word, base)])]
        else:
            current.append((word, rest))
    return stages


@pytest.mark.parametrize(("target", "extra"), [("cpu", "cpu"), ("cuda", "cuda12")])
def test_an_image_has_locked_packages_the_code_and_a_user_who_is_not_root(target, extra, monkeypatch):
    steps = docker_stages()[target]
    said = {}
    monkeypatch.setattr("setuptools.setup", lambda **words: said.update(words))
    runpy.run_path("setup.py")
    (install,) = [rest for word, rest in steps if word == "RUN" and "--constraint requirements.lock" in rest]
    assert f"'.[{extra}]'" in install and extra in said["extras_require"]
    assert steps[0][1].startswith("python:3.11-")
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    assert {"setup.py", "requirements.lock", "jaxclust", "configs"} == set(copied)
    assert all(Path(source).exists() for source in copied)
    order = [rest for _, rest in steps]
    assert order.index(install) < order.index("jaxclust jaxclust"), "a change of the code must not install all again"
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]
    assert steps[-1] == ("ENTRYPOINT", '["python", "-m", "jaxclust.main"]')
