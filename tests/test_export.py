"""Exports are read by programs that know nothing of jaxclust, and never write where they should not."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import load_file
from small import NETWORKS, few_digits, run, small_config, smoke

from jaxclust import config as config_lib
from jaxclust import methods
from jaxclust.data import by_cluster
from jaxclust.data.source import open_source
from jaxclust.errors import ConfigError
from jaxclust.features import artefacts, rows, store
from jaxclust.features.extract import extract
from jaxclust.features.rows import Rows
from jaxclust.jobs import evaluate, export
from jaxclust.methods.base import DataInfo
from jaxclust.runtime import tensorflow
from jaxclust.train import workdir as workdir_lib

SHORT = (
    "--config.rounds=1", "--config.refresh_every=2 steps", "--config.batch_size=64", "--config.eval_batch_size=64",
    "--config.model.blocks=1",
)  # fmt: skip
SIZES = {"train": 100, "test": 30}
HOSTILE = [
    b"-rf.png", b"a\nb.png", b"CON.png", b"x" * 250 + b".png", b"Upper.png", b"uPPER.png", b"\xff\xfe no UTF-8.png",
    b"\x1b[31m.png", "é".encode() * 120 + b".png", b"a\\..\\..\\up.png", b"a:b*c?.png", b"a....png", b" .png",
    "\u202egnp.exe.png".encode(), b"$(touch x);'\"`.png", b"%00%2e%2e%2f.png",
]  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on digits in arrays, with labels and a test split, and its export."""
    folder = tmp_path_factory.mktemp("digits")
    split = few_digits(sum(SIZES.values())).splits["train"]
    parts = {"": slice(SIZES["train"]), "test_": slice(SIZES["train"], None)}
    arrays = {f"{name}images": split.images[part] for name, part in parts.items()}
    np.savez(folder / "digits.npz", **arrays, **{f"{n}labels": split.labels[part] for n, part in parts.items()})
    assert smoke(folder / "run", f"--config.data.source=npz:{folder / 'digits.npz'}", *SHORT) == 0
    assert job(folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A run on files with hostile names."""
    folder = tmp_path_factory.mktemp("photos")
    split = few_digits(60).splits["train"]
    for part, ids in {"train": range(40), "test": range(40, 60)}.items():
        for i in ids:
            home = folder / "data" / part / f"class {split.labels[i]}"
            home.mkdir(parents=True, exist_ok=True)
            name = HOSTILE[i] if i < len(HOSTILE) else f"{i}.png".encode()
            with open(os.fsencode(home) + b"/" + name, "wb") as file:
                Image.fromarray(split.images[i, ..., 0]).save(file, "PNG")
    assert smoke(folder / "run", f"--config.data.source=folder:{folder / 'data'}", *SHORT) == 0
    return folder / "run"


def job(workdir, *arguments):
    return run("--job=export", f"--workdir={workdir}", *arguments)


def contents(folder):
    """Every file below a folder with its bytes, links with what they say."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def hidden(workdir):
    return [path.name for path in workdir.iterdir() if path.name.startswith(".")]


def restored(workdir):
    config = workdir_lib.resolved(config_lib.load(workdir / "config.json"), workdir_lib.data_info(workdir).image_shape)
    config.runtime.devices = 1
    source = open_source(config)
    return *evaluate.restore(config, workdir, source.splits["train"]), source


def features(workdir, name):
    stage, state, source = restored(workdir)
    folder = workdir / "tmp"
    split = source.splits[name]
    return extract(stage.embed, state.params, state.extra, split, stage.config, stage.mesh, folder, "")[
        "features"
    ].array()


def assigned(workdir):
    with open(workdir / "assignments.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return [int(row["cluster"]) for row in csv.DictReader(file)]


def examples(path):
    """The dicts of a TFRecord file, read by TensorFlow's own parser."""
    tf = tensorflow()
    found = []
    for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        fields = tf.train.Example.FromString(record).features.feature
        found.append({name: list(getattr(value, value.WhichOneof("kind")).value) for name, value in fields.items()})
    return found


@pytest.mark.parametrize("name", SIZES)
def test_every_format_has_the_features_clusters_names_and_labels_by_id(digits, name):
    folder, size = digits / "export", SIZES[name]
    expected = features(digits, name)
    stored = np.load(folder / f"{name}.npy", allow_pickle=False)
    assert stored.dtype == np.float32 and stored.flags.c_contiguous
    np.testing.assert_array_equal(stored, expected)
    table = parquet.read_table(folder / f"{name}.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "id": "int32", "path": "string", "cluster": "int32", "score": "float", "label": "string",
        "feature": "fixed_size_list<element: float>[32]",
    }  # fmt: skip
    columns = table.to_pydict()
    np.testing.assert_array_equal(np.array(columns["feature"], np.float32), expected)
    assert columns["id"] == list(range(size))
    assert columns["path"] == [f"digits/{name}/{i}" for i in range(size)]
    truth = np.load(digits.parent / "digits.npz")["labels" if name == "train" else "test_labels"]
    assert columns["label"] == [str(label) for label in truth]
    records = examples(folder / f"{name}.tfrecord")
    assert [record["id"] for record in records] == [[i] for i in range(size)]
    np.testing.assert_array_equal(np.array([record["feature"] for record in records], np.float32), expected)
    for column in ("cluster", "score"):
        assert [record[column] for record in records] == [[value] for value in columns[column]]
    for column in ("path", "label"):
        assert [record[column] for record in records] == [[value.encode()] for value in columns[column]]


def test_clusters_are_those_of_the_training(digits):
    assert parquet.read_table(digits / "export" / "train.parquet")["cluster"].to_pylist() == assigned(digits)


READER = """
import sys
import jax
import numpy as np

folder = sys.argv[1]
images = np.load(folder + "/images.npy")
programs = {}
for name in ("embed", "predict"):
    with open(f"{folder}/export/{name}.jaxexport", "rb") as file:
        programs[name] = jax.export.deserialize(bytearray(file.read()))
expected, clusters = np.load(folder + "/export/train.npy"), np.load(folder + "/clusters.npy")
for size in (1, 3, 7, len(images)):
    found = programs["embed"].call(images[:size])
    assert found.shape == (size, expected.shape[1]) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected[:size], rtol=0, atol=1e-5)
    predicted = programs["predict"].call(images[:size])
    np.testing.assert_array_equal(predicted["cluster"], clusters[:size])
    assert predicted["score"].shape == (size,)
ours = {"jaxclust", "flax", "optax", "tensorflow", "orbax", "ml_collections", "sklearn"} & set(sys.modules)
assert not ours, ours
"""


@pytest.mark.medium
def test_programs_give_the_same_in_a_process_that_imports_only_jax(digits, tmp_path):
    shutil.copytree(digits / "export", tmp_path / "export")
    np.save(tmp_path / "images.npy", np.load(digits.parent / "digits.npz")["images"])
    np.save(tmp_path / "clusters.npy", np.array(assigned(digits)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", READER, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_programs_run_on_any_device_and_tell_nothing_of_this_machine(digits):
    for name in ("embed", "predict"):
        content = (digits / "export" / f"{name}.jaxexport").read_bytes()
        assert jax.export.deserialize(bytearray(content)).platforms == ("cpu", "cuda", "tpu")
        assert os.fsencode(Path(export.__file__).parents[1]) not in content
    assert jax.config.values["jax_traceback_in_locations_limit"] != 0


def test_parameters_are_those_of_the_checkpoint(digits):
    manager = ocp.CheckpointManager(
        digits / "checkpoints" / "deepcluster", item_handlers=ocp.StandardCheckpointHandler()
    )
    saved = manager.restore(manager.latest_step())
    expected = {
        name.removeprefix("state.").removeprefix("extra."): np.asarray(value)
        for name, value in saved.items()
        if name.startswith(("state.params.", "state.extra."))
    }
    found = load_file(digits / "export" / "params.safetensors")
    assert found.keys() == expected.keys()
    assert {"params.body.block1_conv.kernel", "batch_stats.block1_norm.mean", "space.projection"} < found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


def test_arrays_keep_their_values_however_they_lie_in_memory():
    kernel = np.arange(12.0, dtype=np.float32).reshape(3, 4).T
    content = artefacts.arrays({"a": {"b": kernel}}, {"n": np.int32(3), "none": np.zeros((0, 2))}, {"method": "x"})
    from safetensors.numpy import load

    found = load(content)
    np.testing.assert_array_equal(found["params.a.b"], kernel)
    assert found["n"].shape == () and found["n"] == 3 and found["none"].shape == (0, 2)


def test_the_manifest_says_how_images_were_brought_to_size():
    assert "images whose short side was brought to 8/7" in export.pixels(stretch=False)
    squares = export.pixels(stretch=True)
    assert "images which were made squares whatever their aspect, whose side was brought" in squares


def test_the_manifest_describes_every_file(digits):
    folder = digits / "export"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, about in manifest["files"].items():
        content = (folder / name).read_bytes()
        assert about["bytes"] == len(content) and about["sha256"] == hashlib.sha256(content).hexdigest()
        assert about["load"]
    assert manifest["splits"] == SIZES and manifest["feature"] == {
        "dim": 32, "dtype": "float32", "computed_in": "float32",
    }  # fmt: skip
    assert manifest["input"]["shape"] == ["B", 8, 8, 1] and manifest["input"]["dtype"] == "uint8"
    assert manifest["class_names"] == [str(i) for i in range(10)]
    assert manifest["clusters"]["train"] == len(set(assigned(digits)))
    assert (manifest["method"], manifest["model"], manifest["stage"]) == ("deepcluster", "convnet", "deepcluster")
    assert manifest["step"] == max(int(path.name) for path in (digits / "checkpoints" / "deepcluster").iterdir())
    config = (digits / "config.json").read_bytes()
    assert manifest["config_sha256"] == hashlib.sha256(config).hexdigest()


def test_an_export_that_exists_is_replaced_only_with_overwrite_and_is_the_same_each_time(digits, capsys):
    before = contents(digits / "export")
    assert job(digits) == 2
    assert "export exists; give --overwrite" in capsys.readouterr().err
    assert contents(digits / "export") == before
    (digits / "export" / "train.npy").write_bytes(b"old")
    assert job(digits, "--overwrite") == 0
    assert capsys.readouterr().out.endswith(f"results: {digits / 'export'}\n")
    assert contents(digits / "export") == before and not hidden(digits)


@pytest.mark.wide
def test_rows_on_disk_give_the_same_files(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 32 * 4 * 7)
    before = contents(digits / "export")
    workdir = tmp_path / "run"
    shutil.copytree(digits, workdir, ignore=shutil.ignore_patterns("export"))
    assert job(workdir, "--config.features.memory_bytes=0") == 0
    after = contents(workdir / "export")
    pieces, whole = (parquet.ParquetFile(place / "export" / "train.parquet") for place in (workdir, digits))
    assert pieces.num_row_groups == -(-SIZES["train"] // 7) and pieces.read().equals(whole.read())
    varying = ("train.parquet", "test.parquet", "manifest.json")
    assert {n: c for n, c in after.items() if n not in varying} == {n: c for n, c in before.items() if n not in varying}


class Pulled(Exception):
    """The plug."""


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(Pulled(), marks=pytest.mark.wide),
        KeyboardInterrupt(),
        OSError(28, "No space left on device"),
    ],
    ids=repr,
)
def test_an_interrupted_export_leaves_the_earlier_one_and_nothing_else(digits, monkeypatch, capsys, error):
    before, write = contents(digits / "export"), store.write_tfrecord

    def interrupted(path, *arguments):
        write(path, *arguments)
        if path.name == "test.tfrecord":
            raise error

    monkeypatch.setattr(store, "write_tfrecord", interrupted)
    if isinstance(error, OSError):
        assert job(digits, "--overwrite") == 3
        assert "export cannot be written: [Errno 28] No space left" in capsys.readouterr().err
    else:
        with pytest.raises(type(error)):
            job(digits, "--overwrite")
    assert contents(digits / "export") == before and not hidden(digits)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.wide)])
