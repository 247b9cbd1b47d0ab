"""Metrics as JSON lines, CSV and TensorBoard events: one record for each stage and step."""

import csv
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxclust import hosts
from jaxclust.files import replacing
from jaxclust.runtime import tensorflow


class Writer:
    """Writes `metrics.jsonl`, `metrics.csv` and `tensorboard/` of a workdir for one stage.

    Values written for the same step join one record, so that what a restarted run computes again takes the
    place of what was there. Of several hosts only the first writes.
    """

    def __init__(self, workdir: Path, stage: str, restored_step: int | None):
        self._writes = hosts.is_first()
        if not self._writes:
            return
        self._path = workdir / "metrics.jsonl"
        self._csv = workdir / "metrics.csv"
        self._stage = stage
        self._began = time.monotonic() - seconds_of(self._path)
        self._records = kept(self._path, stage, restored_step)
        self._rewrite()
        tensorflow()  # before clu imports it, so that it is kept off the accelerator
        from clu import metric_writers

        self._events = metric_writers.SummaryWriter(str(workdir / "tensorboard" / stage))

    def write(self, step: int, round_: int, values: dict[str, float]) -> None:
        """Adds values to the record of `step`; earlier steps no longer change."""
        if not self._writes:
            return
        times = {"time": time.time(), "seconds": round(time.monotonic() - self._began, 1)}
        last = self._records[-1] if self._records else {}
        if (last.get("stage"), last.get("step")) == (self._stage, step):
            last.update(values, **times)
            self._rewrite()
        else:
            record = {"stage": self._stage, "step": step, "round": round_, **times, **values}
            self._records.append(record)
            with self._path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(record) + "\n")
        self._events.write_scalars(step, values)

    def newest(self, name: str) -> float:
        """The newest value of `name`, 0 without one and on other hosts."""
        return newest(self._records, self._stage, name) or 0.0 if self._writes else 0.0

    def close(self) -> None:
        """Writes the CSV, with a column for every name that occurs."""
        if not self._writes:
            return
        names = list(dict.fromkeys(name for record in self._records for name in record))
        with replacing(self._csv) as temporary, temporary.open("w", newline="", encoding="utf-8") as table:
            rows = csv.DictWriter(table, names)
            rows.writeheader()
            rows.writerows(self._records)
        self._events.close()

    def _rewrite(self) -> None:
        with replacing(self._path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self._records), encoding="utf-8")


def newest(records: Sequence[Mapping[str, Any]], stage: str, name: str) -> float | None:
    """The value of `name` in the last record of a stage that has it, None without one."""
    return next((float(of[name]) for of in reversed(records) if of["stage"] == stage and name in of), None)


def seconds_of(path: Path) -> float:
    """How long all starts so far trained until their last records, those that are computed again included."""
    records = kept(path, "", None)
    return float(records[-1].get("seconds", 0.0)) if records else 0.0


def kept(path: Path, stage: str, restored_step: int | None) -> list[dict[str, Any]]:
    """The records that a start from `restored_step` of `stage` keeps; a torn last line goes with the rest."""
    kept: list[dict[str, Any]] = []
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["stage"] == stage and (restored_step is None or record["step"] > restored_step):
            break
        kept.append(record)
    return kept
