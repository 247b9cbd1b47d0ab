"""The command line as people use it: jobs, files, exit codes, and one message for what is wrong."""

import csv
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from small import digit_files, few_digits, few_vectors, run, small_config, smoke

from jaxclust import main
from jaxclust.config import from_file
from jaxclust.data.split import from_array
from jaxclust.errors import ConfigError, DataError
from jaxclust.files import locked
from jaxclust.jobs import train
from jaxclust.train import workdir as train_workdir


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Digits as PNG files in class folders, with some that are not what they seem."""
    folder = digit_files(tmp_path_factory.mktemp("data") / "photos", 120)
    path = next(folder.glob("*/119, scan.PNG"))
    os.rename(bytes(path), bytes(path.parent) + b"/119 \xff\xfe no UTF-8.png")
    (folder / "digit 0" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (folder / "digit 0" / "words.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "photos"
    assert smoke(workdir, f"--config.data.source=folder:{photos}", "--config.batch_size=64", drawn=True) == 0
    return workdir


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_one_command_leaves_everything(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.json", "environment.json", "data.json", "images.csv", "skipped.csv", "metrics.jsonl", "metrics.csv",
        "checkpoints", "assignments", "assignments.csv", "results.json", "samples.npz", "confusion-train.csv",
        "report", "tensorboard",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(".")], "temporary names are left"
    results = json.loads((trained / "results.json").read_text())
    assert results["images"] == 120 and results["skipped"] == 2 and results["clusters"] <= 10
    assert 0 < results["train/acc"] <= 1 and {"train/nmi", "train/ari", "train/ami", "train/purity"} <= results.keys()
    assignments = rows(trained / "assignments.csv")
    assert list(assignments[0]) == ["id", "path", "cluster", "distance"]
    assert [int(row["id"]) for row in assignments] == list(range(120))
    assert assignments[0]["path"].startswith("digit 0/")
    skipped = rows(trained / "skipped.csv")
    assert {row["path"] for row in skipped} == {"digit 0/torn.jpg", "digit 0/words.png"}
    last = max((trained / "assignments" / "deepcluster").glob("*.npz"), key=lambda path: int(path.stem))
    assert np.load(last)["cluster"].tolist() == [int(row["cluster"]) for row in assignments]
    confusion = [line.split(",") for line in (trained / "confusion-train.csv").read_text().splitlines()]
    assert confusion[0] == ["cluster", *[f"digit {i}" for i in range(10)]]
    assert sum(int(n) for row in confusion[1:] for n in row[1:]) == 120
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in metrics] == [0, 1, 2]
    assert metrics[1].keys() >= {"train/loss", "clusters/found", "clusters/nmi_prev", "features/std", "lr/body"}
    samples = np.load(trained / "samples.npz", allow_pickle=False)
    assert samples["images"].shape[1:] == (8, 8, 1) and len(samples["images"]) == len(samples["cluster"])
    drawn = {path.name for path in (trained / "report").glob("*.png")}
    assert drawn >= {f"{name}{theme}.png" for name in ("curves", "clusters", "confusion") for theme in ("", "-dark")}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_19_predict_gives_the_training_images_their_last_clusters(trained, photos, tmp_path, capsys, suffix):
    out = tmp_path / f"out.{suffix}"
    assert run("--job=predict", f"--workdir={trained}", f"--images={photos}", f"--out={out}") == 0
    printed = capsys.readouterr().out
    assert "skipped digit 0/torn.jpg" in printed and "against the class folders: ACC" in printed
    if suffix == "parquet":
        from pyarrow import parquet

        table = parquet.read_table(out).to_pylist()
    else:
        table = rows(out)
    expected = [(row["path"], int(row["cluster"])) for row in rows(trained / "assignments.csv")]
    if suffix == "parquet":  # which holds text alone
        expected = [(os.fsencode(path).decode("utf-8", "replace"), cluster) for path, cluster in expected]
    assert [(row["path"], int(row["cluster"])) for row in table] == expected
    assert all(0 <= float(row["score"]) <= 1 for row in table)


def test_predict_needs_the_workdir_alone(trained, tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    Image.new("RGB", (40, 30), "white").save(folder / "a.jpg")
    assert run("--job=predict", f"--workdir={trained}", f"--images={folder}", f"--out={tmp_path / 'o.csv'}") == 0
    assert [row["path"] for row in rows(tmp_path / "o.csv")] == ["a.jpg"]


@pytest.mark.parametrize("with_config", [False, True])
def test_evaluate_gives_the_results_of_the_training(trained, photos, capsys, with_config):
    before = (trained / "results.json").read_bytes()
    arguments = ["--job=evaluate", f"--workdir={trained}"]
    if with_config:
        flags = ["--config=configs/deepcluster.py:smoke", "--config.model.blocks=2"]
        flags += [f"--config.data.source=folder:{photos}"]
        arguments += [*flags, "--config.batch_size=64"]
    assert run(*arguments) == 0
    assert (trained / "results.json").read_bytes() == before
    after = json.loads(before)
    assert f"ACC {after['train/acc']:.3f}" in capsys.readouterr().out


def test_report_needs_no_config(trained):
    (trained / "report" / "index.html").unlink()
    assert run("--job=report", f"--workdir={trained}", "--config.report.pictures=") == 0
    assert (trained / "report" / "index.html").exists()


def test_another_config_in_the_same_workdir_is_refused_and_shown(trained, photos, capsys):
    saved = (trained / "config.json").read_bytes()
    arguments = [f"--config.data.source=folder:{photos}", "--config.batch_size=64", "--config.cluster.k=7"]
    assert smoke(trained, *arguments) == 2
    assert "config.cluster.k: 10 there, 7 now" in capsys.readouterr().err
    assert (trained / "config.json").read_bytes() == saved


def test_images_that_changed_since_the_run_began_are_refused(trained, photos, capsys):
    extra = photos / "digit 9" / "new.png"
    Image.new("L", (8, 8)).save(extra)
    try:
        assert smoke(trained, f"--config.data.source=folder:{photos}", "--config.batch_size=64") == 3
        assert "no longer those that the run" in capsys.readouterr().err
    finally:
        extra.unlink()


def test_other_images_of_the_same_names_are_refused_and_copies_are_not(trained, photos, tmp_path, capsys):
    copies = shutil.copytree(photos, tmp_path / "copies")
    for path in copies.glob("*/*.PNG"):  # as another decoder might see them
        with Image.open(path) as image:
            pixels = np.asarray(image)
        Image.fromarray(np.where(pixels > 0, pixels - 1, 1).astype(np.uint8)).save(path)
    assert smoke(trained, f"--config.data.source=folder:{copies}", "--config.batch_size=64") == 0
    for path in [*copies.glob("*/*.PNG")][::2]:
        with Image.open(path) as image:
            image.rotate(90).save(path)
    before = {path: path.read_bytes() for path in trained.rglob("*.csv")}
    capsys.readouterr()
    assert smoke(trained, f"--config.data.source=folder:{copies}", "--config.batch_size=64") == 3
    assert re.search(r"\d+ of 32 images of 'train' .*scan.PNG, have the names of those", capsys.readouterr().err)
    assert {path: path.read_bytes() for path in before} == before
    assert smoke(trained, f"--config.data.source=folder:{photos}", "--config.batch_size=64") == 0


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_vectors_that_changed_are_refused_though_few_of_their_numbers_did(tmp_path, scale):
    config, source = small_config(data__source="features"), few_vectors()

    def of(rows):
        split = from_array(np.float32(scale) * rows, source.splits["train"].image_shape, source.splits["train"].name_of)
        return source._replace(splits={"train": split})

    rows = source.splits["train"].images.copy()
    train_workdir.write(config, tmp_path, of(rows), 1)
    train_workdir.check(config, tmp_path, of(rows))
    rows[:, 0] += 0.01
    with pytest.raises(DataError, match=r"\d+ of 32 images of 'train' that were looked at"):
        train_workdir.check(config, tmp_path, of(rows))


def test_a_second_training_in_a_workdir_is_refused_while_the_first_one_runs(trained, photos, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    arguments = [f"--config.data.source=folder:{photos}", "--config.batch_size=64"]
    with locked(trained / "lock", fcntl.LOCK_EX):
        assert smoke(trained, *arguments) == 2
        assert f"--workdir={trained} is in use: another process trains in it" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_file_system_without_locks_is_warned_of_and_a_lock_is_free_again(tmp_path, monkeypatch, caplog):
    for _ in range(2):
        with train.alone(small_config(), tmp_path):
            pass
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(38, "Function not implemented")))
    with train.alone(small_config(), tmp_path):
        pass
    assert "cannot lock" in caplog.text and "Do not start a second training" in caplog.text


def test_what_is_set_for_a_stage_alone_may_change_until_it_begins(tmp_path):
    config, source = from_file(Path("configs/spice.py"), "smoke"), few_digits(20)
    train_workdir.write(config, tmp_path, source, 1)
    (tmp_path / "checkpoints" / "self" / "0").mkdir(parents=True)
    config.stage.reliable.update({"reliable": {"score": 0.5}})
    train_workdir.check(config, tmp_path, source)
    for name, setting in (("reliable", "reliable.score"), ("self", "batch_size")):
        (tmp_path / "checkpoints" / name / "0").mkdir(parents=True, exist_ok=True)
        config.stage.self.batch_size += name == "self"
        with pytest.raises(ConfigError, match=f"other settings:\n  config.stage.{name}.{setting}"):
            train_workdir.check(config, tmp_path, source)
        train_workdir.write(config, tmp_path, source, 1)


@pytest.mark.wide
def test_seconds_are_those_of_all_starts_and_fewer_rounds_than_there_are_change_nothing(tmp_path, capsys):
    arguments = ["--config.batch_size=512", "--config.model.blocks=1", "--config.evaluate.suite=clustering"]
    assert smoke(tmp_path, *arguments, "--config.rounds=1") == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(record | {"seconds": 5000.0}) + "\n" for record in records)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert smoke(tmp_path, *arguments, "--config.rounds=2") == 0
    results, config = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("results", "config"))
    assert 5000 < results["seconds"] < 6000 and config["rounds"] == 2
    assert f"{results['seconds']:,.0f} s\n" in capsys.readouterr().out
    assert smoke(tmp_path, *arguments, "--config.rounds=1") == 0
    assert "deepcluster: has 2 rounds already, 1 were asked for" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert run("--job=evaluate", f"--workdir={tmp_path}") == 0
    assert not re.search(r"\d s$", capsys.readouterr().out, re.MULTILINE)


def test_a_folder_of_other_files_is_no_workdir(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert smoke(tmp_path) == 2
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


BAD = {
    "unknown key": (["--config.cluster.kk=3"], 2, r"config.cluster.kk is unknown; did you mean 'cluster.k'\?"),
    "unknown section": (["--config.optimiser.body.lr=3"], 2, r"did you mean 'optimizer.body.lr'\?"),
    "wrong type": (["--config.rounds=many"], 2, r"^jaxclust: config.rounds='many' must be of type int \(.*\): [^-]*$"),
    "no likely job": (["--job=xyzzy"], 2, "is unknown. There is: "),
    "too few clusters": (["--config.cluster.k=1"], 2, r"config.cluster.k=1 must be at least 2"),
    "fewer images than clusters": (["--config.cluster.k=1798"], 2, r"k=1798 clusters need .* there are 1797"),
    "unknown model": (["--config.model.name=convnets"], 2, r"model.name='convnets'.*did you mean 'convnet'"),
    "unknown method": (["--config.method=deepclusters"], 2, "did you mean 'deepcluster'"),
    "unknown source": (["--config.data.source=digit"], 2, "did you mean 'digits'"),
    "source without its kind": (["--config.data.source={empty}"], 2, "did you mean 'folder:.*empty'"),
    "unknown evaluation": (["--config.evaluate.suite=clustring"], 2, "clustering"),
    "missing folder": (["--config.data.source=folder:nowhere"], 3, "nowhere"),
    "empty folder": (["--config.data.source=folder:{empty}"], 3, "no image"),
    "too many unreadable": (
        ["--config.data.source=folder:{photos}", "--config.data.max_skipped=1"],
        3,
        "max_skipped=1",
    ),
    "images too large": (["--config.data.source=folder:{photos}", "--config.data.max_pixels=10"], 3, "max_pixels"),
    "unknown flag": (["--wokdir=x"], 2, "wokdir"),
    "stray word": (["train"], 2, "'train' is no flag"),
    "unknown job": (["--job=trian"], 2, "did you mean 'train'"),
    "init_from nothing": (["--config.init_from={empty}"], 2, "holds no run"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words_and_nothing_is_written(name, tmp_path, photos, capsys):
    arguments, code, words = BAD[name]
    (tmp_path / "empty").mkdir()
    arguments = [a.format(empty=tmp_path / "empty", photos=photos) for a in arguments]
    assert smoke(tmp_path / "run", *arguments) == code
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert "Traceback" not in error and error.count("jaxclust: ") == 1
    assert not (tmp_path / "run").exists()


def test_jobs_on_runs_that_are_not_there(tmp_path, capsys):
    for job in ("evaluate", "predict", "report"):
        assert run(f"--job={job}", f"--workdir={tmp_path / 'none'}", "--images=.", "--out=o.csv") == 2
        assert "holds no run" in capsys.readouterr().err
    assert run("--workdir=x") == 2
    assert "--config is missing" in capsys.readouterr().err


def test_predict_knows_wrong_paths_before_its_work_and_names_the_flag(tmp_path, capsys):
    for name in ("empty", "d.csv"):
        (tmp_path / name).mkdir()
    (tmp_path / "f.jpg").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "data.json").write_text('{"size": 9, "image_shape": [8, 8, 1], "num_classes": null}')
    wrong = [
        ("nosuch", "O.CSV", 3, "--images={}/nosuch: there is no such folder"),
        ("f.jpg", "o.csv", 3, "--images={}/f.jpg: it is a file; name the folder"),
        ("empty", "o.csv", 3, "--images={0}/empty: '{0}/empty' holds no images; looked for are"),
        ("empty", "d.csv", 2, "--out='{}/d.csv' must name a .csv or .parquet file and no folder"),
        ("empty", "f.jpg/o.csv", 2, "--out={0}/f.jpg/o.csv: {0}/f.jpg is a file and no folder"),
    ]
    for images, out, code, words in wrong:
        paths = f"--images={tmp_path / images}", f"--out={tmp_path / out}"
        assert run("--job=predict", f"--workdir={tmp_path}", *paths) == code
        said = capsys.readouterr().err
        assert words.format(tmp_path) in said and "config.data.source" not in said, said


def test_a_workdir_that_cannot_be_made_is_refused_without_a_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("precious")
    for name, words in (("file", "is a file and no folder"), ("file/sub", f"{tmp_path}/file is a file and no folder")):
        assert smoke(tmp_path / name) == 2
        assert words in capsys.readouterr().err

    def fails(*_):
        raise OSError(28, "No space left on device", "x/y")

    monkeypatch.setattr(main, "run", fails)
    assert smoke(tmp_path / "run") == 1
    assert capsys.readouterr().err == "jaxclust: x/y: No space left on device\n"


def test_a_sweep_is_no_run_and_says_where_its_runs_are(tmp_path, capsys):
    (tmp_path / "base.json").write_text("{}")
    for job in ("evaluate", "predict", "export"):
        assert run(f"--job={job}", f"--workdir={tmp_path}") == 2
        assert f"is a sweep; choose one of its runs, such as --workdir={tmp_path}/net1" in capsys.readouterr().err


@pytest.mark.wide
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    arguments = ["--config.batch_size=128", "--config.optimizer.body.name=sgd", "--config.optimizer.body.lr=1e-3"]
    assert smoke(tmp_path / "run", *arguments, "--config.rounds=1") == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["optimizer"]["body"]["lr"] = 1e30  # as if the run had begun with it
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "deepcluster").iterdir())
    arguments[-1] = "--config.optimizer.body.lr=1e30"
    capsys.readouterr()
    assert smoke(tmp_path / "run", *arguments, "--config.rounds=3") == 4
    error = capsys.readouterr().err
    step, ids = re.search(r"loss of step (\d+) is not finite. Ids of its batch: \[([\d, ]+)\]", error).groups()
    assert 20 <= int(step) < 40 and len(ids.split(",")) == 128
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints" / "deepcluster").iterdir()) == before


@pytest.mark.wide
def test_a_body_can_come_from_another_run(trained, photos, tmp_path, capsys):
    arguments = [f"--config.data.source=folder:{photos}", "--config.batch_size=64", "--config.rounds=1"]
    arguments += [f"--config.init_from={trained}"]
    assert smoke(tmp_path / "run", *arguments) == 0
    first, scratch = (
        json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0]) for workdir in (tmp_path / "run", trained)
    )
    assert first["clusters/objective"] != scratch["clusters/objective"]
    assert smoke(tmp_path / "other", *arguments, "--config.model.width=4") == 2
    assert re.search(r"init_from: .* another network: convnet .*width=8 there, .*width=4 here", capsys.readouterr().err)


@pytest.mark.medium
def test_labels_change_nothing_but_the_evaluation(tmp_path, capsys):
    split = few_digits(200).splits["train"]
    wrong = np.random.default_rng(0).permutation(split.labels)
    found = []
    for name, arrays in {"none": {}, "true": {"labels": split.labels}, "wrong": {"labels": wrong}}.items():
        np.savez(tmp_path / f"{name}.npz", images=split.images, **arrays)
        workdir = tmp_path / name
        arguments = [f"--config.data.source=npz:{tmp_path / name}.npz", "--config.batch_size=64", "--config.rounds=1"]
        assert smoke(workdir, *arguments, "--config.refresh_every=5 steps", "--config.model.blocks=1") == 0
        results = json.loads((workdir / "results.json").read_text())
        assert ("train/acc" in results) == bool(arrays)
        found.append([row["cluster"] for row in rows(workdir / "assignments.csv")])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("flag", "source", "name"),
    [
        ("configs/deepcluster.py", "digits", "deepcluster-digits"),
        ("configs/deepcluster.py:smoke", "digits", "deepcluster-smoke-digits"),
        ("configs/deepcluster.py:mnist,smoke", "idx:/data/mnist", "deepcluster-mnist-smoke-idx"),
        ("configs/deepcluster.py:folder", "folder:../my photos/", "deepcluster-folder-my-photos"),
    ],
)
def test_the_default_workdir_names_config_variant_and_source(flag, source, name):
    path, _, variant = flag.partition(":")
    config = from_file(main.Path(path), variant)
    config.data.source = source
    assert main.default_name(flag, config) == name


def test_overrides_are_read_at_once_and_only_a_wrong_one_is_looked_for():
    """A reading takes as long however many there are, and it comes before everything else."""
    arguments = ["jaxclust", "--config=configs/deepcluster.py", *(f"--config.cluster.k={k}" for k in range(3, 9))]
    with mock.patch.object(main, "_set", wraps=main._set) as readings:
        assert main.parse(arguments).config.cluster.k == 8 and readings.call_count == 1
        with pytest.raises(ConfigError, match="^config.seed='x' must be of type int"):
            main.parse([*arguments, "--config.seed=x", "--config.rounds=2"])


def test_overrides_may_be_written_with_a_space(tmp_path):
    arguments = ["--config", "configs/deepcluster.py", "--config.rounds", "7", "--config.data.mean=(0.1,)"]
    command = main.parse(["jaxclust", *arguments])
    assert command.config.rounds == 7 and command.config.data.mean == (0.1,)
    with pytest.raises(ConfigError):
        main.parse(["x", "--config=nothing.py"])


@pytest.mark.medium
def test_a_setting_that_stages_have_for_themselves_is_said_before_anything_is_wrong_with_another(tmp_path, capsys):
    arguments = [
        "--config=configs/spice.py:smoke",
        "--config.rounds=3",
        "--config.spice.lr=0.1",
        "--config.moco.queue=7",
    ]
    assert run(*arguments, f"--workdir={tmp_path / 'run'}") == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("note: ")]
    assert line.startswith("note: config.rounds=3 is not for all stages: config.stage.moco.rounds=2, ")
    assert "config.moco.queue=7" in err


def test_help_and_errors_come_at_once():
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "jaxclust.main",
        "--config=configs/deepcluster.py",
        "--config.k=3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "did you mean" in done.stderr
    assert not re.search(r"\| +(jax|tensorflow|flax)$", done.stderr, re.MULTILINE), "a typo should not cost an import"
    done = subprocess.run([*command[:1], "-m", "jaxclust.main", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--job" in done.stdout


@pytest.mark.medium
def test_tensorflow_comes_without_keras_and_leaves_the_environment_as_it_was():
    code = """
import os, sys
from jaxclust.runtime import tensorflow
name = "TF_USE_LEGACY_KERAS"
squares = list(tensorflow().data.Dataset.range(3).map(lambda x: x * x).as_numpy_iterator())
print(squares == [0, 1, 4], "keras.src" in sys.modules, os.environ.get(name))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "False", "None"], done.stderr