def test_a_signal_ends_an_export_without_a_trace(digits, monkeypatch, capsys, number):
    before, handler = contents(digits / "export"), signal.getsignal(number)
    monkeypatch.setattr(store, "write_tfrecord", lambda *_: os.kill(os.getpid(), number))
    assert job(digits, "--overwrite") == 75
    assert f"stopped by {number.name}; nothing was written" in capsys.readouterr().err
    assert contents(digits / "export") == before and not hidden(digits)
    assert signal.getsignal(number) == handler


def test_what_a_killed_process_left_is_removed_by_one_of_the_same_number(tmp_path):
    for kind in ("new", "old"):
        (tmp_path / f".{os.getpid()}.{kind}.export").mkdir()
        (tmp_path / f".{os.getpid()}.{kind}.export" / "half").write_text("half")
    with export.replacing_folder(tmp_path / "export", False) as folder:
        (folder / "file").write_text("whole")
    assert contents(tmp_path) == {"export/file": b"whole"}


def test_a_failed_exchange_of_folders_brings_the_earlier_one_back(tmp_path, monkeypatch):
    target = tmp_path / "export"
    target.mkdir()
    (target / "file").write_text("earlier")
    rename, moves = Path.rename, []

    def failing(self, to):
        moves.append(self)
        if len(moves) == 2:
            raise OSError("cannot")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="cannot"), export.replacing_folder(target, True) as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (target / "file").read_text() == "earlier"


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "export"
    with pytest.raises(OSError), export.replacing_folder(target, False):
        target.mkdir()
        (target / "file").write_text("of another export")
    assert contents(tmp_path) == {"export/file": b"of another export"}


