"""The runs of a sweep side by side: tables, a plot and a page, read from its workdir.

`sweep.csv` repeats all of each run's results. The summary, its plot and the hint are made of what needs no labels; how
well groups of classes were told apart stands beside them, in a table and a plot of its own (`JUDGED`).
"""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxclust import config as settings
from jaxclust.errors import DataError
from jaxclust.evaluation.stability import agreement
from jaxclust.files import read_json, replacing
from jaxclust.report import figures, gallery, sweep_figure

One = bool | int | float | str
Value = One | tuple[One, ...]
Values = dict[str, Value]

SEED = "seed"
DONE, FAILED, WAITING, DAMAGED = "done", "failed", "not finished", "damaged"


class Measure(NamedTuple):
    """A column of the summary: its title, and how its numbers are shown."""

    title: str
    shown: str


MEASURES = {
    "silhouette": Measure("silhouette", ".3f"),
    "stability": Measure("stability: ARI between seeds", ".3f"),
    "normalised_entropy": Measure("entropy of the sizes, 1 when even", ".3f"),
    "largest_share": Measure("share of the largest cluster", ".1%"),
    "clusters": Measure("clusters found", ",.4g"),
    "seconds": Measure("seconds of training", ",.0f"),
}


JUDGED = {
    "binary": Measure("right groups of classes", ".3f"),
    "acc_p": Measure("experts that are classes of P", ".3f"),
    "acc_n": Measure("experts that are classes of N", ".3f"),
}
"""What labels say, of the test images or where there are none of the training images: median and range over seeds."""


class Plan(NamedTuple):
    """What a sweep consists of, as its `sweep.json` says."""

    fields: tuple[str, ...]
    runs: dict[str, Values]  # by folder, in the order of their numbers


class Row(NamedTuple):
    """A run: its folder, its values, how it ended, and what it found."""

    run: str
    values: Values
    status: str
    why: str  # it failed, or cannot be read
    results: dict[str, float]
    measures: dict[str, float]

    @property
    def judged(self) -> dict[str, float]:
        """The measures of JUDGED, as "<split>/<name>"."""
        keys = {name: next((k for k in (f"test/{name}", f"train/{name}") if k in self.results), "") for name in JUDGED}
        return {key: self.results[key] for key in keys.values() if key}


class Spread(NamedTuple):
    """A measure over seeds."""

    median: float
    low: float
    high: float


class Group(NamedTuple):
    """The finished runs that differ in their seed alone; a measure is absent where there is none."""

    values: Values
    seeds: int
    mean: dict[str, float]
    std: dict[str, float]  # with n - 1, from two seeds on
    judged: dict[str, Spread] = {}
    agreement: dict[str, float] = {}  # of each run with the other seeds


class Summary(NamedTuple):
    """What is to be said of a sweep, and where it stands; of JUDGED there is a second table under the first."""

    table: str
    hint: str
    page: Path


def write(workdir: Path) -> Summary:
    """Writes sweep.csv, summary.csv, and report/index.html with its plot, of as many runs as are finished."""
    plan = read_plan(workdir)
    rows = read_rows(workdir, plan)
    groups = summarize(workdir, by_values(plan, rows))
    fields = [name for name in plan.fields if name != SEED]
    agreed = {run: value for group in groups for run, value in group.agreement.items()}
    found = [row.results | ({"agreement": agreed[row.run]} if row.run in agreed else {}) for row in rows]
    names = list(dict.fromkeys(["agreement", *(name for numbers in found for name in numbers)]))
    _write_csv(
        workdir / "sweep.csv",
        ["run", *plan.fields, "status", "failed", *names],
        (
            [row.run, *(row.values[f] for f in plan.fields), row.status, row.why, *_cells(numbers, names)]
            for row, numbers in zip(rows, found, strict=True)
        ),
    )
    judged = list(dict.fromkeys(name for row in rows for name in row.judged))
    columns = [name for measure in MEASURES for name in (measure, f"{measure}_std") if name != "stability_std"]
    columns += [f"{name}_{part}" for name in judged for part in Spread._fields]
    numbers = [_numbers(group) for group in groups]
    _write_csv(
        workdir / "summary.csv",
        [*fields, "seeds", *columns],
        ([*g.values.values(), g.seeds, *_cells(n, columns)] for g, n in zip(groups, numbers, strict=True)),
    )
    tables = [[[*fields, "seeds", *MEASURES], *(shown(group) for group in groups)]]
    tables += [[[*fields, "seeds", *judged], *(shown_judged(group, judged) for group in groups)]] if judged else []
    page = _write_page(workdir, plan, rows, groups, agreed, tables)
    return Summary("\n\n".join(aligned(table) for table in tables), hint(groups), page)


