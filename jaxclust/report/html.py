"""Writes report/index.html and its pictures from what a workdir holds."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from jaxclust import config as settings
from jaxclust.errors import ConfigError
from jaxclust.evaluation import clustering
from jaxclust.files import replacing
from jaxclust.progress import progress
from jaxclust.report import curves, figures, gallery, scores
from jaxclust.report.gallery import template
from jaxclust.report.workdir import Confusion, Run, read

OVERVIEW_ROWS = 20
SHEETS = 100
SHEET_COLUMNS = 8
FILES_LISTED = 24
SKIPPED_LISTED = 50


class Cluster(NamedTuple):
    """What is known of one cluster."""

    id: int
    size: int
    share: float
    name: str  # the class it stands for; empty when unknown
    rank: int  # position of that class among all; clusters without one come last
    purity: float | None
    images: NDArray[Any] | None  # uint8 [n, H, W, C], nearest to the centre first
    files: list[str]


class Picture(NamedTuple):
    """A figure on the page, or the reason why it is absent."""

    name: str  # file name without suffix
    title: str
    caption: str
    missing: str
    size: tuple[int, int] | None = None


def write(workdir: Path) -> Path:
    """Writes the report of a finished or running workdir and returns the path of its page.

    Every file of the workdir is optional; the page says what is missing. Pictures and page appear
    whole or not at all, and the page comes last.

    Raises:
      ConfigError: there is no such folder.
    """
    if not workdir.is_dir():
        raise ConfigError(f"workdir={str(workdir)!r} is not a folder; train first, or check the path")
    run = read(workdir)
    clusters = _clusters(run)
    folder = workdir / "report"
    sheets = _write_sheets(clusters, folder / "clusters")
    pictures = [_draw(picture, draw, folder) for picture, draw in _pictures(run, clusters)]
    page = template("index.html.jinja").render(
        title=_title(run),
        subtitle=_subtitle(run),
        status=_status(run),
        facts=_facts(run, clusters),
        warnings=_warnings(run),
        scores=scores.by_stage(run.results or {}, list(run.stages) or [""]),
        made_by={name: _made_by(config) for name, config in run.stages.items()},
        score_names=scores.AGREEMENT,
        comparisons=scores.comparisons(run.results or {}),
        meanings=scores.MEANINGS,
        galleries=gallery.read(workdir),
        pictures={picture.name: picture for picture in pictures},
        clusters=clusters,
        clustered=bool(clusters) or not run.finished,  # a method may predict none
        sheets=sheets,
        settings=_settings(run),
        skipped=run.skipped,
        skipped_listed=SKIPPED_LISTED,
        assignments=(workdir / "assignments.csv").is_file(),
        light=figures.LIGHT,
        dark=figures.DARK,
    )
    path = folder / "index.html"
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", errors="replace"))
    _remove_stale(folder / "clusters", set(sheets.values()))
    return path


def _clusters(run: Run) -> list[Cluster]:
    """The clusters found; by the class they stand for where that is known, then by size."""
    if run.clusters is None:
        return []
    ids, counts = run.clusters
    total = counts.sum()
    earlier = tuple(f"{stage}-" for stage in run.stages)  # whose clusters are others
    own = (confusion for split, confusion in run.confusions.items() if not split.startswith(earlier))
    known = _classes(next(own, None))
    found = []
    for cluster, size in zip(ids.tolist(), counts.tolist(), strict=True):
        name, rank, purity = known.get(cluster, ("", len(known), None))
        images, files = _nearest(run, cluster)
        found.append(Cluster(cluster, size, size / total, name, rank, purity, images, files))
    return sorted(found, key=lambda c: (c.rank, -c.size))


def _classes(confusion: Confusion | None) -> dict[int, tuple[str, int, float | None]]:
    """Cluster to the class it stands for: name, position, share of the cluster."""
    if confusion is None:
        return {}
    return {
        confusion.clusters[row]: (
            confusion.classes[column],
            int(column),
            float(confusion.table[row, column] / confusion.table[row].sum()),
        )
        for row, column in zip(*clustering.pair(confusion.table), strict=True)
    }


def _nearest(run: Run, cluster: int) -> tuple[NDArray[Any] | None, list[str]]:
    if run.samples is None:
        return None, []
    members = np.flatnonzero(run.samples.cluster == cluster)
    if not len(members):
        return None, []
    members = members[np.argsort(run.samples.distance[members], kind="stable")]
    files = [run.paths.get(int(i), "") for i in run.samples.id[members[:FILES_LISTED]]]
    return run.samples.images[members], [name for name in files if name]


def _largest(clusters: list[Cluster], number: int) -> list[Cluster]:
    """The `number` largest clusters that have images, in the order they came."""
    shown = sorted((c for c in clusters if c.images is not None), key=lambda c: -c.size)[:number]
    chosen = {cluster.id for cluster in shown}
    return [cluster for cluster in clusters if cluster.id in chosen]


def _write_sheets(clusters: list[Cluster], folder: Path) -> dict[int, str]:
    """Writes a contact sheet for each of the largest clusters; file names by cluster id."""
    shown = _largest(clusters, SHEETS)
    names = {}
    for cluster in progress(shown, len(shown), "contact sheets", "clusters"):
        assert cluster.images is not None
        names[cluster.id] = f"cluster-{cluster.id:04d}.png"
        sheet = figures.contact_sheet(cluster.images, SHEET_COLUMNS)
        with replacing(folder / names[cluster.id]) as temporary:
            Image.fromarray(sheet).save(temporary)
    return names


def _remove_stale(folder: Path, current: set[str]) -> None:
    """Removes contact sheets of an earlier report that no page links to any more."""
    for path in folder.glob("cluster-*.png"):
        if path.name not in current:
            path.unlink()


Draw = Callable[[figures.Theme], Figure]


def _pictures(run: Run, clusters: list[Cluster]) -> Iterator[tuple[Picture, Draw | None]]:
    """The figures of the page; None in place of the drawing when there is nothing to draw."""
    panels = curves.panels(run.metrics, _k(run))
    words = "The dashed line is the loss of pure guessing." if any(panel.reference for panel in panels) else ""
    if curves.REFERENCE in run.metrics.last():
        words = "Random embeddings of d numbers have the loss K (1 - d / n), of n images in K classes."
    yield (
        Picture("curves", "Training", words,
                "metrics.jsonl has no rounds yet: curves appear when the first round is logged."),
        (lambda theme: figures.curves(panels, run.metrics.stages, theme)) if panels else None,
    )  # fmt: skip
    counts = np.array([cluster.size for cluster in clusters])
    ids = np.array([cluster.id for cluster in clusters])
    yield (
        Picture("sizes", "Cluster sizes", "", "No assignment has been saved yet."),
        (lambda theme: figures.sizes(counts, ids, theme)) if clusters else None,
    )
    shown = _largest(clusters, OVERVIEW_ROWS)
    rows = [_row(cluster) for cluster in shown]
    title = f"{_count(int(counts.sum()), 'image')} in {_count(len(clusters), 'cluster')}"
    more = f"The {len(shown)} largest of {len(clusters):,}. " if len(shown) < len(clusters) else ""
    yield (
        Picture("clusters", "What the clusters look like",
                f"{more}The bar under each name shows the size of the cluster.",
                "There is no samples.npz with images of the clusters: it is written when "
                "training ends."),
        (lambda theme: figures.overview(rows, title, theme=theme)) if rows else None,
    )  # fmt: skip
    for number, (split, confusion) in enumerate(run.confusions.items()):
        yield (
            Picture("confusion" if number == 0 else f"confusion-{split}",
                    f"Clusters against classes, {split}",
                    "Clusters are in the order of the class that they stand for; those left over "
                    "come last. Colour is the share of the cluster, numbers are images.", ""),
            lambda theme, confusion=confusion: _confusion(confusion, theme),  # type: ignore[misc]
        )  # fmt: skip


def _row(cluster: Cluster) -> figures.Row:
    assert cluster.images is not None
    detail = f"{_count(cluster.size, 'image')} · {cluster.share:.1%}"
    name = figures.printable(cluster.name, 11)
    return figures.Row(cluster.images, f"cluster {cluster.id}", name, detail, cluster.share)


def _confusion(confusion: Confusion, theme: figures.Theme) -> Figure:
    rows, columns = clustering.pair(confusion.table)
    matched = rows[np.argsort(columns)].tolist()
    rest = [row for row in range(len(confusion.clusters)) if row not in set(matched)]
    rest = [row for row in rest if confusion.table[row].any()]
    order = matched + rest
    names = [confusion.clusters[row] for row in order]
    return figures.confusion(confusion.table[order], names, confusion.classes, theme)


def _draw(picture: Picture, draw: Draw | None, folder: Path) -> Picture:
    """Saves the figure for light and for dark pages."""
    if draw is None:
        for suffix in ("", "-dark"):
            (folder / f"{picture.name}{suffix}.png").unlink(missing_ok=True)
        return picture
    for suffix, theme in (("", figures.LIGHT), ("-dark", figures.DARK)):
        with replacing(folder / f"{picture.name}{suffix}.png") as temporary:
            figures.save(draw(theme), temporary)
    with Image.open(folder / f"{picture.name}.png") as image:
        return picture._replace(size=image.size)


def _k(run: Run) -> int | None:
    """The clusters asked for, 0 where that is not known; None: the clustering finds their number."""
    settings = _last(run).get("cluster") or {}
    return None if settings.get("method") == "pic" else int(settings.get("k", 0))


def _last(run: Run) -> dict[str, Any]:
    """The settings of the last stage, whose clusters are those of the run."""
    return ([run.config or {}, *run.stages.values()])[-1]


def _made_by(config: Mapping[str, Any]) -> str:
    """What makes the clusters of a stage: its method, or where DeepCluster learns nothing, the clustering alone."""
    method = str(config.get("method", ""))
    trains = config.get("rounds") or config.get("steps")
    return method if trains or method != "deepcluster" else str((config.get("cluster") or {}).get("method", method))


def _title(run: Run) -> str:
    source = str(((run.config or {}).get("data") or {}).get("source", ""))
    return source.removeprefix("folder:") or run.workdir.resolve().name


def _subtitle(run: Run) -> str:
    if run.config is None:
        return "config.json is missing or unreadable, so the settings of this run are unknown."
    config = _last(run)
    method = " → ".join(run.stages) if len(run.stages) > 1 else config.get("method", "")
    k = "" if _k(run) is None else f"k = {_k(run)}"
    k = (k or "as many clusters as PIC finds") if run.clusters is not None or not run.finished else ""
    words = [method, (config.get("model") or {}).get("name", ""), k, f"seed {config.get('seed', 0)}"]
    return " · ".join(str(word) for word in words if word)


def _status(run: Run) -> str:
    if run.finished:
        return "finished"
    done = f" after round {len(run.metrics.rows)}" if run.metrics.rows else ""
    return f"not finished{done}: results.json is not there or not complete, figures are of the newest round"


def _facts(run: Run, clusters: list[Cluster]) -> list[tuple[str, str]]:
    """Values and labels of the headline."""
    facts = []
    results = run.results or {}
    images = results.get("images", sum(cluster.size for cluster in clusters))
    if images:
        facts.append((f"{images:,.0f}", "images"))
    if clusters:
        of = f"clusters found of {_k(run):,}" if _k(run) else "clusters found"
        facts.append((f"{len(clusters):,}", of))
    measured = results or run.metrics.last()
    for name in ("r@1", "acc", "nmi", "ari"):
        for split in ("train", "test"):
            if (value := measured.get(f"{split}/{name}")) is not None:
                text = f"{value:.1%}" if name in ("r@1", "acc") else f"{value:.3f}"
                facts.append((text, name.upper() if split == "train" else f"{name.upper()}, test"))
                break
    if "seconds" in results:
        facts.append((_duration(results["seconds"]), "time"))
    return facts


def _warnings(run: Run) -> list[str]:
    if run.clusters is None:
        return []
    ids, counts = run.clusters
    found = clustering.sizes(np.repeat(ids, counts), _k(run))
    record, before = run.metrics.newest_loss()
    loss = clustering.judged_loss(record, record.get("round", 0))
    return clustering.warnings(found, int(counts.sum()), _k(run), loss, clustering.outputs(record, before, None))


def _settings(run: Run) -> list[tuple[str, str, str, str]]:
    """Settings that differ from their defaults: name, value, default, meaning."""
    defaults = dict(settings.flatten(settings.base()))
    rows = []
    for name, value in settings.flatten(run.config or {}):
        default = defaults.get(name)
        if value == (list(default) if isinstance(default, tuple) else default):
            continue
        field = settings.field_of(name)
        rows.append((name, _plain(value), _plain(default), field.doc if field else ""))
    return rows


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "" if value is None else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
