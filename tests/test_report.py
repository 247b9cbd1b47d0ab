"""Reports of made-up workdirs, read back as a browser would: parsed page, opened pictures."""

import csv
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from jaxclust import config as settings
from jaxclust.errors import ConfigError
from jaxclust.report import curves, figures, html, scores, workdir

HOSTILE = '<script>alert("1")</script>&amp; $\\frac{ 漢字 émile\u202e'


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for name, v in attrs if name in ("href", "src", "srcset")]

    def handle_data(self, data):
        self.text += " ".join(data.split()) + " "


def write_csv(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def make(folder, k=3, each=12, names=("cat", "dog", HOSTILE), finished=True, rounds=4, loss=2.0):
    """A workdir with k clusters of `each` images of 6 x 8 pixels."""
    rng = np.random.default_rng(0)
    config = settings.base()
    config.cluster.k = k
    settings.save(config, folder / "config.json")
    clusters = np.repeat(np.arange(k), each).astype(np.int32)
    n = len(clusters)
    with (folder / "metrics.jsonl").open("w") as file:
        for i in range(rounds):
            record = {
                "stage": "deepcluster",
                "round": i,
                "step": 5 * i,
                "time": 1.0,
                "train/loss": loss / (i + 1),
                "train/accuracy": 0.5,
                "clusters/found": k,
                "clusters/largest_share": 1 / k,
            }
            record |= {"clusters/nmi_prev": 0.5} if i else {"clusters/nmi_prev": float("nan")}
            file.write(json.dumps(record) + "\n")
        file.write('{"stage": "deepcl')  # a running job is writing
    rounds_folder = folder / "assignments" / "deepcluster"
    rounds_folder.mkdir(parents=True)
    np.savez(rounds_folder / "2.npz", cluster=np.zeros(n, np.int32))
    np.savez(rounds_folder / "10.npz", cluster=clusters)
    if not finished:
        return folder
    rows = [(i, f"{HOSTILE}/{i}.png", c, 0.5) for i, c in enumerate(clusters)]
    write_csv(folder / "assignments.csv", ["id", "path", "cluster", "distance"], rows)
    results = {"images": n, "clusters": k, "skipped": 1, "seconds": 102.3}
    np.savez(
        folder / "samples.npz",
        images=rng.integers(0, 255, (n, 6, 8, 1), np.uint8),
        id=np.arange(n, dtype=np.int32),
        cluster=clusters,
        distance=rng.random(n, np.float32),
    )
    write_csv(
        folder / "skipped.csv",
        ["split", "path", "reason"],
        [("train", f"bad {HOSTILE}.jpg", "truncated")],
    )
    if names:
        results |= {"train/acc": 0.9123, "train/nmi": 0.8, "train/ari": 0.7, "test/acc": 0.5}
        table = np.roll(np.eye(k, len(names), dtype=int) * each, 1, axis=1)
        write_csv(
            folder / "confusion-train.csv",
            ["cluster", *names],
            [(c, *row) for c, row in enumerate(table)],
        )
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def report(folder, dpi=48):
    """Writes the report, of small pictures, which are drawn sooner; checks every link and every picture on the way."""
    with mock.patch.object(figures, "DPI", dpi):
        path = html.write(folder)
    assert path == folder / "report" / "index.html"
    page = Page(path)
    for link in page.links:
        assert "://" not in link and not link.startswith("/")
        target = path.parent / unquote(link)
        assert target.is_file(), link
        if target.suffix == ".png":
            with Image.open(target) as image:
                image.load()
                assert 60 <= image.width <= 4000 and 60 <= image.height <= 4000
    assert not [p.name for p in path.parent.rglob(".*")], "temporary files are left"
    return page


def test_finished_run_with_labels_and_hostile_names(tmp_path):
    page = report(make(tmp_path), figures.DPI)
    for words in ("91.2%", "1 min 42 s", "finished", "cluster.k", "cat"):
        assert words in page.text
    assert "script" not in page.tags
    assert '<script>alert("1")</script>' in page.text  # shown as text
    assert "truncated" in page.text
    for name in ("curves", "sizes", "clusters", "confusion"):
        assert {f"{name}.png", f"{name}-dark.png"} <= set(page.links)
    assert {f"clusters/cluster-000{c}.png" for c in range(3)} <= set(page.links)
    assert "../assignments.csv" in page.links


def test_clusters_carry_the_class_that_they_stand_for(tmp_path):
    run = workdir.read(make(tmp_path, names=("a", "b", "c")))
    named = {cluster.id: (cluster.name, cluster.purity) for cluster in html._clusters(run)}
    assert named == {0: ("b", 1.0), 1: ("c", 1.0), 2: ("a", 1.0)}
    assert [cluster.name for cluster in html._clusters(run)] == ["a", "b", "c"]


def test_images_of_a_cluster_are_sorted_by_distance(tmp_path):
    run = workdir.read(make(tmp_path))
    cluster = next(c for c in html._clusters(run) if c.id == 1)
    expected = 12 + np.argsort(run.samples.distance[12:24])
    np.testing.assert_array_equal(cluster.images, run.samples.images[expected])
    assert cluster.files[0].endswith(f"/{expected[0]}.png")


def test_running_workdir_says_what_is_missing(tmp_path):
    page = report(make(tmp_path, finished=False))
    assert "not finished after round 4" in page.text
    assert "no samples.npz" in page.text and "no assignments.csv yet" in page.text
    assert "There are no scores" in page.text
    assert {"curves.png", "sizes.png"} <= set(page.links)
    assert "clusters.png" not in page.links and "confusion.png" not in page.links
    run = workdir.read(tmp_path)
    assert len(run.clusters[0]) == 3  # round 10, not round 2


def test_without_labels_there_is_no_agreement(tmp_path):
    page = report(make(tmp_path, names=()))
    assert "ACC" not in page.text and "There are no scores" in page.text
    assert "confusion.png" not in page.links and "clusters.png" in page.links


@pytest.mark.wide
def test_every_comparison_of_features_has_a_table(tmp_path):
    make(tmp_path)
    path = tmp_path / "results.json"
    found = {
        "linear/conv1/top1": 0.5, "linear/conv1/top1_best": 0.75, "linear/conv1/best_epoch": 12.0,
        "linear/feature/top1": 0.25, "knn/top1": 0.625, "retrieval/map@r": 0.375, "retrieval/queries": 1797,
        "lowlabel/10pct/top1_std": 0.0625, "kmeans/acc": 0.875,
    }  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | found | {"step": 40}))
    page = report(tmp_path)
    words = "linear top1 top1_best best_epoch conv1 0.5000 0.7500 12 feature 0.2500 – –"
    assert words in " ".join(page.text.split())
    for shown in ("0.6250", "map@r", "0.3750", "1,797", "10pct", "0.0625", "0.8750"):
        assert shown in page.text
    assert scores.agreement(found | {"train/acc": 0.5}) == {"train": {"acc": 0.5}}
    of_stages = {"embed/train/acc": 0.25, "self/test/nmi": 0.75}
    assert scores.agreement(of_stages) == {"embed/train": {"acc": 0.25}, "self/test": {"nmi": 0.75}}


