"""Images that a table lists, with classes, boxes and splits (check D13 of the specification of DSCL)."""

import logging
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from small import run
from test_splits import config_of

from jaxclust.data.decode import Box, Unreadable, decode, scan, within
from jaxclust.data.listed import number_classes
from jaxclust.data.pipeline import images_at
from jaxclust.data.source import open_source
from jaxclust.data.sources import cars196
from jaxclust.errors import ConfigError, DataError
from jaxclust.runtime import tensorflow

SIZE = (20, 30)  # height and width of the pictures here


def picture(path, mode="RGB", size=SIZE, **how):
    """A file whose pixel (y, x) is (10 y, 8 x, 100), or grey 10 y."""
    y, x = np.mgrid[: size[0], : size[1]]
    pixels = np.stack([10 * y, 8 * x, np.full_like(x, 100)], axis=2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.fromarray(pixels[..., 0]) if mode == "L" else Image.fromarray(pixels).convert(mode)
    made.save(path, **how)
    return path


def table(folder, text, name="mine.csv"):
    (folder / name).write_text(text)
    return f"table:{folder / name}"


def pixels_of(split, id):
    return split.load(tensorflow().constant(id)).numpy()


def test_a_box_is_cut_out_of_the_upright_image_before_it_is_reduced(tmp_path):
    path = str(picture(tmp_path / "a.png"))
    box = Box(3, 2, 13, 8)
    got = decode(path, 3, 100, 10**6, box)
    np.testing.assert_array_equal(got, decode(path, 3, 100, 10**6)[2:8, 3:13])
    assert decode(path, 3, 3, 10**6, box).shape == (3, 5, 3) and decode(path, 1, 100, 10**6, box).shape == (6, 10, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: width and height are exchanged
    turned = str(picture(tmp_path / "turned.jpg", exif=exif, quality=95))
    assert scan(turned, 10**6)[:2] == (30, 20)
    upright = decode(turned, 3, 100, 10**6)
    np.testing.assert_array_equal(decode(turned, 3, 100, 10**6, box), upright[2:8, 3:13])
    with pytest.raises(Unreadable, match=r"box \(3, 2, 31, 8\) reaches out of the image of 30 x 20"):
        decode(path, 3, 100, 10**6, Box(3, 2, 31, 8))


@pytest.mark.parametrize("cache", [10**6, 0])
def test_stretched_images_keep_their_ends(tmp_path, cache):
    """Of a wide box the middle would be cut out; stretched, its first and last columns are the outer ones."""
    picture(tmp_path / "a.png")
    place = table(tmp_path, "path,x1,y1,x2,y2\na.png,0,0,30,10\na.png,,,,\n")
    split = open_source(config_of(place, image_size=7, cache_bytes=cache, stretch=True)).splits["train"]
    got = [pixels_of(split, i).astype(int) for i in range(2)]
    assert [pixels.shape for pixels in got] == [(8, 8, 3)] * 2
    assert (got[0][:, 0, 1] < 24).all() and (got[0][:, -1, 1] > 8 * 29 - 24).all()
    assert got[0][-1, 0, 0] < 100 < got[1][-1, 0, 0]  # of ten rows and of twenty
    whole = open_source(config_of(place, image_size=7, cache_bytes=cache)).splits["train"]
    assert [pixels_of(whole, i).shape for i in range(2)] == [(8, 24, 3), (8, 12, 3)]
    np.savez(tmp_path / "wide.npz", images=np.arange(2 * 4 * 12, dtype=np.uint8).reshape(2, 4, 12))
    config = config_of(f"npz:{tmp_path / 'wide.npz'}", image_size=7, stretch=True)
    assert pixels_of(open_source(config).splits["train"], 1).shape == (8, 8, 1)


def test_a_box_ends_where_its_image_does():
    assert within(Box(-3, 2, 40, 50), *SIZE) == (0, 2, 30, 20) and within(Box(0, 0, 30, 20), *SIZE) == (0, 0, 30, 20)
    for outside in (Box(30, 0, 40, 10), Box(-5, 0, 0, 10), Box(0, 20, 5, 30), Box(0, -4, 5, 0)):
        with pytest.raises(Unreadable, match="has no pixel in the image of 30 x 20"):
            within(outside, *SIZE)


@pytest.mark.parametrize("cache", [10**6, 0])
def test_a_table_of_images_of_any_kind_with_boxes(tmp_path, caplog, cache):
    for name, mode in {"in/a.jpg": "RGB", "in/b.png": "L", "in/c.jpg": "CMYK", "d.png": "RGBA"}.items():
        picture(tmp_path / name, mode)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    place = table(
        tmp_path,
        "label,path,x1,y1,x2,y2\n"
        "cat,in/a.jpg,3,2,13,8\n"
        "dog,in/b.png,,,,\n"
        "cat,in/c.jpg,0,0,30,20\n"
        ",bad.png,1,1,2,2\n"
        " eel ,in/a.jpg,25,15,99,99\n"
        "cat,gone.png,,,,\n"
        "dog,d.png,30,0,40,5\n"
        ",d.png,1,1.4,2,2.6\n",
    )
    with caplog.at_level(logging.WARNING):
        source = open_source(config_of(place, image_size=8, cache_bytes=cache))
    split = source.splits["train"]
    assert split.paths == ["in/a.jpg", "in/b.png", "in/c.jpg", "in/a.jpg", "d.png"]
    assert split.labels.tolist() == [0, 1, 0, 2, -1] and source.class_names == ("cat", "dog", "eel")
    sizes = [pixels_of(split, i).shape for i in range(5)]
    assert sizes == [(6, 10, 3), (9, 14, 3), (9, 14, 3), (5, 5, 3), (2, 1, 3)]  # short sides of at most 9
    assert images_at(split, np.arange(5)).shape == (5, 8, 8, 3)
    assert "train: 1 boxes reach out of their images" in caplog.text
    reasons = {skipped.path: skipped.reason for skipped in source.skipped}
    assert reasons.keys() == {"bad.png", "gone.png", "d.png"} and "box (30, 0, 40, 5)" in reasons["d.png"]
    whole = open_source(config_of(place, image_size=8, cache_bytes=cache, box_crop=False)).splits["train"]
    assert whole.size == 6 and {pixels_of(whole, i).shape for i in range(6)} == {(9, 14, 3)}


def test_splits_of_a_table_are_as_those_of_folders(tmp_path, caplog):
    for i in range(6):
        picture(tmp_path / f"{i}.png")
    rows = "".join(f"{i}.png,{i % 2},{split}\n" for i, split in enumerate(["val", "", "train", "more", "test", "odd"]))
    place = table(tmp_path, f"path,label,split\n{rows}")
    with caplog.at_level(logging.WARNING):
        splits = open_source(config_of(place)).splits
    assert {name: split.paths for name, split in splits.items()} == {"train": ["1.png", "2.png"], "test": ["4.png"]}
    assert "3 images of other splits than train and test are left out" in caplog.text
    assert open_source(config_of(place, "train+more")).splits["train"].paths == ["1.png", "2.png", "3.png"]
    by_class = open_source(config_of(place, train_classes="1")).splits
    assert by_class["train"].paths == ["1.png"] and by_class["test"].paths == ["2.png", "4.png"]
    with pytest.raises(ConfigError, match="no split 'mor'; did you mean 'more'"):
        open_source(config_of(place, "train+mor"))
    with pytest.raises(DataError, match="no row is of the split 'train', only of test"):
        open_source(config_of(table(tmp_path, "path,split\n1.png,test\n")))


@pytest.mark.parametrize(
    "values, labels, names, said",
    [
        (["0", "1", "0"], [0, 1, 0], ("0", "1"), False),
        (["1", "2", "10"], [0, 1, 2], ("1", "2", "10"), True),
        ([7, None, -3], [1, -1, 0], ("-3", "7"), True),
        ([1.0, 0.0, None], [1, 0, -1], ("0", "1"), False),
        (["b", "10", "9", None], [2, 0, 1, -1], ("10", "9", "b"), False),
        ([None, None], [-1, -1], None, False),
    ],
)
def test_labels_are_numbered_and_that_is_said(values, labels, names, said, caplog):
    with caplog.at_level(logging.WARNING):
        assert number_classes("mine.csv", values) == (labels, names)
    assert ("are numbered from 0 on" in caplog.text) == said


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,label\na.png,1\n", "has no column 'path'.* Columns that mean something are path, label"),
        ("path,x1,y1\na.png,1,2\n", "a box needs the columns x1, y1, x2, y2, and there are only x1, y1"),
        ("path,x1,y1,x2,y2\na.png,1,2,3,\n", r"row 1 below the names has the box \('1', '2', '3', None\)"),
        ("path,x1,y1,x2,y2\na.png,1,2,3,inf\n", "must be four numbers of pixels"),
        ("path,x1,y1,x2,y2\na.png,1,2,1,4\n", "is empty: x1 < x2 and y1 < y2 are needed"),
        ("path,label\na.png,1\n,2\n", "row 2 below the names has the path ''"),
        ("path,label\na.png\n", "row 1 below the names has 1 cells under 2 names"),
        ("", "has no column 'path'"),
        ("path\n", "no row is of the split 'train'"),
        ("path\ngone.png\n", r"lists no images to train on; 1 cannot be used:\n  'gone.png': no such file"),
    ],
)
def test_tables_that_are_malformed_are_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        open_source(config_of(table(tmp_path, text)))