def test_a_folder_of_other_things_and_what_a_link_leads_to_are_left_alone(digits, tmp_path, capsys):
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(digits, workdir, ignore=shutil.ignore_patterns("export"))
    (workdir / "export").mkdir()
    (workdir / "export" / "thesis.txt").write_text("precious")
    assert job(workdir, "--overwrite") == 2
    assert "was not made by an export" in capsys.readouterr().err
    assert contents(workdir / "export") == {"thesis.txt": b"precious"}
    shutil.rmtree(workdir / "export")
    shutil.copytree(digits / "export", elsewhere)
    (workdir / "export").symlink_to(elsewhere)
    assert job(workdir) == 2
    assert job(workdir, "--overwrite") == 0
    assert not (workdir / "export").is_symlink() and not hidden(workdir)
    assert contents(elsewhere) == contents(digits / "export")


def pictures(workdir, source):
    """(split, cluster, id, path of the file in its source) of each exported picture, with checks of where it lies."""
    for name in SIZES:
        table = parquet.read_table(workdir / "export" / f"{name}.parquet").to_pydict()
        found = {}
        for path in (workdir / "export" / "clusters" / name).rglob("*"):
            if path.is_dir() and not path.is_symlink():
                continue
            found[int(path.name[:7])] = path
            assert path.name.isprintable() and len(os.fsencode(path.name)) <= 255
            assert path.parent.parent == workdir / "export" / "clusters" / name
        assert sorted(found) == table["id"]
        for id, path in found.items():
            assert path.parent.name == f"{table['cluster'][id]:04}"
            yield path, source.splits[name].path(id)


