"""What the network says of every split while it trains: figures for the log, and files of scores for each epoch."""

from collections.abc import Mapping

import numpy as np

from jaxclust import hosts
from jaxclust.data.split import Split
from jaxclust.evaluation import retrieval, suite
from jaxclust.features import score_file
from jaxclust.methods.base import TrainState
from jaxclust.train import image_rows
from jaxclust.train.lengths import due
from jaxclust.train.refresh import run
from jaxclust.train.stage import Stage, seen_labels

Predictions = dict[str, np.ndarray]

SELECTING = "val/r@1"  # by which the best state of a method that learns from labels is known


def is_due(stage: Stage, step: int) -> bool:
    """Whether there is something to do after `step` updates."""
    return _judging(stage, step) or _scoring(stage, step)


def _judging(stage: Stage, step: int) -> bool:
    return stage.lengths.eval > 0 and (step == stage.lengths.stage or due(step, stage.lengths.eval))


def _scoring(stage: Stage, step: int) -> bool:
    """Scores are of whole rounds."""
    length = stage.lengths
    return length.scores > 0 and due(step, length.round) and (step == length.stage or due(step, length.scores))


def validate(stage: Stage, state: TrainState, step: int) -> dict[str, float]:
    """The figures that are due: what `stage.measure` says, by default the evaluation suite on every split, or of a
    method that predicts nothing how well images of a class find each other.

    Writes the files of scores that are due, for which rows/<stage>/ must be written up to `step`. Every host calls it.
    """
    judging, scoring = _judging(stage, step), _scoring(stage, step)
    values: dict[str, float] = {}
    if stage.measure is not None:
        return stage.measure(state) if judging else values
    splits = {"train": stage.split, **stage.others}
    if stage.predict is None:
        return retrieved(stage, state, splits) if judging else values
    scored = "test" if "test" in splits else "train"
    for name, split in splits.items():
        if judging or name == scored:
            of_split = stage._replace(split=split)
            predictions = predict(of_split, state, name)
            values |= judge(of_split, state, name, predictions) if judging else {}
            if scoring and name == scored and hosts.is_first():
                _write(of_split, step, np.exp(predictions["log_probs"].astype(np.float64)), predictions["groups"])
    if scoring and step and hosts.is_first():
        _write_seen(stage, step)
    return values


def retrieved(stage: Stage, state: TrainState, splits: Mapping[str, Split]) -> dict[str, float]:
    """R@K by cosine of the features of each split where two images are known to share a class: "<split>/r@<K>"."""
    values: dict[str, float] = {}
    for name, split in splits.items():
        if split.labels is None or np.bincount(split.labels[split.labels >= 0], minlength=1).max() < 2:
            continue
        rows = run(stage._replace(split=split), state, stage.embed, f"evaluation of {name}")["features"]
        found = retrieval.scores(rows, split.labels, stage.config.evaluate.recall_at)
        values |= {f"{name}/{score}": value for score, value in found.items() if score.startswith("r@")}
    return values


def predict(stage: Stage, state: TrainState, name: str) -> Predictions:
    """What the method predicts for every image of the stage's split, called `name`, by id, on every host."""
    assert stage.predict is not None
    return {key: rows.whole() for key, rows in run(stage, state, stage.predict, f"evaluation of {name}").items()}


def judge(stage: Stage, state: TrainState, name: str, predictions: Predictions) -> dict[str, float]:
    """The figures of the stage's split, "<name>/<score>"; of the training images also those with a name of their own,
    "heads/<score>"."""
    scores = suite.evaluate(
        predictions, stage.split.labels, stage.config, lambda: run(stage, state, stage.embed, "features")["features"]
    )
    plain = {f"{name}/{key}": value for key, value in scores.items() if "/" not in key}
    return plain | ({key: value for key, value in scores.items() if "/" in key} if name == "train" else {})


def _write_seen(stage: Stage, step: int) -> None:
    """The scores of the round that ends at `step`, as its steps saw them, in their order.

    Of a round with a pass over the images that are trained on or more, whole passes: what only fills it up is left out.
    DataError if files of rows are missing.
    """
    start, size, count = step - stage.lengths.round, stage.config.batch_size, stage.lengths.round
    groups = seen_labels(stage.method, stage.config, stage.info, stage.split)
    known = stage.split.size if groups is None else int((groups >= 0).sum())
    filled = count * size % known if count * size > known else 0
    positions, folder = (start * size, step * size - filled), stage.workdir / "rows" / stage.name
    _write(stage, step, *image_rows.between(folder, (start, step), positions, ("gate", "groups", "id")))


def _write(stage: Stage, step: int, gate: np.ndarray, log_probs: np.ndarray, trained: np.ndarray | None = None) -> None:
    """A file of scores, of the images that were `trained` on, or of all images of the stage's split."""
    split = stage.split
    ids = np.arange(split.size, dtype=np.int32) if trained is None else trained
    unknown = np.full(split.size, -1, np.int32)
    labels, groups = split.labels, seen_labels(stage.method, stage.config, stage.info, split)
    scores = score_file.Scores(
        (unknown if labels is None else labels)[ids],
        (unknown if groups is None else groups)[ids],
        log_probs,
        gate,
        ids if stage.config.scores.index else None,
    )
    epoch = step // stage.lengths.round
    score_file.write(score_file.path_of(stage.workdir, epoch, trained is not None), scores)