def test_a_table_is_a_csv_or_a_parquet_file_that_is_there(tmp_path, monkeypatch):
    for where, error in {"": ConfigError, "rows.txt": ConfigError, "gone.csv": DataError}.items():
        with pytest.raises(error, match=r"config.data.source=.?table:"):
            open_source(config_of(f"table:{where}"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(config_of(f"table:{tmp_path / 'rows.parquet'}"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install 'jaxclust\[parquet\]'"):
        open_source(config_of(f"table:{tmp_path / 'rows.parquet'}"))


def test_a_parquet_table_is_read_as_a_csv_one(tmp_path):
    import pyarrow
    from pyarrow import parquet

    picture(tmp_path / "a.png")
    columns = {"path": ["a.png"] * 3, "label": [1, None, 2], "x1": [0.0, None, 5.0], "y1": [0.0, None, 5.0]}
    columns |= {"x2": [4.0, None, 15.0], "y2": [3.0, None, 9.0], "other": [b"1", b"2", b"3"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "mine.parquet")
    source = open_source(config_of(f"table:{tmp_path / 'mine.parquet'}"))
    split = source.splits["train"]
    assert split.labels.tolist() == [0, -1, 1] and source.class_names == ("1", "2")
    assert [pixels_of(split, i).shape for i in range(3)] == [(3, 4, 3), (20, 30, 3), (4, 10, 3)]


def cars(folder, classes, boxes=None, names=True, **changes):
    """The official layout: `cars_annos.mat` lists images of these classes, all the same two files, one of them grey."""
    picture(folder / "car_ims" / "000001.jpg", quality=95)
    picture(folder / "car_ims" / "000002.jpg", "L", quality=95)
    fields = ["relative_im_path", *(f"bbox_{name}" for name in ("x1", "y1", "x2", "y2")), "class", "test"]
    rows = np.zeros((1, len(classes)), dtype=[(name, object) for name in fields])
    for i, label in enumerate(classes):
        box = boxes[i] if boxes else (3, 2, 13, 8)
        rows[0, i] = (f"car_ims/{i % 2 + 1:06}.jpg", *map(np.uint8, box), np.uint8(label), np.uint8(i % 2))
    content = {"annotations": rows}
    if names:
        content["class_names"] = np.array([[f"Car {i}" for i in range(1, 197)]], dtype=object)
    savemat(folder / "cars_annos.mat", content | changes)
    return f"cars196:{folder}"


def test_d13_cars_are_divided_by_class_and_cut_out(tmp_path, caplog):
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(1, 197), 2))  # ids, not places, decide
    with caplog.at_level(logging.WARNING):
        source = open_source(config_of(cars(tmp_path, classes)))
    assert "lists 392 images of 196 classes, and the official one 16,185 of 196" in caplog.text
    train, test = source.splits["train"], source.splits["test"]
    assert (train.size, test.size, source.train_classes, source.num_classes) == (196, 196, 98, 196)
    assert train.labels.tolist() == (classes[classes <= 98] - 1).tolist()
    assert test.labels.tolist() == (classes[classes > 98] - 1).tolist()
    assert source.class_names[:2] == ("Car 1", "Car 2") and source.class_names[195] == "Car 196"
    assert set(train.paths) == {"car_ims/000001.jpg", "car_ims/000002.jpg"} and train.image_shape == (6, 6, 3)
    for split in (train, test):
        grey = split.paths.index("car_ims/000002.jpg")
        got = pixels_of(split, grey)
        assert got.shape == (6, 10, 3) and (got[..., 0] == got[..., 2]).all()
        colour = pixels_of(split, split.paths.index("car_ims/000001.jpg")).astype(int)
        assert abs(colour[0, 0] - [20, 24, 100]).max() < 12 and abs(colour[-1, -1] - [70, 96, 100]).max() < 12
    other = open_source(config_of(f"cars196:{tmp_path}", train_classes="0-3,Car 5", box_crop=False))
    assert other.train_classes == 5 and other.splits["train"].size == 10
    assert pixels_of(other.splits["train"], 0).shape == (20, 30, 3)


def test_the_official_counts_are_checked_where_the_table_is_as_long(tmp_path, monkeypatch, caplog):
    place = cars(tmp_path, [1, 2, 2, 99, 100, 100, 100])
    monkeypatch.setattr(cars196, "IMAGES", 7)
    monkeypatch.setattr(cars196, "PARTS", (3, 4))
    monkeypatch.setattr(cars196, "CLASSES", 4)
    with caplog.at_level(logging.WARNING):
        assert open_source(config_of(place)).splits["test"].size == 4
    assert "official" not in caplog.text
    monkeypatch.setattr(cars196, "PARTS", (4, 3))
    with pytest.raises(DataError, match="the first 98 have 3 images and the others 4; of the official 196"):
        open_source(config_of(place))
    assert (cars196.FIELDS[0], cars196.TRAIN_CLASSES) == ("relative_im_path", "first:98")


def test_labels_of_arrays_that_are_renumbered_are_said(tmp_path, caplog):
    images, rows = np.zeros((4, 8, 8), np.uint8), np.ones((4, 3), np.float32)
    for name, labels in {"plain": [0, 1, 2, 1], "gaps": [5, 1, 9, 1]}.items():
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.array(labels))
        np.savez(tmp_path / f"{name}-rows.npz", features=rows, labels=np.array(labels))
        for place in (f"npz:{tmp_path / name}.npz", f"features:{tmp_path / name}-rows.npz"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                source = open_source(config_of(place))
            said = ["labels from 1 to 9, of 3 classes, are numbered from 0 on"] if name == "gaps" else []
            assert [record.getMessage().partition(": ")[2] for record in caplog.records] == said
    assert source.splits["train"].labels.tolist() == [1, 0, 2, 0] and source.class_names == ("1", "5", "9")


def test_a_folder_that_is_none_of_cars_is_refused(tmp_path):
    for where, error, message in [
        ("", ConfigError, "write 'cars196:DIR'"),
        (tmp_path / "none", DataError, "has no cars_annos.mat; expected is the official layout"),
    ]:
        with pytest.raises(error, match=message):
            open_source(config_of(f"cars196:{where}"))
    (tmp_path / "cars_annos.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        open_source(config_of(f"cars196:{tmp_path}"))
    savemat(tmp_path / "cars_annos.mat", {"annotations": np.arange(3)})
    with pytest.raises(DataError, match="has no structs 'annotations' with the fields relative_im_path"):
        open_source(config_of(f"cars196:{tmp_path}"))
    with pytest.raises(DataError, match=r"image 2 is of class 200; there are 1 to 196"):
        open_source(config_of(cars(tmp_path, [1, 200])))
    with pytest.raises(ConfigError, match="train_classes='first:98' takes 98 of 196 classes .* leaves 0 images"):
        open_source(config_of(cars(tmp_path, [1, 2])))
    alone = open_source(config_of(cars(tmp_path, [1, 99], names=False)))
    assert alone.class_names[98] == "99" and alone.num_classes == 99


@pytest.mark.wide
def test_a_table_is_trained_on_by_command_line(tmp_path):
    for i in range(24):
        picture(tmp_path / f"{i}.png", size=(10 + i % 3, 12))
    rows = "".join(f"{i}.png,{i % 4},1,1,9,{9 + i % 2}\n" for i in range(24))
    place = table(tmp_path, f"path,label,x1,y1,x2,y2\n{rows}")
    assert run(
        "--config=configs/deepcluster.py:smoke", f"--config.data.source={place}", "--config.data.train_classes=0.5",
        f"--workdir={tmp_path / 'run'}", "--config.method=supervised", "--config.rounds=1", "--config.batch_size=8",
        "--config.model.blocks=1", "--config.report.pictures=", "--config.evaluate.suite=readouts",
        "--config.cluster.k=2", "--config.evaluate.nmi_runs=0",
    ) == 0  # fmt: skip
    assert (tmp_path / "run" / "retrieval.md").read_text().count("\n") == 4