@pytest.mark.wide
def test_hostile_names_are_copied_into_the_folder_of_their_cluster(photos):
    outside = contents(photos.parent / "data")
    around = {path for path in photos.parent.rglob("*") if (photos / "export") not in (path, *path.parents)}
    assert job(photos, "--by-cluster=copy", "--overwrite") == 0
    source = restored(photos)[2]
    exported = list(pictures(photos, source))
    assert len(exported) == 60
    for path, name in exported:
        assert not path.is_symlink() and path.read_bytes() == (photos.parent / "data" / name).read_bytes()
        assert path.suffix == ".png"
    assert contents(photos.parent / "data") == outside
    assert {path for path in photos.parent.rglob("*") if (photos / "export") not in (path, *path.parents)} == around
    assert json.loads((photos / "export" / "manifest.json").read_text())["by_cluster"] == "copy"


@pytest.mark.wide
def test_links_lead_to_the_files_of_the_source(photos):
    assert job(photos, "--by-cluster=link", "--overwrite") == 0
    source = restored(photos)[2]
    for path, name in pictures(photos, source):
        assert path.is_symlink() and os.path.isabs(os.readlink(path))
        assert os.path.samefile(path, photos.parent / "data" / name)
    shutil.rmtree(photos / "export")
    assert len(list((photos.parent / "data").rglob("*.png"))) == 60, "removing links must not remove pictures"


def test_names_that_are_no_utf8_survive_in_tfrecord_and_are_readable_in_parquet(photos):
    assert job(photos, "--overwrite") == 0
    source = restored(photos)[2]
    paths = [os.fsencode(source.splits["train"].path(i)) for i in range(40)]
    assert any(b"\xff" in path for path in paths)
    assert [record["path"][0] for record in examples(photos / "export" / "train.tfrecord")] == paths
    stored = parquet.read_table(photos / "export" / "train.parquet")["path"].to_pylist()
    assert stored == [path.decode("utf-8", "replace") for path in paths]


letters = st.characters() | st.sampled_from('./\\:*?"<>|\0\n\r -~\udcff\ud800\u202e\u2028é漢😀')


@given(st.integers(0, 10**9), st.text(letters, max_size=400))
@example(0, "..")
@example(1, "../../etc/passwd")
@example(2, "a." + "x" * 300)
@example(3, "é" * 300 + ".jpeg")
def test_a_file_name_never_leaves_its_folder(id, name):
    made = by_cluster.file_name(id, name)
    assert made.startswith(f"{id:07}") and len(made.encode()) <= 255
    assert not set(made) & set('/\\:*?"<>|') and all(ord(letter) > 31 for letter in made)
    assert made[-1] not in ". " and os.path.basename(os.path.normpath(f"folder/{made}")) == made
    assert made[7:8] in ("", "-", ".") or id >= 10**7


