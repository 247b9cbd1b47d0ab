"""Several hosts give what one gives: two and three processes on loopback, each with two devices (see on_hosts.py)."""

import csv
import json
import shutil

import numpy as np
import on_hosts
import pytest
from host_runs import all_well, snippet
from small import run

from jaxclust import hosts
from jaxclust.features.rows import Rows
from jaxclust.train.refresh import std_of_unit_rows

SCRIPT = "import runpy; runpy.run_module('on_hosts', run_name='__main__')"
GO_ON = "import on_hosts, pathlib; on_hosts.train(pathlib.Path(sys.argv[1]), 'float64', runtime__devices=0)"


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.wide)])
def several(request, tmp_path_factory):
    """What so many hosts saw and wrote: (their number, folder)."""
    workdir = tmp_path_factory.mktemp(f"hosts{request.param}")
    with snippet(SCRIPT, workdir, count=request.param) as processes:
        all_well(processes)
    return request.param, workdir


def seen(several, name):
    count, workdir = several
    return [np.load(workdir / f"{name}-{i}.npz") for i in range(count)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same training in float64 by one process."""
    workdir = tmp_path_factory.mktemp("one")
    on_hosts.train(workdir / "float64", "float64")
    return workdir


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command line by one process."""
    workdir = tmp_path_factory.mktemp("one") / "command"
    assert run(*on_hosts.COMMAND, f"--workdir={workdir}") == 0
    return workdir


def rounds(workdir):
    folder = workdir / "assignments" / "deepcluster"
    return [np.load(folder / f"{i}.npz")["cluster"] for i in range(len(list(folder.iterdir())))]


def same_rounds(a, b):
    assert len(rounds(a)) == len(rounds(b)) == on_hosts.ROUNDS + 1
    for left, right in zip(rounds(a), rounds(b), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.medium
def test_sums_and_rows_of_all_hosts_are_exact_on_each(several):
    count = several[0]
    for talk in seen(several, "talk"):
        for dtype in on_hosts.DTYPES:
            expected = on_hosts.summand(0, dtype)
            for host in range(1, count):
                expected = expected + on_hosts.summand(host, dtype)
            assert talk[f"total {dtype}"].dtype == dtype
            np.testing.assert_array_equal(talk[f"total {dtype}"], expected)
            for size in on_hosts.SIZES:
                for kind in ("whole", "in order"):
                    assert talk[f"{kind} {dtype} {size}"].dtype == dtype
                    np.testing.assert_array_equal(talk[f"{kind} {dtype} {size}"], on_hosts.table(size, dtype))
        assert talk["total of a number"] == sum([0.1] * count) and talk["total of a number"].shape == ()
        assert talk["agreed"] == 7


@pytest.mark.medium
def test_what_host_0_makes_is_the_same_everywhere(several):
    for talk in seen(several, "talk"):
        for name, array in on_hosts.made().items():
            got = talk[f"made {name}"]
            assert got.dtype == array.dtype and got.shape == array.shape
            np.testing.assert_array_equal(got, array)


@pytest.mark.medium
def test_hosts_wait_for_the_last_one(several):
    assert all(talk["waited"] > 0.5 for talk in seen(several, "talk"))


@pytest.mark.medium
def test_errors_of_host_0_and_bad_settings_are_said_by_every_host(several):
    count, workdir = several
    devices, nearest = 2 * count, (100 + count) // (2 * count) * 2 * count
    for host in range(count):
        failed, late, same, differing, short, fewer, batch = (workdir / f"errors-{host}.txt").read_text().split("\n")
        if host:
            assert failed == "HostError 3: host 0 could not finish the clustering: row 3 holds NaN"
            assert late.startswith(
                "HostError 1: host 0 did not finish the slow clustering within 0.5 s (config.runtime.deadline); "
            )
        else:
            assert failed == "DataError 3: row 3 holds NaN" and late == "DataError 3: too late"
        assert same == "fine"
        assert differing == f"HostError 1: the settings of host {count - 1} differ from those of host 0"
        assert short == (f"ValueError : {3 - host} rows for the 2 ids of host {host}" if host != 1 else "fine")
        assert f"config.runtime.devices=1 on {count} hosts with {devices} devices" in fewer
        words = f"config.batch_size={100 + count} must divide by {devices} devices on {count} hosts; nearest: {nearest}"
        assert words in batch


@pytest.mark.medium
def test_every_id_comes_out_once_on_the_host_that_it_belongs_to(several):
    for host, passes in enumerate(seen(several, "passes")):
        for size in (1, 24, 49):
            for memory in (10**9, 0):
                ids, images = np.arange(size), on_hosts.vectors(size)
                np.testing.assert_array_equal(passes[f"ids {size} {memory}"], ids[host :: several[0]])
                np.testing.assert_array_equal(passes[f"own {size} {memory}"], 2 * images[host :: several[0]])
                np.testing.assert_array_equal(passes[f"row {size} {memory}"], 2 * images)
                np.testing.assert_array_equal(passes[f"first {size} {memory}"], images[:, 0])


@pytest.mark.medium
def test_rows_are_measured_taken_and_written_as_by_one_process(several, tmp_path):
    images = 2 * on_hosts.vectors(49)
    rows = Rows(49, (5,), images.dtype, 10**9, tmp_path)
    rows.append(images)
    for passes in seen(several, "passes"):
        np.testing.assert_allclose(passes["std 49 0"], std_of_unit_rows(rows.finish()), rtol=1e-12)
        np.testing.assert_array_equal(passes["taken"], images[[0, 3, 4, 5, 47, 48]])
        np.testing.assert_array_equal(passes["memory"], np.concatenate([np.zeros((1, 5)), on_hosts.vectors(48)[::-1]]))
    np.testing.assert_array_equal(np.load(several[1] / "rows.npy"), images)
    with np.load(several[1] / "rows" / "2.npz") as by_position:
        np.testing.assert_array_equal(by_position["position"], np.arange(48))
        np.testing.assert_array_equal(by_position["gate"], np.stack([np.arange(48), -np.arange(48)], 1))


@pytest.mark.medium
def test_a_training_gives_the_assignments_of_one_process_in_float64_which_goes_on_with_it(several, one, capsys):
    workdir = several[1] / "float64"
    for a, b in zip(rounds(workdir)[:2], rounds(one / "float64")[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    on_hosts.train(workdir, "float64")
    assert "going on from step" in capsys.readouterr().out
    same_rounds(workdir, one / "float64")


@pytest.mark.medium
def test_a_training_agrees_with_one_process_in_float32(several, request, tmp_path):
    """Sums run in another order, so at most 1 % may change cluster."""
    name = {2: "command", 3: "float32"}[several[0]]
    if name == "float32":
        on_hosts.train(tmp_path, "float32", rounds=2, **on_hosts.SGD)
    here, there = rounds(several[1] / name), rounds(tmp_path if name == "float32" else request.getfixturevalue(name))
    assert len(here) == len(there) == 3
    for a, b in zip(here, there, strict=True):
        assert len(a) == len(b) and (a != b).mean() <= 0.01


@pytest.mark.medium
@pytest.mark.parametrize("several", [2], indirect=True)
def test_host_0_alone_writes(several, command):
    workdir = several[1] / "command"
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (command / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r.keys()) for r in records] == [(r["step"], r.keys()) for r in expected]
    for name in ("results.json", "data.json", "images.csv", "assignments.csv", "samples.npz", "report/index.html"):
        assert (workdir / name).exists()
    with (workdir / "assignments.csv").open() as table:
        assert [int(row["id"]) for row in csv.DictReader(table)] == list(range(1797))
    results, of_one = (json.loads((path / "results.json").read_text()) for path in (workdir, command))
    assert abs(results["train/acc"] - of_one["train/acc"]) <= 0.01
    assert abs(results["train/silhouette"] - of_one["train/silhouette"]) <= 0.02
    environment = json.loads((workdir / "environment.json").read_text())
    assert environment["hosts"] == several[0] and environment["devices_used"] == 2 * several[0]


@pytest.mark.wide
def test_a_checkpoint_of_eight_devices_goes_on_on_four_one_and_two_hosts_of_four(tmp_path, one):
    on_hosts.train(tmp_path / "run", "float64", runtime__devices=8, rounds=1)
    shutil.copytree(tmp_path / "run", tmp_path / "hosts")
    for count, until in ((4, 2), (1, 3)):
        on_hosts.train(tmp_path / "run", "float64", runtime__devices=count, rounds=until)
    same_rounds(tmp_path / "run", one / "float64")
    with snippet(GO_ON, tmp_path / "hosts", devices=4) as processes:
        assert "going on from step" in all_well(processes)[0].out
    same_rounds(tmp_path / "hosts", one / "float64")


def test_one_host_is_all_of_them():
    rows = np.arange(6.0)
    assert (hosts.index(), hosts.count(), hosts.is_first()) == (0, 1, True)
    assert hosts.total(rows) is rows and hosts.whole(rows, 6) is rows
    assert hosts.own_ids(3).tolist() == [0, 1, 2]
    assert [chunk.tolist() for chunk in hosts.in_order(iter([rows[:2], rows[2:]]), 6)] == [[0, 1], [2, 3, 4, 5]]
    assert hosts.from_first(lambda: {"a": rows}, "nothing", 0.0)["a"] is rows
    assert hosts.agreed(3) == 3
    hosts.require_same("nothing", b"")
    hosts.wait("nobody")
