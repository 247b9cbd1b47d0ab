"""What a method says of each image during training, kept by position."""

from pathlib import Path

import jax
import numpy as np

from jaxclust.files import replacing


class ImageRows:
    """Collects the `rows` of steps and writes `folder`/<step>.npz at each flush, `step` being its end.

    Files from after `restored` belong to steps that will be done again, and are removed.
    """

    def __init__(self, folder: Path, restored: int | None):
        self._folder = folder
        self._waiting: list[dict[str, jax.Array]] = []
        for path in folder.glob("*.npz"):
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
        fetched = jax.device_get(self._waiting)
        arrays = {name: np.concatenate([rows[name] for rows in fetched]) for name in fetched[0]}
        with replacing(self._folder / f"{step}.npz") as temporary:
            np.savez_compressed(temporary, allow_pickle=False, **arrays)
        self._waiting = []