def test_loss_that_stays_at_guessing_is_said(tmp_path):
    page = report(make(tmp_path, k=3, rounds=4, loss=4 * float(np.log(3))))
    assert "guessing alone gives ln 3" in page.text and "36 images for 3 clusters are fewer" in page.text
    early = report(make(tmp_path / "early", k=3, rounds=3, loss=3 * float(np.log(3))))
    assert "guessing alone" not in early.text


def test_of_pic_the_loss_is_that_of_the_clusters_before_and_nobody_asks_for_a_k(tmp_path):
    make(tmp_path, k=3)
    config = settings.base()
    config.cluster.method, config.cluster.k = "pic", 0
    settings.save(config, tmp_path / "config.json")
    shared = {"stage": "deepcluster", "train/loss": 1.6, "train/accuracy": 0.5}
    found = [{"round": i, "clusters/found": n, **shared} for i, n in enumerate((30, 30, 20, 3))]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, found)))
    page = report(tmp_path)
    assert "guessing alone" not in page.text  # ln 3 would be less
    assert "as many clusters as PIC finds" in page.text and "k = 0" not in page.text
    (loss, *_) = curves.panels(workdir.read(tmp_path).metrics, None)
    assert loss.reference == (pytest.approx(np.log(20)), "guessing")


def test_one_cluster_is_called_a_collapse(tmp_path):
    page = report(make(tmp_path, k=1, names=("only",)))
    assert "collapsed" in page.text and "1 image in" not in page.text


