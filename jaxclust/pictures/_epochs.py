"""The checkpoints that a stage kept at the ends of its epochs (its rounds), and the images that are pictured."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxclust.data.source import Source, Split
from jaxclust.errors import DataError
from jaxclust.features.extract import Program, outputs
from jaxclust.methods.base import TrainState
from jaxclust.pictures import Seen
from jaxclust.progress import progress
from jaxclust.report import experiment
from jaxclust.train.checkpoint import Checkpoints


def kept(seen: Seen, last: bool = False) -> list[int]:
    """The epochs after which a checkpoint was kept, 0 before the first, that `report.epochs` asks for, rising.

    By default all, or the `last`; DataError if it asks for others only.
    """
    there = all_kept(seen)
    if not there:
        raise DataError("no checkpoint of the end of an epoch was kept; config.save_every='1 round' saves them")
    return experiment.asked_epochs(there, seen.stage.config, last)


def all_kept(seen: Seen) -> list[int]:
    """The epochs after which a checkpoint was kept, whatever `report.epochs` asks for."""
    length = seen.stage.lengths.round
    return [step // length for step in _checkpoints(seen).steps() if step % length == 0]


def states(seen: Seen, epochs: Sequence[int]) -> Iterator[tuple[int, TrainState]]:
    """(epoch, the state after it) of some epochs that were kept."""
    checkpoints, like = _checkpoints(seen), seen.stage.first()
    for epoch in progress(epochs, len(epochs), "checkpoints", "epochs"):
        step = epoch * seen.stage.lengths.round
        yield epoch, checkpoints.restore(like, seen.stage.method.fresh, step).state


def _checkpoints(seen: Seen) -> Checkpoints:
    return Checkpoints(seen.stage.workdir / "checkpoints" / seen.stage.name)


def split_of(seen: Seen, source: Source) -> tuple[str, Split]:
    """The images that are pictured, and their name: test, or train if that is asked for or there are no others."""
    name = experiment.of_split(seen.stage.config)
    name = name if name in source.splits else "train"
    return name, source.splits[name]


def found(seen: Seen, state: TrainState, program: Program, split: Split, epoch: int) -> Iterator[dict[str, Any]]:
    """What a compiled program says of the images of a split by the state of an epoch, in batches without padding."""
    of = (state.params, state.extra, split, seen.stage.config, seen.stage.mesh)
    for mask, values in outputs(program, *of, f"epoch {epoch}"):
        yield {name: value[mask] for name, value in values.items()}
