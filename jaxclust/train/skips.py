"""Steps that a method did not take (`Method.accept`): how many of a stage, and an error if that is all of them."""

from collections.abc import Mapping

from jaxclust import hosts
from jaxclust.errors import NonFiniteError
from jaxclust.train.stage import Stage
from jaxclust.train.writer import kept, newest

COUNT = "train/skipped_steps"  # since the first step of the stage


def check(stage: Stage, step: int, values: Mapping[str, float]) -> None:
    """NonFiniteError if a round or more is over, `step` steps, and none was taken: nothing is or will be learnt.

    Every host must call it. A step that was skipped changes nothing, so that the first checkpoint is all there is.
    """
    if COUNT not in values or step < min(stage.lengths.round, stage.lengths.stage):
        return
    if hosts.agreed(int(values[COUNT] == step)):
        s = stage.config.dscl
        raise NonFiniteError(
            f"stage {stage.name!r}: all {step:,} steps so far were skipped, so that nothing was learnt. Loss or "
            f"gradient of each were not finite, or over config.dscl.max_grad_norm={s.max_grad_norm:g} (0: any) or "
            f"config.dscl.loss_skip_threshold={s.loss_skip_threshold:g}; metrics.csv has their size. Since no step was "
            "taken, a learning rate is not the cause. Likely causes: one of these limits is too low; numbers of "
            f"config.data.source={stage.config.data.source!r}, or weights of config.init_from="
            f"{stage.config.init_from!r}, that are huge or not finite"
        )


def result(stage: Stage, step: int) -> dict[str, int]:
    """How many of the first `step` steps were skipped, "skipped_steps", if metrics.jsonl says it."""
    found = newest(kept(stage.workdir / "metrics.jsonl", stage.name, step), stage.name, COUNT)
    return {} if found is None else {"skipped_steps": round(found)}