@given(st.lists(st.text(letters, max_size=30), min_size=2, max_size=5))
def test_names_stay_different_even_where_case_and_form_do_not_count(names):
    made = {by_cluster.file_name(i, name).casefold() for i, name in enumerate(names)}
    assert len(made) == len(names)


def test_a_plain_name_stays_readable():
    assert by_cluster.file_name(12, "Ferien am Meer, 3.JPG") == "0000012-Ferien am Meer, 3.JPG"
    assert by_cluster.file_name(12, ".png") == "0000012.png"


@pytest.mark.parametrize("place", [by_cluster.copy, by_cluster.link])
def test_what_is_there_is_neither_followed_nor_overwritten(tmp_path, place):
    (tmp_path / "source").write_text("new")
    (tmp_path / "target").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        place(tmp_path / "source", tmp_path / "target")
    (tmp_path / "victim").write_text("old")
    with pytest.raises(FileExistsError):
        place(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "victim").read_text() == "old"


def test_a_file_that_went_away_is_named(photos, monkeypatch, capsys):
    monkeypatch.setattr(export, "picture_bytes", lambda root, split: 0)
    monkeypatch.setattr(by_cluster, "copy", lambda source, target: Path(f"{source} gone").read_bytes())
    assert job(photos, "--by-cluster=copy", "--overwrite") == 3
    assert "cannot be exported: No such file" in capsys.readouterr().err