@pytest.mark.wide
def test_hundred_clusters_and_stale_sheets(tmp_path):
    stale = tmp_path / "report" / "clusters" / "cluster-0777.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier run")
    page = report(make(tmp_path, k=104, each=2, names=[f"class {i}" for i in range(50)]))
    sheets = {link for link in page.links if link.startswith("clusters/")}
    assert len(sheets) == html.SHEETS and not stale.exists()
    assert "The 100 largest of 104 clusters" in page.text
    assert "The 20 largest of 104" in page.text and "208 images for 104 clusters" in page.text


@pytest.mark.parametrize(
    "broken",
    [
        "config.json",
        "results.json",
        "samples.npz",
        "metrics.jsonl",
        "assignments/deepcluster/10.npz",
        *(
            pytest.param(f"{name}.csv", marks=pytest.mark.wide)
            for name in ("confusion-train", "assignments", "skipped")
        ),
    ],
)
def test_a_half_written_file_does_not_stop_the_report(tmp_path, broken):
    make(tmp_path, rounds=1)
    path = tmp_path / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "Training" in report(tmp_path).text


def test_empty_folder_gives_a_page_and_no_folder_an_error(tmp_path):
    page = report(tmp_path)
    assert "config.json is missing" in page.text and "No assignment" in page.text
    with pytest.raises(ConfigError, match="not a folder"):
        html.write(tmp_path / "nowhere")


