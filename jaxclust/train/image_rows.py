"""What a method says of each image during training, kept by position."""

from pathlib import Path

import jax
import numpy as np

from jaxclust import hosts, runtime
from jaxclust.files import replacing


class ImageRows:
    """Collects the `rows` of steps and writes `folder`/<step>.npz at each flush, `step` being its end.

    Files from after `restored` belong to steps that will be done again, and are removed. Host 0 writes for all.
    """

    def __init__(self, folder: Path, restored: int | None):
        self._folder = folder
        self._waiting: list[dict[str, jax.Array]] = []
        for path in folder.glob("*.npz") if hosts.is_first() else ():
            if int(path.stem) > (restored or 0):
                path.unlink()

    def add(self, rows: dict[str, jax.Array]) -> None:
        """Keeps the rows of a step; they stay on the device until the flush."""
        if rows:
            self._waiting.append(rows)

    def flush(self, step: int) -> None:
        """Writes what was collected."""
        if not self._waiting:
            return
        fetched = runtime.local_rows(self._waiting)
        arrays = {name: _by_position([rows[name] for rows in fetched]) for name in fetched[0]}
        if hosts.is_first():
            with replacing(self._folder / f"{step}.npz") as temporary:
                np.savez_compressed(temporary, allow_pickle=False, **arrays)
        self._waiting = []


def _by_position(steps: list[np.ndarray]) -> np.ndarray:
    """The rows [b, ...] of this host at each step, those of all hosts between them: of a batch host 0 has the first b,
    host 1 the next."""
    if hosts.count() == 1:
        return np.concatenate(steps)
    parts = hosts.whole(np.stack(steps), len(steps) * hosts.count())  # part i: step i // hosts, host i % hosts
    return parts.reshape(-1, *parts.shape[2:])
