"""How far each layer moves in an epoch, as a share of where it began (--weig).

Of the weights W of a layer after epoch t: |W_t - W_{t-1}| / max(|W_0|, 1e-8), Euclidean; section 2.9 of our
specification of ClustNet. It needs the checkpoints of all epochs.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxclust.errors import DataError
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._epochs import all_kept, kept, states
from jaxclust.pictures._plots import Line, Panel, lines, save
from jaxclust.report.experiment import spanned
from jaxclust.report.gallery import Gallery

SMALLEST = 1e-8  # length of W_0, or with `elementwise` an entry of it, below which nothing is divided by it

Layers = Mapping[tuple[str, str], NDArray[np.float64]]  # all weights of each layer, by group and name


def prepare(seen: Seen) -> Draw:
    """DataError unless the first checkpoint and later ones were kept."""
    epochs, there = kept(seen), all_kept(seen)
    if (epochs[0] != 0 or len(epochs) < 2) and 0 in there and len(there) > 1:
        raise DataError(
            f"config.report.epochs={seen.stage.config.report.epochs!r} must include 0, the weights that later ones are "
            f"compared with, and a later one; there is: {spanned(there)}"
        )
    if epochs[0] != 0 or len(epochs) < 2:
        raise DataError(
            f"it needs checkpoints from the first on, and there are those of epochs {', '.join(map(str, epochs))}; a "
            "training with --config.keep_checkpoints=1000 --config.save_every='1 round' keeps them all"
        )
    return partial(draw, seen, epochs)


def draw(seen: Seen, epochs: Sequence[int], folder: Path) -> Gallery:
    """weights.png, a plot for each group of parameters, and weights.csv."""
    elementwise = seen.stage.config.report.weights.elementwise
    found = distances((layers(jax.device_get(state.params)) for _, state in states(seen, epochs)), elementwise)
    write(folder / "weights.csv", epochs[1:], found)
    groups = list(dict.fromkeys(group for group, _ in found))
    panels = [panel(group, epochs[1:], {name: y for (of, name), y in found.items() if of == group}) for group in groups]
    what = "of each weight to its first value, as one vector" if elementwise else "to the length of the first weights"
    caption = f"How far each layer moved since the epoch before, in proportion {what}; the thick line is the mean."
    return Gallery(
        "Movement of the weights", caption, [save(partial(lines, panels), folder, "weights")], epochs=spanned(epochs)
    )


def panel(group: str, epochs: Sequence[int], found: Mapping[str, Sequence[float]]) -> Panel:
    """One line for each layer of a group, and their mean."""
    mean = np.mean(list(found.values()), axis=0).tolist()
    each = [Line(name, epochs, y, place + 1, width=1.2) for place, (name, y) in enumerate(found.items())]
    return Panel(group, [Line("mean", epochs, mean, 0, width=3.0), *each])


def layers(params: Any) -> dict[tuple[str, str], NDArray[np.float64]]:
    """All weights of each layer in a row, by the group of the layer (the first key of params) and its name."""
    parts: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        group, *names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        parts.setdefault((group, "/".join(names[:-1]) or group), []).append(np.ravel(leaf).astype(np.float64))
    return {name: np.concatenate(of_layer) for name, of_layer in parts.items()}


def distances(epochs: Iterable[Layers], elementwise: bool) -> dict[tuple[str, str], list[float]]:
    """For each layer how far it moved in each epoch but the first, which it is compared with."""
    found: dict[tuple[str, str], list[float]] = {}
    first: Layers | None = None
    before: Layers = {}
    for now in epochs:
        first = first or now
        for name in now if before else ():
            change = now[name] - before[name]
            found.setdefault(name, []).append(_relative(change, first[name], elementwise))
        before = now
    return found


def _relative(change: NDArray[np.float64], first: NDArray[np.float64], elementwise: bool) -> float:
    if elementwise:
        counts = np.abs(first) >= SMALLEST  # what began at 0 has no change in proportion
        return float(np.linalg.norm(change[counts] / first[counts]))
    return float(np.linalg.norm(change)) / max(float(np.linalg.norm(first)), SMALLEST)


def write(path: Path, epochs: Sequence[int], found: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """A row for each layer and epoch: group, layer, epoch, distance."""
    with path.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("group", "layer", "epoch", "distance"))
        for (group, name), values in found.items():
            writer.writerows((group, name, epoch, f"{value:.8g}") for epoch, value in zip(epochs, values, strict=True))