def test_failing_report_leaves_the_earlier_page(tmp_path, monkeypatch):
    make(tmp_path)
    report(tmp_path)
    before = (tmp_path / "report" / "index.html").read_bytes()
    monkeypatch.setattr(figures, "curves", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        html.write(tmp_path)
    assert (tmp_path / "report" / "index.html").read_bytes() == before
    assert not [p.name for p in tmp_path.rglob(".*")]


@pytest.mark.wide
def test_several_stages_follow_one_another(tmp_path):
    lines = [
        {"stage": s, "round": r, "train/loss": v} for s, r, v in (("moco", 0, 3.0), ("moco", 1, 2.0), ("self", 0, 1.0))
    ]
    lines.append({"stage": "self", "round": 0, "train/acc": 0.5})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    metrics = workdir.read(tmp_path).metrics
    assert metrics.stages == [("moco", 0), ("self", 2)]
    np.testing.assert_array_equal(metrics.series("train/loss"), [[0, 1, 2], [3, 2, 1]])
    assert metrics.last() == {"round": 0, "train/loss": 1.0, "train/acc": 0.5}
    report(tmp_path)
    line = figures.Line("loss", *metrics.series("train/loss"))
    parts = [part.tolist() for part, _ in figures._by_stage(line, [*metrics.stages, ("semi", 3)])]
    assert parts == [[0, 1], [2]]  # no line goes on into the next stage


def in_stages(folder, finished=True):
    """The workdir of `make` as a run of three stages, of which the last leaves images out."""
    make(folder, finished=finished)
    path = folder / "config.json"
    own = {"embed": {"rounds": 0, "cluster": {"k": 7}}, "self": {"method": "spice"}, "last": {"cluster": {"k": 3}}}
    config = json.loads(path.read_text()) | {"stages": "embed, self,last", "stage": own}
    path.write_text(json.dumps(config))
    (folder / "assignments" / "last").mkdir()
    np.savez(folder / "assignments" / "last" / "1.npz", cluster=np.array([-1] * 30 + [0, 0, 0, 1, 1, 1], np.int32))
    write_csv(folder / "confusion-self-train.csv", ["cluster", "x", "y", "z"], [(0, 9, 1, 0), (1, 1, 9, 0)])
    return folder


def test_stages_stand_in_one_table_and_the_clusters_are_those_of_the_last(tmp_path):
    path = in_stages(tmp_path) / "results.json"
    earlier = {"embed/train/acc": 0.375, "self/train/acc": 0.625, "last/train/acc": 0.125, "self/train/head0_acc": 0.5}
    path.write_text(json.dumps(earlier | json.loads(path.read_text())))
    text = " ".join(report(tmp_path).text.split())
    assert "embed → self → last · convnet · k = 3" in text
    assert "stage clusters by split ACC" in text
    for row in ("embed kmeans train 0.3750", "self spice train 0.6250", "last deepcluster train 0.9123"):
        assert row in text
    assert "0.1250" not in text and "Clusters against classes, self-train" in text
    assert workdir.read(tmp_path).clusters[1].tolist() == [12, 12, 12]  # of assignments.csv


def test_clusters_of_a_stage_that_runs_have_no_names_of_an_earlier_one(tmp_path):
    run = workdir.read(in_stages(tmp_path, finished=False))
    assert run.clusters[1].tolist() == [3, 3] and list(run.confusions) == ["self-train"]
    assert [cluster.name for cluster in html._clusters(run)] == ["", ""]


def test_the_curves_of_heads_mark_the_selected_one(tmp_path):
    lines = [{"stage": "moco", "round": 0, "train/loss": 9.0}]
    for i, (loss, other, head, lowest) in enumerate([(2.0, 2.5, 0, 2.0), (1.9, 1.8, 1, 1.8), (1.85, 1.9, 1, 1.8)]):
        heads = {"heads/loss0": loss, "heads/loss1": other, "heads/loss": (loss + other) / 2}
        acc = {"train/head0_acc": 0.25, "train/head1_acc": 0.5 + i / 8, "train/heads_acc": 0.4, "train/loss": loss}
        of = {"selected/head": head, "selected/loss": lowest}
        lines.append({"stage": "self", "round": i, **heads, **acc, **of, "train/loss/head0": loss})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = {panel.title: panel for panel in curves.panels(workdir.read(tmp_path).metrics, 10)}
    own = found["loss of each head's own labels, which selects one"]
    assert [line.label for line in own.lines] == ["mean", "selected: 1"] and own.dot == (2.0, 1.8)
    assert [line.y.tolist() for line in own.others] == [[2.0, 1.9, 1.85], [2.5, 1.8, 1.9]]
    assert found["ACC of each head"].dot == (2.0, 0.625)
    training = found["loss of each head in training"]  # of head 1 nothing was logged
    assert [line.label for line in training.lines] == ["mean"] and training.lines[0].x.tolist() == [1, 2, 3]
    assert "NMI of each head" not in found and found["loss"].lines[0].y.tolist() == [9.0, 2.0, 1.9, 1.85]
    report(tmp_path)


def test_contact_sheet_keeps_shape_and_order():
    images = np.zeros((5, 10, 20, 3), np.uint8)
    images[3] = 255
    sheet = figures.contact_sheet(images, columns=3, tile=46, gap=6)
    assert sheet.shape == (2 * 20 + 6, 3 * 46 - 6, 4)
    np.testing.assert_array_equal(sheet[26:, :40], 255)  # the fourth image
    assert not sheet[:20, :40, :3].any() and (sheet[:20, :40, 3] == 255).all()
    assert not sheet[20:26, :, 3].any() and not sheet[26:, 92:, 3].any()  # gaps are clear


def test_thousands_of_clusters_fit_on_a_page(tmp_path):
    table = np.ones((5000, 100), int)
    names = [str(i) for i in range(100)]
    for figure in (
        figures.confusion(table, range(5000), names),
        figures.sizes(np.arange(1, 5001), np.arange(5000)),
    ):
        assert max(figure.get_size_inches()) < 12


def test_report_starts_without_jax_and_tensorflow():
    code = "import sys, jaxclust.report.html; print([m for m in ('jax', 'tensorflow', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
