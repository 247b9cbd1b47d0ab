"""The share of exact zeros in what experts are given and in what their convolutions make of it (--spar).

With a hard gate an expert is given zeros for all images but its own, so pairs of an image and the expert chosen for it
stand beside all pairs. Section 2.9 of our specification of ClustNet.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxclust.data.source import Source
from jaxclust.errors import DataError
from jaxclust.features.extract import compile_for
from jaxclust.pictures import Draw, Seen
from jaxclust.pictures._epochs import found as found_in
from jaxclust.pictures._epochs import kept, split_of, states
from jaxclust.pictures._experts import of_method
from jaxclust.pictures._plots import SHARE, Line, Panel, lines, save
from jaxclust.report.experiment import Net, by_field, spanned
from jaxclust.report.gallery import Gallery

FILE = "sparsity.csv"
PAIRS = {"all": "all pairs of image and expert", "chosen": "images and the expert chosen for each"}

Shares = Mapping[str, Mapping[str, float]]  # of zeros, by layer and kind of pairs


def prepare(seen: Seen) -> Draw:
    """DataError where there are no experts, no images or no checkpoint of the end of an epoch."""
    of_method(seen)
    return partial(draw, seen, kept(seen), seen.source())


def draw(seen: Seen, epochs: Sequence[int], source: Source, folder: Path) -> Gallery:
    """sparsity.png and sparsity.csv: epoch, layer, zeros over all pairs, over those that were chosen."""
    name, split = split_of(seen, source)
    program = compile_for(partial(zeros, of_method(seen)), seen.stage.mesh)
    found = {e: shares(found_in(seen, state, program, split, e)) for e, state in states(seen, epochs)}
    write(folder / FILE, found)
    layers = list(next(iter(found.values())))
    panels = [
        Panel(title, [_line(found, layer, pairs, layer, place) for place, layer in enumerate(layers)], SHARE)
        for pairs, title in PAIRS.items()
    ]
    caption = f"The mean over the {name} images of the share of exact zeros, where a checkpoint was kept."
    shown = save(partial(lines, panels), folder, "sparsity")
    return Gallery("Sparsity", caption, [shown], epochs=spanned(epochs))


def compare(nets: Sequence[Net]) -> Draw:
    """DataError where no net has this picture; damaged files of nets are skipped, and named."""
    found, skipped = {}, []
    for net in nets:
        try:
            found[net.number] = read_back(net.workdir / "pictures" / "sparsity" / FILE)
        except DataError as error:
            skipped.append(f"{net.name}: {error}")
    if not any(found.values()):
        raise DataError("; ".join(["no run of the sweep has it", *skipped]))
    shown = [net for net in by_field(nets) if found.get(net.number)]
    return partial(draw_together, shown, found, tuple(skipped))


def draw_together(
    nets: Sequence[Net], found: Mapping[int, Mapping[int, Shares]], skipped: tuple[str, ...], folder: Path
) -> Gallery:
    """sparsity.png, a plot for each layer and kind of pairs, with a line for each net."""
    layers = list(dict.fromkeys(layer for net in nets for of in found[net.number].values() for layer in of))
    panels = [
        Panel(
            f"{layer}: {title}",
            [_line(found[net.number], layer, pairs, net.legend, place) for place, net in enumerate(nets)],
            SHARE,
        )
        for layer in layers
        for pairs, title in PAIRS.items()
    ]
    caption = "The mean over images of the share of exact zeros, at the epochs of which each net kept a checkpoint."
    return Gallery("Sparsity", caption, [save(partial(lines, panels, 2), folder, "sparsity")], skipped=skipped)


def _line(found: Mapping[int, Shares], layer: str, pairs: str, label: str, place: int) -> Line:
    there = [epoch for epoch, of_epoch in found.items() if layer in of_epoch]
    return Line(label, there, [found[epoch][layer][pairs] for epoch in there], place)


def zeros(experts: Any, params: Any, extra: Any, images: jax.Array) -> dict[str, jax.Array]:
    """The gate's choice [B, K], and the share of exact zeros of each layer for each pair, [B, K]."""
    found = experts(params, extra, images)
    choice = found.pop("choice")
    return {"choice": choice} | {
        name: jnp.mean(maps == 0, axis=tuple(range(2, maps.ndim)), dtype=jnp.float32) for name, maps in found.items()
    }


def shares(batches: Iterable[Mapping[str, NDArray[Any]]]) -> dict[str, dict[str, float]]:
    """Means of what `zeros` says in batches, over all pairs and over those of an image and its likeliest expert."""
    total: dict[str, dict[str, float]] = {}
    count = 0
    for batch in batches:
        number = batch["choice"].argmax(axis=1)
        count += len(number)
        for name in batch.keys() - {"choice"}:
            of_layer = total.setdefault(name, dict.fromkeys(PAIRS, 0.0))
            of_layer["all"] += float(batch[name].mean(axis=1, dtype=np.float64).sum())
            of_layer["chosen"] += float(batch[name][np.arange(len(number)), number].sum(dtype=np.float64))
    order = sorted(total, key=lambda name: (name != "input", len(name), name))
    return {name: {pairs: value / count for pairs, value in total[name].items()} for name in order}


def write(path: Path, found: Mapping[int, Shares]) -> None:
    """A row for each epoch and layer."""
    with path.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("epoch", "layer", *PAIRS))
        for epoch, of_epoch in found.items():
            writer.writerows((epoch, layer, *(f"{of[p]:.8g}" for p in PAIRS)) for layer, of in of_epoch.items())


def read_back(path: Path) -> dict[int, dict[str, dict[str, float]]]:
    """What `write` wrote, nothing where it has not; DataError: the file is damaged."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    if not path.exists():
        return found
    try:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            raise ValueError("it ends in the middle of a line")
        for row in csv.DictReader(text.splitlines()):
            found.setdefault(int(row["epoch"]), {})[row["layer"]] = {pairs: float(row[pairs]) for pairs in PAIRS}
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        again = f"--job=report --config.report.pictures={path.parent.name} draws it again"
        raise DataError(f"{path} is damaged: {error}; {again}") from None
    return found
