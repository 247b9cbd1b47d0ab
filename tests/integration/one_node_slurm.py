"""A Slurm of one node on this machine while a command runs:

    python tests/integration/one_node_slurm.py COMMAND [ARGUMENTS]

munged, slurmctld and slurmd are started in a temporary folder, on free ports, and found by COMMAND through SLURM_CONF.
What is installed or runs already is left alone, and only what was started here is stopped.
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
CONFIG = """\
ClusterName=one
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job is started again only when its credential has expired, by default after two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
# Nothing that needs cgroups, so that it runs in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing():
    """The programs that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


@contextmanager
def one_node_slurm():
    """The environment in which commands find this Slurm, while it runs."""
    with ExitStack() as stack:
        # Not in the folder of a test: the name of a socket has at most 107 characters.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)  # which munged asks for
        for name in ("state", "spool"):
            (folder / name).mkdir()
        with open(os.open(folder / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(os.urandom(1024))
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, user=getpass.getuser(), ports=free_ports(2)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

        daemons = {}

        def daemon(name, *arguments):
            log = stack.enter_context(open(folder / f"{name}.log", "wb"))
            command = [shutil.which(name, path=PATH), *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
            stack.callback(stop, process)
            daemons[name] = process

        def answers(*command):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            return done.stdout if done.returncode == 0 else ""

        def wait_until(condition, what):
            deadline = time.monotonic() + 60
            while not condition():
                ended = [name for name, process in daemons.items() if process.poll() is not None]
                if ended or time.monotonic() > deadline:
                    logs = "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*.log")))
                    raise RuntimeError(f"{what}; {ended or 'nothing'} ended by itself\n{logs}")
                time.sleep(0.2)

        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        daemon("munged", "--foreground", *(f"--{option}={folder / name}" for option, name in files.items()))
        wait_until((folder / "munge.socket").exists, "munged has not started")
        daemon("slurmctld", "-D")
        daemon("slurmd", "-D", "-N", "localhost")
        wait_until(lambda: "idle" in answers("sinfo", "--noheader", "--format=%T"), "the node has not come up")
        try:
            yield environment
        finally:
            answers("scancel", "--user", getpass.getuser())
            wait_until(lambda: not answers("squeue", "--noheader"), "jobs have not ended")


def free_ports(count):
    """Ports of this machine that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def stop(process):
    """Ends a process, and waits for its end."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    if missing():
        sys.exit(f"not installed: {', '.join(missing())}; apt-get install slurm-wlm munge")
    with one_node_slurm() as slurm:
        sys.exit(subprocess.run(sys.argv[1:], env=slurm).returncode)
