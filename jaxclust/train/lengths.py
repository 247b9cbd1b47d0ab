"""Durations of a config in steps, converted once; the loop sees nothing else."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxclust.data.sampler import POOLS
from jaxclust.errors import ConfigError
from jaxclust.kinds import parse_duration


class Lengths(NamedTuple):
    """Steps of a stage, of a round, between two logs, evaluations, saves and decays of a rate (0: never), of the rise
    of a rate, and between two files of scores, whole rounds."""

    stage: int
    round: int
    log: int
    eval: int
    save: int
    every: Mapping[str, int]  # what a schedule counts, by optimiser group
    warmup: Mapping[str, int] = {}  # by optimiser group
    scores: int = 0


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at `step`."""
    return every > 0 and step % every == 0


def lengths(config: ConfigDict, size: int) -> Lengths:
    """Durations for `size` images; an epoch is one pass, its last batch filled by the next draw.

    Where batches are pools of distinct images, it has only whole ones. ConfigError if there is none.
    """
    whole = config.sampler in POOLS
    if whole and config.batch_size > size:
        raise ConfigError(
            f"config.batch_size={config.batch_size}, but config.sampler={config.sampler!r} makes batches of distinct "
            f"images, and there are {size}; lower batch_size to that or less"
        )
    round_steps = _steps(config.refresh_every, "config.refresh_every", size, config.batch_size, None, whole)
    if not round_steps:
        raise ConfigError("config.refresh_every='never': a round needs a length; set for example '1 epoch'")

    def every(text: str, field: str) -> int:
        return _steps(text, f"config.{field}", size, config.batch_size, round_steps, whole)

    stage = config.rounds * round_steps if config.rounds else config.steps
    log, evaluate, save = (every(config[name], name) for name in ("log_every", "eval_every", "save_every"))
    courses, rises = (
        {name: every(group[field], f"optimizer.{name}.{field}") for name, group in config.optimizer.items()}
        for field in ("every", "warmup")
    )
    scores = every(config.scores.every, "scores.every")
    if scores % round_steps:
        raise ConfigError(
            f"config.scores.every={config.scores.every!r} must be whole rounds, of which one is config.refresh_every="
            f"{config.refresh_every!r}; write '1 round', say"
        )
    return Lengths(stage, round_steps, log, evaluate, save, courses, rises, scores)


def _steps(text: str, field: str, size: int, batch_size: int, round_steps: int | None, whole: bool) -> int:
    amount, unit = parse_duration(text)
    if amount == math.inf:
        return 0
    if unit == "epoch" and whole:
        return max(1, round(amount * (size // batch_size)))
    if unit == "epoch":
        return max(1, -(-int(amount * size) // batch_size))
    if unit == "round":
        if round_steps is None:
            raise ConfigError(f"{field}={text!r}: the length of a round is counted in steps or epochs")
        return max(1, round(amount * round_steps))
    return max(1, round(amount))
