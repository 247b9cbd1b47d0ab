"""A small training, and what it leaves."""

import csv
import json

ROUNDS = 4
ARGUMENTS = (
    "--config=configs/deepcluster.py:smoke", f"--config.rounds={ROUNDS}", "--config.batch_size=128",
    "--config.runtime.cpu_devices=1", "--config.cluster.k=50",
)  # fmt: skip


def outcome(workdir):
    """What a run says, times aside."""
    results = json.loads((workdir / "results.json").read_text())
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    with open(workdir / "assignments.csv", newline="") as file:
        assignments = list(csv.DictReader(file))
    assert len(assignments) == results["images"] and len(metrics) == ROUNDS + 1
    del results["seconds"]
    untimed = [{k: v for k, v in m.items() if k not in ("time", "seconds", "images_per_second")} for m in metrics]
    return results, untimed, assignments
