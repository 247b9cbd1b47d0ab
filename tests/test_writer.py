"""Metrics survive restarts: one record for each step, none lost, none twice."""

import csv
import json

from jaxclust.train.writer import Writer, seconds_of


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_records_after_the_restored_step_are_written_again(tmp_path):
    writer = Writer(tmp_path, "first", None)
    for step in (0, 5, 10):
        writer.write(step, step // 5, {"a": float(step)})
    writer.write(10, 2, {"b": 1.0})  # joins the record of step 10
    writer.close()
    assert [(r["step"], r["a"]) for r in records(tmp_path)] == [(0, 0.0), (5, 5.0), (10, 10.0)]
    assert records(tmp_path)[-1]["b"] == 1.0

    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"stage": "first", "st')  # a kill tore the last line
    writer = Writer(tmp_path, "first", 5)
    writer.write(5, 1, {"c": 2.0})  # done again after the restart: takes the place of what was there
    writer.write(10, 2, {"a": 11.0})
    writer.close()
    assert [(r["step"], r["a"]) for r in records(tmp_path)] == [(0, 0.0), (5, 5.0), (10, 11.0)]
    assert records(tmp_path)[1]["c"] == 2.0 and "b" not in records(tmp_path)[2]

    writer = Writer(tmp_path, "second", None)
    writer.write(0, 0, {"a": 7.0})
    writer.close()
    assert [(r["stage"], r["step"]) for r in records(tmp_path)][-1] == ("second", 0)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["a"] for row in table] == ["0.0", "5.0", "11.0", "7.0"] and table[0]["c"] == ""

    writer = Writer(tmp_path, "first", None)  # nothing was saved: all of the stage is gone, and what came after it
    writer.close()
    assert records(tmp_path) == []
    assert list((tmp_path / "tensorboard" / "first").glob("events*"))


def test_seconds_go_on_where_the_start_before_ended(tmp_path):
    old = {"stage": "first", "step": 0, "round": 0, "time": 1.0}  # of an earlier version
    lost = {"stage": "second", "step": 7, "seconds": 90.0}  # which a restart computes again
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(lost) + "\n")
    writer = Writer(tmp_path, "second", 5)
    writer.write(6, 1, {"a": 0.0})
    writer.close()
    assert 90 <= seconds_of(tmp_path / "metrics.jsonl") == records(tmp_path)[-1]["seconds"] < 100
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    assert seconds_of(tmp_path / "metrics.jsonl") == seconds_of(tmp_path / "none") == 0