def test_images_without_files_are_drawn(digits, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(digits, workdir, ignore=shutil.ignore_patterns("export"))
    assert job(workdir, "--by-cluster=copy") == 0
    images = np.load(digits.parent / "digits.npz")["test_images"][..., 0]
    clusters = parquet.read_table(workdir / "export" / "test.parquet")["cluster"].to_pylist()
    for i, cluster in enumerate(clusters):
        path = workdir / "export" / "clusters" / "test" / f"{cluster:04}" / f"{i:07}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(path)), images[i])
    assert len(list((workdir / "export" / "clusters").rglob("*.png"))) == sum(SIZES.values())


@pytest.mark.medium
def test_vectors_are_exported_and_exports_are_a_source_of_vectors(digits, tmp_path, capsys):
    source = f"features:{digits / 'export' / 'train.npy'}"
    assert smoke(tmp_path / "run", f"--config.data.source={source}", "--config.freeze_body=True", *SHORT) == 0
    for how in ("link", "copy"):
        assert job(tmp_path / "run", f"--by-cluster={how}") == 2
        assert "holds vectors, which have no pictures" in capsys.readouterr().err
    assert job(tmp_path / "run") == 0
    expected = np.load(digits / "export" / "train.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "export" / "train.npy"), expected)
    content = (tmp_path / "run" / "export" / "predict.jaxexport").read_bytes()
    found = jax.export.deserialize(bytearray(content)).call(expected[:5])
    assert found["cluster"].tolist() == assigned(tmp_path / "run")[:5]
    table = parquet.read_table(tmp_path / "run" / "export" / "train.parquet")
    assert "label" not in table.column_names and table["path"][3].as_py() == "train/train/3"
    assert json.loads((tmp_path / "run" / "export" / "manifest.json").read_text())["input"]["dtype"] == "float32"


def test_a_class_that_is_not_known_is_empty(tmp_path):
    matrix = Rows(3, (2,), np.dtype(np.float64), 10**6, tmp_path)
    matrix.append(np.arange(6.0).reshape(3, 2))
    table = store.Table(matrix.finish(), "image {}".format, {}, np.array([1, -1, 0], np.int32), ("cat", "dog"))
    store.write_parquet(tmp_path / "t.parquet", table)
    store.write_tfrecord(tmp_path / "t.tfrecord", table, "")
    columns = parquet.read_table(tmp_path / "t.parquet").to_pydict()
    assert columns == {
        "id": [0, 1, 2], "path": ["image 0", "image 1", "image 2"], "label": ["dog", None, "cat"],
        "feature": [[0, 1], [2, 3], [4, 5]],
    }  # fmt: skip
    assert [record.get("label") for record in examples(tmp_path / "t.tfrecord")] == [[b"dog"], None, [b"cat"]]


def test_a_method_that_predicts_nothing_has_no_clusters(digits, tmp_path, monkeypatch, capsys):
    restore = evaluate.restore

    def without(*arguments):
        stage, state = restore(*arguments)
        return stage._replace(predict=None, method=stage.method._replace(predict=None)), state

    monkeypatch.setattr(evaluate, "restore", without)
    workdir = tmp_path / "run"
    shutil.copytree(digits, workdir, ignore=shutil.ignore_patterns("export"))
    assert job(workdir, "--by-cluster=copy") == 2
    assert "predicts no clusters" in capsys.readouterr().err
    assert job(workdir) == 0
    assert not (workdir / "export" / "predict.jaxexport").exists()
    columns = parquet.read_table(workdir / "export" / "train.parquet").column_names
    assert columns == ["id", "path", "label", "feature"]


def test_without_pyarrow_all_but_parquet_is_written(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    workdir = tmp_path / "run"
    shutil.copytree(digits, workdir, ignore=shutil.ignore_patterns("export"))
    assert job(workdir) == 0
    assert "needs pyarrow: pip install 'jaxclust[parquet]'" in capsys.readouterr().out
    manifest = json.loads((workdir / "export" / "manifest.json").read_text())
    assert "pyarrow" in manifest["left_out"]["parquet"]
    files = {path.name for path in (digits / "export").iterdir()}
    assert {path.name for path in (workdir / "export").iterdir()} == files - {"train.parquet", "test.parquet"}


def test_predict_says_before_its_work_that_pyarrow_is_missing(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = ("--job=predict", f"--workdir={digits}", "--images=nowhere", f"--out={tmp_path / 'a.parquet'}")
    assert run(*arguments) == 2
    assert "--out=….parquet (not .csv) needs pyarrow: pip install" in capsys.readouterr().err


def test_what_cannot_work_is_refused_before_anything_is_written(digits, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(digits, workdir, ignore=shutil.ignore_patterns("export"))
    names = sorted(path.name for path in workdir.iterdir())
    assert job(workdir, "--by-cluster=move") == 2
    assert "--by-cluster='move' must be link or copy" in capsys.readouterr().err
    assert job(workdir, "--by-cluster=link") == 2
    assert "has no files to link to; --by-cluster=copy writes" in capsys.readouterr().err
    usage = shutil.disk_usage(workdir)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert job(workdir) == 3
    assert "export needs about 0.000" in (error := capsys.readouterr().err) and "2e-05 GB are free" in error
    assert sorted(path.name for path in workdir.iterdir()) == names
    shutil.rmtree(workdir / "checkpoints")
    assert job(workdir) == 2
    assert "has no checkpoint of stage 'deepcluster'; train it first" in capsys.readouterr().err
    assert job(tmp_path / "none") == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_can_be_exported_for_any_number_of_images(name):
    config = small_config(model__name=name, model__width=4, model__dim=8, model__sobel=True)
    side = 80 if name == "inception_v3" else 64
    info = DataInfo(50, (side, side, 3))
    method = methods.get(config, info)
    batch = {"views": {"train": np.zeros((2, *info.image_shape), np.uint8)}}
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    params, extra = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    for function in (method.embed, method.predict):
        exported = jax.export.deserialize(bytearray(artefacts.program(function, params, extra, info.image_shape)))
        assert str(exported.in_avals[0].shape) == f"(b, {side}, {side}, 3)"


def test_a_reader_need_not_know_that_a_network_works_in_float64(float64):
    config = small_config(runtime__dtype="float64")
    info = DataInfo(50, (8, 8, 1))
    method = methods.get(config, info)
    images = few_digits(7).splits["train"].images
    shapes = jax.eval_shape(method.init, jax.random.key(0), {"views": {"train": images}})
    rng = np.random.default_rng(0)
    params, extra = jax.tree.map(lambda leaf: rng.uniform(0.1, 1, leaf.shape).astype(leaf.dtype), shapes)
    content = artefacts.program(method.embed, params, extra, info.image_shape)
    expected = jax.jit(method.embed)(params, extra, images)
    assert expected.dtype == jnp.float64
    jax.config.update("jax_enable_x64", False)
    found = jax.export.deserialize(bytearray(content)).call(images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_network_for_one_batch_size_only_is_refused_in_words():
    def only_seven(params, extra, images):
        return images if len(images) == 7 else images + 1

    with pytest.raises(ConfigError, match="does not work for every batch size"):
        artefacts.program(only_seven, {}, {}, (8, 8, 1))
