"""A workdir belongs to one run: its config, its environment and the images it was made from."""

import csv
import importlib.metadata
import io
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray

from jaxclust import __version__, hosts
from jaxclust import config as config_lib
from jaxclust.data.source import Source, of_last_stage
from jaxclust.data.split import Split, sampled, sketch
from jaxclust.errors import ConfigError, DataError
from jaxclust.files import read_json, replacing, write_json
from jaxclust.methods.base import DataInfo

LOCK = "lock"  # of the process that trains
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow", "faiss-cpu", "faiss-gpu", "numpy")


def resolved(config: ConfigDict, image_shape: tuple[int, ...]) -> ConfigDict:
    """The config with what the training images decided filled in, so that later ones are treated the same."""
    config = ConfigDict(config.to_dict())
    if len(image_shape) == 3:
        config.data.image_size, _, config.data.channels = image_shape
    return config


def check(config: ConfigDict, workdir: Path, source: Source) -> None:
    """Refuses a workdir of another run, and hosts that do not see the same; writes nothing.

    What is set for a stage alone, `stage.<name>`, may change until the stage begins.

    No host returns before all have looked, so that none sees what another writes after it.
    """
    _check_alone(config, workdir, source)
    if hosts.count() > 1:
        hosts.require_same("the settings (config)", json.dumps(config.to_dict()).encode())
        hosts.require_same(f"the images of {source.name}", _image_list(source).encode("utf-8", "surrogateescape"))


def _check_alone(config: ConfigDict, workdir: Path, source: Source) -> None:
    saved = workdir / "config.json"
    if not saved.exists():
        if workdir.exists() and any(path.stem != "plan" and path.name != LOCK for path in workdir.iterdir()):
            raise ConfigError(f"--workdir={workdir} holds other files and no run; choose a new or an empty folder")
        return
    begun = {path.parent.name for path in (workdir / "checkpoints").glob("*/[0-9]*")}
    ahead = tuple(f"stage.{name}." for name in config.stage if name not in begun)
    try:
        there = config_lib.load(saved)
    except DataError as error:
        raise DataError(f"{error}. Restore it from a copy, or delete {workdir} to start anew") from None
    changes = [c for c in config_lib.differences(there, config) if not c[0].startswith(ahead)]
    if changes:
        shown = "\n".join(f"  config.{name}: {old!r} there, {new!r} now" for name, old, new in changes)
        raise ConfigError(
            f"--workdir={workdir} holds a run with other settings:\n{shown}\nUse these settings, or another --workdir"
        )
    images = workdir / "images.csv"
    if images.exists() and images.read_bytes() != _image_list(source).encode("utf-8", "surrogateescape"):
        raise DataError(
            f"the images of {source.name} are no longer those that the run in {workdir} began with (its images.csv "
            "lists them). Restore them, or start anew in another --workdir"
        )
    for name, began in (read_json(workdir / "data.json") if images.exists() else {}).get("sketch", {}).items():
        _check_sketch(name, source.splits[name], np.array(began), workdir)


def _check_sketch(name: str, split: Split, began: NDArray[np.float64], workdir: Path) -> None:
    """DataError if images or vectors have the names of those that the run began with, and are others."""
    here = sketch(split)
    allowed = 1.0 if len(split.image_shape) == 3 else 1e-4 * np.abs(began).max(initial=0)
    others = np.flatnonzero((np.abs(here - began) > allowed).any(axis=1))
    if len(others):
        raise DataError(
            f"{len(others)} of {len(here)} images of {name!r} that were looked at, such as "
            f"{split.path(sampled(split)[others[0]])}, have the names of those that the run in {workdir} began with, "
            "and are others. Restore them, or start anew in another --workdir"
        )


def write(config: ConfigDict, workdir: Path, source: Source, used: int, keep: bool = False) -> None:
    """Writes config.json, environment.json, data.json, images.csv and, if any were skipped, skipped.csv, on host 0.

    `used` is the number of devices that were chosen where the config leaves it open. `keep` leaves config.json alone.
    """
    if not hosts.is_first():
        return
    if not keep:
        config_lib.save(config, workdir / "config.json")
    write_json(workdir / "environment.json", environment(used))
    split = of_last_stage(source, config).splits["train"]
    about = {"size": split.size, "image_shape": split.image_shape, "num_classes": source.train_classes}
    looks = {name: sketch(split).tolist() for name, split in source.splits.items()}
    write_json(workdir / "data.json", {**about, "sketch": looks})
    _write(workdir / "images.csv", _image_list(source))
    if source.skipped:
        _write(workdir / "skipped.csv", _table(("split", "path", "reason"), source.skipped))


def data_info(workdir: Path) -> DataInfo:
    """What the last stage of the run in `workdir` was trained on, so that its state can be used without it."""
    path = workdir / "data.json"
    if not path.exists():
        raise ConfigError(f"--workdir={workdir} holds no run (there is no {path}); train one first (--job=train)")
    about = read_json(path)
    return DataInfo(about["size"], tuple(about["image_shape"]), about["num_classes"])


def devices_used(workdir: Path) -> int | None:
    """The number of devices that the run in `workdir` is made with, None if there is no run."""
    path = workdir / "environment.json"
    return read_json(path)["devices_used"] if path.exists() else None


def results(workdir: Path) -> dict[str, Any]:
    """What results.json says so far, nothing if there is none; DataError says what to do if it is damaged."""
    path = workdir / "results.json"
    try:
        return read_json(path) if path.exists() else {}
    except DataError as error:
        raise DataError(
            f"{error}. Restore it from a copy, or delete it: the same training then finds it again, but for what an "
            "untrained network said"
        ) from None


def environment(used: int) -> dict[str, object]:
    """Versions, devices and commit that a run is made with."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "jaxclust": __version__,
        "python": platform.python_version(),
        "packages": versions,
        "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        "devices_used": used,
        "hosts": hosts.count(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _image_list(source: Source) -> str:
    rows = ((name, i, split.path(i)) for name, split in source.splits.items() for i in range(split.size))
    return _table(("split", "id", "path"), rows)


def _table(header: tuple[str, ...], rows: object) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)  # type: ignore[arg-type]
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "surrogateescape"))  # file names need not be UTF-8
