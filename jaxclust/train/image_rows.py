"""What a method says of each image during training: written by position, or remembered by id for the next refresh."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from jaxclust import hosts, runtime
from jaxclust.errors import DataError
from jaxclust.files import replacing
from jaxclust.methods.base import Targets


class ImageRows:
    """Collects the `rows` of steps; all but `memory` are written to `folder`/<step>.npz at each flush, `step` being its
    end.

    Files from after `restored` belong to steps that will be done again, and are removed. Host 0 writes for all.
    """

    def __init__(self, folder: Path, restored: int | None, memory: str | None = None):
        self._folder = folder
        self._memory = memory
        self._waiting: list[dict[str, jax.Array]] = []
        self._fetched: list[dict[str, np.ndarray]] = []
        for path in folder.glob("*.npz") if hosts.is_first() else ():
            if int(path.stem) > (restored or 0):
                path.unlink()

    def add(self, rows: dict[str, jax.Array]) -> None:
        """Keeps the rows of a step; they stay on the device until the flush."""
        if rows:
            self._waiting.append(rows)

    def remember(self, targets: Targets) -> Targets:
        """The targets with what was collected of `memory`; of an image that was met twice the later row counts.

        Every host must call it, and gets the same.
        """
        arrays = self._fetch()
        if self._memory is None or not arrays:
            return targets
        memory = targets.memory.copy()
        memory[arrays["id"]] = arrays.pop(self._memory)
        return targets._replace(memory=memory)

    def flush(self, step: int) -> None:
        """Writes what was collected."""
        self._fetch()
        parts, self._fetched = self._fetched, []
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        if arrays.keys() - {"id", "position"} and hosts.is_first():
            with replacing(self._folder / f"{step}.npz") as temporary:
                np.savez_compressed(temporary, allow_pickle=False, **arrays)

    def _fetch(self) -> dict[str, np.ndarray]:
        """What waited on the devices, of all hosts by position; it is then waiting for the flush."""
        if not self._waiting:
            return {}
        fetched = runtime.local_rows(self._waiting)
        self._waiting = []
        arrays = {name: _by_position([rows[name] for rows in fetched]) for name in fetched[0]}
        self._fetched.append(arrays)
        return arrays


def between(
    folder: Path, steps: tuple[int, int], positions: tuple[int, int], names: Sequence[str]
) -> tuple[np.ndarray, ...]:
    """The rows called `names` of the first of two positions up to before the second, in their order, as `folder` has
    them of the steps after the first of two up to the second.

    DataError if some are missing, or a file is damaged.
    """
    first, last = positions
    parts = []
    for path in sorted(folder.glob("*.npz"), key=lambda path: int(path.stem)):
        if int(path.stem) > steps[0]:
            try:
                with np.load(path, allow_pickle=False) as file:
                    own = (file["position"] >= first) & (file["position"] < last)
                    parts.append([file[name][own] for name in names])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise DataError(f"{path} is damaged, such as by a copy that was cut off: {error}") from None
    if sum(len(part[0]) for part in parts) != last - first:
        raise DataError(f"{folder} has no longer what the steps {steps[0]:,} to {steps[1]:,} said of their images")
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _by_position(steps: list[np.ndarray]) -> np.ndarray:
    """The rows [b, ...] of this host at each step, those of all hosts between them: of a batch host 0 has the first b,
    host 1 the next."""
    if hosts.count() == 1:
        return np.concatenate(steps)
    parts = hosts.whole(np.stack(steps), len(steps) * hosts.count())  # part i: step i // hosts, host i % hosts
    return parts.reshape(-1, *parts.shape[2:])
