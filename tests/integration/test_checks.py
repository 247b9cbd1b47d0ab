"""What other programs say of launch/: shellcheck, the schemas of Kubernetes, hadolint."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

SCRIPTS = sorted(path.name for path in Path("launch").iterdir() if path.suffix in (".sh", ".sbatch"))


def program(name, package):
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return shutil.which(name, path=path) or pytest.skip(f"not installed: {name}; {package}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck(name):
    # SC2317 takes functions that only a trap calls for unreachable.
    command = [program("shellcheck", "apt-get install shellcheck"), "--exclude=SC2317", f"launch/{name}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_job_inside_the_job_set_is_one_for_kubernetes():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install 'jaxclust[integration]'")
    job_set = yaml.safe_load(Path("launch/kubernetes.yaml").read_text())
    for replicated in job_set["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        job |= replicated["template"]
        validate.validate(job, validate.latest_version(), strict=True)
        job["spec"]["backofLimit"] = 0
        with pytest.raises(validate.ValidationError, match="backofLimit"):
            validate.validate(job, validate.latest_version(), strict=True)


def test_hadolint():
    command = [program("hadolint", "pip install 'jaxclust[integration]'"), "launch/Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