def read_plan(workdir: Path) -> Plan:
    """Reads sweep.json; DataError says what to do if it is damaged."""
    path = workdir / "sweep.json"
    try:
        saved = read_json(path)
        nets = [{name: _value(values[name]) for name in saved["fields"]} for values in saved["runs"]]
    except (DataError, KeyError, TypeError) as error:
        said = error if isinstance(error, DataError) else f"{path} is damaged: {error!r}"
        raise DataError(
            f'{said}. Restore it from a copy, or write it again: {{"fields": [names of what is swept], "runs": [of '
            "net1, net2 and so on what their config.json has, {name: value}]}. The nets are there: "
            f"--job=report --workdir={workdir / name_of(1)} is of one"
        ) from None
    return Plan(tuple(saved["fields"]), {name_of(number): values for number, values in enumerate(nets, 1)})


def _value(saved: Any) -> Value:
    """A value as JSON has it; several numbers are a list there."""
    value: Value = tuple(saved) if isinstance(saved, list) else saved
    return value


def name_of(number: int) -> str:
    """The folder of the net with a number, from 1."""
    return f"net{number}"


def named(values: Values) -> str:
    """Values in words."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def read_outcome(workdir: Path, run: str) -> tuple[str, str]:
    """How a run ended, and why if it failed."""
    path = workdir / "outcomes" / f"{run}.json"
    if not path.exists():
        return WAITING, ""
    try:
        saved = read_json(path)
    except DataError as error:
        return WAITING, str(error)  # which a sweep writes again
    return saved["status"], saved["why"]


def read_rows(workdir: Path, plan: Plan) -> list[Row]:
    """Every run of the plan, by number."""
    return [_row(workdir, run, values) for run, values in plan.runs.items()]


def by_values(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """The rows by their values, numbers and tuples of them in rising order and words as they were given, seeds last."""
    order = sorted(plan.fields, key=lambda name: name == SEED)
    given = {name: list(dict.fromkeys(row.values[name] for row in rows)) for name in order}

    def rank(row: Row) -> list[Any]:
        values = ((given[name], row.values[name]) for name in order)
        return [known.index(value) if isinstance(value, str) else value for known, value in values]

    return sorted(rows, key=rank)


def _row(workdir: Path, run: str, values: Values) -> Row:
    status, why = read_outcome(workdir, run)
    if status != DONE:
        return Row(run, values, status, why, {}, {})
    try:
        results, config = read_json(workdir / run / "results.json"), settings.load(workdir / run / "config.json")
    except DataError as error:
        return Row(run, values, DAMAGED, str(error), {}, {})
    config = settings.for_stage(config, settings.stage_names(config)[-1])
    asked = config.cluster.k if config.cluster.method != "pic" else 0
    most = math.log(max(asked, results["clusters"], 1))
    named = {name: results[key] for name in MEASURES for key in (name, f"train/{name}") if key in results}
    named["normalised_entropy"] = results["train/entropy"] / most if most else 0.0
    return Row(run, values, status, "", results, named)


def summarize(workdir: Path, rows: Sequence[Row]) -> list[Group]:
    """Means and deviations over seeds, in the order of the rows."""
    members: dict[tuple[tuple[str, Value], ...], list[Row]] = {}
    for row in rows:
        key = tuple((name, value) for name, value in row.values.items() if name != SEED)
        members.setdefault(key, []).extend([row] if row.status == DONE else [])
    return [_group(workdir, dict(key), of_seeds) for key, of_seeds in members.items()]


def _numbers(group: Group) -> dict[str, float]:
    """The numbers of a line of summary.csv by column."""
    numbers = group.mean | {f"{name}_std": value for name, value in group.std.items()}
    spreads = group.judged.items()
    return numbers | {f"{name}_{part}": v for name, spread in spreads for part, v in spread._asdict().items()}


def _group(workdir: Path, values: Values, rows: Sequence[Row]) -> Group:
    numbers = {name: [row.measures[name] for row in rows if name in row.measures] for name in MEASURES}
    mean = {name: statistics.fmean(found) for name, found in numbers.items() if found}
    std = {name: statistics.stdev(found) for name, found in numbers.items() if len(found) > 1}
    assignments = [_assignment(workdir / row.run / "assignments.csv") for row in rows] if len(rows) > 1 else []
    if len({len(assignment) for assignment in assignments}) == 1:  # else not of the same images, or cut off
        agreed = dict(zip((row.run for row in rows), agreement(assignments), strict=True))
        mean["stability"] = statistics.fmean(agreed.values())
    else:
        agreed = {}
    judged: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.judged.items():
            judged.setdefault(name, []).append(value)
    spreads = {name: Spread(statistics.median(found), min(found), max(found)) for name, found in judged.items()}
    return Group(values, len(rows), mean, std, spreads, agreed)


def _assignment(path: Path) -> NDArray[np.int64]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return np.array([int(row["cluster"]) for row in csv.DictReader(file) if row.get("cluster")], np.int64)


def shown(group: Group) -> list[str]:
    """A row of the table that people read."""
    cells = [str(value) for value in group.values.values()] + [str(group.seeds)]
    for name, measure in MEASURES.items():
        value = format(group.mean[name], measure.shown) if name in group.mean else "–"
        deviation = group.std.get(name)
        cells.append(f"{value} ± {format(deviation, measure.shown)}" if deviation is not None else value)
    return cells


def shown_judged(group: Group, names: Sequence[str]) -> list[str]:
    """A row of the second table: medians, and from two seeds on the range."""
    cells = [str(value) for value in group.values.values()] + [str(group.seeds)]
    for name in names:
        kind, spread = JUDGED[name.partition("/")[2]].shown, group.judged.get(name)
        if spread is None:
            cells.append("–")
            continue
        median, low, high = (format(value, kind) for value in spread)
        cells.append(f"{median} ({low} to {high})" if group.seeds > 1 else median)
    return cells


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Plain text in columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(lines)


def hint(groups: Sequence[Group]) -> str:
    """Which values have the highest silhouette and the highest stability, and which of their seeds agrees most with the
    others, in a line."""
    words = []
    for name in ("silhouette", "stability"):
        measured = [group for group in groups if name in group.mean]
        if len(measured) > 1:
            best = max(measured, key=lambda group: group.mean[name])
            words.append(f"best {name}: {named(best.values)} ({best.mean[name]:.3f})")
    several = [group for group in groups if len(group.agreement) > 2]  # two agree as much with each other
    if several:
        best = max(several, key=lambda group: group.mean["stability"])
        run = max(best.agreement, key=lambda run: best.agreement[run])
        of = f" with {named(best.values)}" if best.values else ""
        words.append(f"of the {best.seeds} seeds{of} {run} agrees most with the others ({best.agreement[run]:.3f})")
    if not words:
        return "There is nothing to compare yet: a hint needs two finished values, or three seeds."
    return f"{'; '.join(words)}. These are hints, not answers: look at the clusters."


def _cells(numbers: dict[str, float], names: Iterable[str]) -> list[str]:
    return [f"{numbers[name]:.10g}" if name in numbers else "" for name in names]


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _write_page(
    workdir: Path,
    plan: Plan,
    rows: Sequence[Row],
    groups: Sequence[Group],
    agreement: dict[str, float],
    tables: Sequence[Sequence[Sequence[str]]],
) -> Path:
    """The plots for light and for dark pages, and the page; the page comes last. `agreement` is of the runs."""
    folder = workdir / "report"
    plots = {"sweep": _panels(plan, groups), "judged": _judged_panels(plan, groups)}
    for name, panels in plots.items():
        for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)) if panels else ():
            with replacing(folder / f"{name}{suffix}.png") as temporary:
                figures.save(sweep_figure.draw(panels, _first(plan), theme), temporary)
    page = gallery.template("sweep.html.jinja").render(
        fields=plan.fields,
        tables=tables,
        rows=rows,
        judged={name: JUDGED[name.partition("/")[2]] for name in (tables[1][0] if tables[1:] else ()) if "/" in name},
        agreement=agreement,
        plots=[name for name, panels in plots.items() if panels],
        hint=hint(groups),
        galleries=gallery.read(workdir),
        light=figures.LIGHT,
        dark=figures.DARK,
    )
    path = folder / "index.html"
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", errors="replace"))
    return path


def _first(plan: Plan) -> str:
    """The field along the horizontal axis."""
    return next((name for name in plan.fields if name != SEED), SEED)


def _lines(plan: Plan, groups: Sequence[Group]) -> dict[str, list[Group]]:
    """All that differ in the first field alone, by the values of the others."""
    lines: dict[str, list[Group]] = {}
    for group in groups:
        others = {name: value for name, value in group.values.items() if name != _first(plan)}
        lines.setdefault(named(others), []).append(group)
    return lines


def _panels(plan: Plan, groups: Sequence[Group]) -> list[sweep_figure.Panel]:
    """A plot for each measure that there is, of means and deviations."""
    panels = []
    for name, measure in MEASURES.items():
        series = []
        for label, found in _lines(plan, groups).items():
            measured = [group for group in found if name in group.mean]
            mean, std = ([getattr(g, of).get(name, math.nan) for g in measured] for of in ("mean", "std"))
            series.append(sweep_figure.Series(label, _places(plan, measured), mean, std, std))
        if any(line.x for line in series):
            panels.append(sweep_figure.Panel(measure.title, series, measure.shown.endswith("%")))
    return panels


def _judged_panels(plan: Plan, groups: Sequence[Group]) -> list[sweep_figure.Panel]:
    """A plot for each of JUDGED that there is, of medians and ranges."""
    panels = []
    for name in dict.fromkeys(name for group in groups for name in group.judged):
        series = []
        for label, found in _lines(plan, groups).items():
            measured = [group for group in found if name in group.judged]
            spreads = [group.judged[name] for group in measured]
            below, above = [s.median - s.low for s in spreads], [s.high - s.median for s in spreads]
            places = _places(plan, measured)
            series.append(sweep_figure.Series(label, places, [s.median for s in spreads], below, above))
        split, _, short = name.partition("/")
        panels.append(sweep_figure.Panel(f"{JUDGED[short].title}, {split}", series))
    return panels


def _places(plan: Plan, groups: Sequence[Group]) -> list[Value]:
    """Where groups lie along the horizontal axis."""
    return [group.values.get(_first(plan), "all seeds") for group in groups]
