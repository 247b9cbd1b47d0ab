"""Plans: what the compiler says of the real programs, and what is made of it."""

import json
import math
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from small import smaller_config, smoke, with_settings

from jaxclust import config as config_lib
from jaxclust import runtime
from jaxclust.config import from_file
from jaxclust.data.split import Split
from jaxclust.errors import ConfigError
from jaxclust.jobs import plan
from jaxclust.jobs.options import Options
from jaxclust.main import main
from jaxclust.methods.base import DataInfo
from jaxclust.plan import estimate, measure, topology
from jaxclust.plan.estimate import Kmeans
from jaxclust.plan.program import Collective, Program, collectives, compiled, nbytes
from jaxclust.plan.table import size, table, time, work
from jaxclust.train.stage import prepare

whole = pytest.mark.medium  # the first of them makes the plan
DIGITS = DataInfo(1797, (8, 8, 1))


@pytest.fixture(scope="module", autouse=True)
def compilation_cache():
    """A plan switches JAX's cache of programs off; it asks only once, and other files of tests want it on."""
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    reset_cache()


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The folder of a plan of the smoke config for eight CPU devices, made by the command line."""
    workdir = tmp_path_factory.mktemp("plan") / "run"
    command = ["--job=plan", "--topology=cpu:8", "--config=configs/deepcluster.py:smoke", f"--workdir={workdir}"]
    assert main(["jaxclust", *command, "--config.model.blocks=2"]) == 0
    return workdir


@pytest.fixture(scope="module")
def found(planned):
    return json.loads((planned / "plan.json").read_text())["deepcluster"]["cpu:8"]


def smoke_stage(count=8, info=DIGITS, **fields):
    config = smaller_config(runtime__devices=count, batch_size=64, eval_batch_size=64, **fields)
    split = Split(info.size, info.image_shape, str, load=lambda id: id)
    return prepare(config, "deepcluster", split, info, Path("nowhere"))


# A whole plan


@whole
@pytest.mark.wide
def test_parameters_and_optimiser_are_those_of_the_model(found):
    convolutions = sum(9 * a * b + b + 2 * b for a, b in ((1, 8), (8, 16)))  # with bias and batch norm
    parameters = 4 * (convolutions + (2 * 2 * 16 + 1) * 32 + (32 + 1) * 10)
    assert found["memory/parameters"] == parameters
    adam = 2 * parameters  # the body and the head each keep two moments, and count their steps
    assert adam <= found["memory/optimizer"] <= adam + 64
    statistics, centroids, whitening = 2 * (8 + 16), 10 * 16, 32 * 16 + 32
    assert found["memory/statistics"] >= 4 * (statistics + centroids + whitening)


@whole
def test_memory_is_the_sum_of_its_parts_and_fits(found):
    parts = ("parameters", "optimizer", "statistics", "batches", "rows", "temporaries", "program")
    assert found["memory/train"] == sum(found[f"memory/{part}"] for part in parts)
    assert found["memory/chip"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    assert found["fits"] and found["largest/batch_per_chip"] >= 8
    assert found["largest/memory"] <= found["memory/chip"]


@whole
def test_a_batch_of_a_chip_is_its_share_of_the_images(found):
    assert (found["chips"], found["train/batch"], found["train/batch_per_chip"]) == (8, 64, 8.0)
    images = 8 * 8 * 8  # uint8
    assert 9 * images <= found["memory/batches"] <= 9 * (images + 1024)  # ids, targets, weights beside them


@whole
def test_nothing_is_timed_without_published_figures(found):
    assert not [name for name, value in found.items() if name.endswith("seconds") and value is not None]
    assert "train/images_per_second" not in found


@whole
def test_the_table_has_every_figure_and_says_whether_it_fits(planned, found):
    text = (planned / "plan.md").read_text()
    assert "1,797 images of 8 x 8 x 1" in text and "Images read from digits, float32" in text
    assert f"| {size(found['memory/train'])}" in text and "cpu:8: fits, " in text


@pytest.mark.wide
@whole
def test_a_run_may_start_where_it_was_planned(planned):
    assert smoke(planned, "--config.rounds=1") == 0


# What a round costs


def test_the_feature_pass_gives_what_a_refresh_sees():
    """Which for UAD is longer than the feature: low maps beside it."""
    stage = smoke_stage(1, method="uad", uad__low_grid=2)
    feature, seen = stage.config.model.dim, measure.feature_dim(stage)
    assert seen > feature and stage.method.points(stage.shapes) == (1, stage.config.cluster.pca_dim)
    assert 4 * seen * 64 <= measure.feature_program(stage).outputs < 4 * (seen + feature) * 64


def test_a_memory_bank_takes_the_place_of_a_pass_over_the_images():
    """Of DeepCluster-v2: 3 heads cluster points of 32 numbers, of which each image has 2."""
    config = with_settings(from_file(Path("configs/deepcluster.py"), "v2_digits,smoke"), cluster__runs=1)
    pod, size = on("v5e:4x4", 16), DIGITS.size
    stage = measure.stage_on(topology.get("cpu:8"), config, "deepcluster_v2", DIGITS, 64)
    found = plan.of_a_round(stage, None, 0.5, pod)
    bank, each = 4 * 2 * 32 * size, Kmeans(size, 32, config.cluster.k, config.cluster.iterations + 1)
    assert (found["round/bank_bytes"], found["round/point_bytes"]) == (bank, bank / 2)
    assert found["round/bank_seconds"] == pytest.approx(bank / estimate.HOSTS)
    assert found["round/label_bytes"] == 3 * 8 * size
    assert found["round/sharded_seconds"] == pytest.approx(3 * estimate.on_all_chips(each, pod))
    assert found["round/faiss_seconds"] == pytest.approx(3 * estimate.on_first_host(each, pod)[1])
    assert not {"round/feature_seconds", "round/reduce_seconds"} & found.keys()
    waiting = measure.train_memory(stage, Program(0, 0, 0, 0, 0, 0, ()))["rows"]
    assert waiting == found["round/steps"] * 8 * (4 * 2 * 32 + 4 + 4)  # a chip's share; with id and position
    alone = stage._replace(method=stage.method._replace(points=None))  # a refresh that clusters nothing
    assert not {"round/point_bytes", "round/faiss_seconds"} & plan.of_a_round(alone, None, 0.5, pod).keys()


def test_a_method_that_does_not_cluster_has_nothing_between_its_rounds():
    stage = smoke_stage(1, DIGITS._replace(num_classes=10), method="supervised")
    found = plan.of_a_round(stage, None, 0.5, on("v5e:2x2", 4))
    assert found == {"round/steps": 29, "round/train_seconds": 14.5}


# Work and exchange of the real step


def hand_flops(width, side, channels, dim, outputs, batch):
    """Twice the products that two blocks of ConvNet, its feature and a head take, forward and backward.

    Only products with pixels inside of the image count, which is how XLA counts; but for the gradient of a kernel,
    which a CPU takes over the border of zeros too.
    """
    inside, everywhere = ([(3 * s - less) ** 2 for s in (side, side // 2)] for less in (2, 0))  # pairs of pixels
    first, second = channels * width, width * 2 * width
    dense = (side // 4) ** 2 * 2 * width * dim + dim * outputs
    kernels = everywhere[0] * first + everywhere[1] * second
    return 2 * batch * (inside[0] * first + 2 * inside[1] * second + kernels + 3 * dense)  # no gradient of the images


def test_flops_of_the_train_step_are_those_counted_by_hand():
    """What is no product (batch norm, ReLU, pooling, the optimiser) adds a few per cent."""
    info = DataInfo(1000, (32, 32, 3))
    config = smaller_config(model__width=128, model__blocks=2, model__dim=64, batch_size=16, eval_batch_size=16)
    stage = measure.stage_on(topology.get("cpu:8"), config, "deepcluster", info, 16)
    flops, by_hand = measure.train_program(stage).flops, hand_flops(128, 32, 3, 64, 10, batch=2)
    assert by_hand < flops < 1.05 * by_hand


def test_flops_of_products_are_exact():
    def loss(w, x):
        y = jax.lax.conv_general_dilated(x, w[0], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return (y.reshape(len(y), -1) @ w[1]).sum()

    w = [jax.ShapeDtypeStruct((3, 3, 8, 64), jnp.float32), jax.ShapeDtypeStruct((36 * 64, 128), jnp.float32)]
    program = compiled(jax.jit(loss), w, jax.ShapeDtypeStruct((16, 8, 8, 8), jnp.float32))
    products = 16 * (36 * 9 * 8 * 64 + 36 * 64 * 128)
    assert program.flops == pytest.approx(2 * products, rel=0.02)
    assert program.arguments == nbytes(w) + 4 * 16 * 8**3


@whole
def test_the_gradient_goes_around_once(found):
    """All parameters, and beside them the sums of batch norm and the metrics, which are small."""
    stage = smoke_stage()
    parameters, statistics = nbytes(stage.shapes.params), nbytes(stage.shapes.extra["batch_stats"])
    assert parameters * 0.99 <= found["train/collective_bytes"] <= parameters + 8 * statistics + 256
    features = measure.feature_program(stage)
    assert not features.collectives and features.outputs >= 8 * 32 * 4


def test_one_device_exchanges_nothing_worth_a_name():
    program = measure.train_program(smoke_stage(1))
    assert (
        estimate.times(program, topology.Topology("v5e:1x1", [None], (1, 1), 1, 1, topology.CHIPS["v5e"])).collectives
        == 0
    )


# Text of a compiled module

ONE = "  %all-reduce.1 = f32[4096,1000]{1,0:T(8,128)} all-reduce(%dot.3), channel_id=1, replica_groups=[1,4]<=[4]"
TUPLE = "  ROOT all-reduce.9 = (f32[96]{0:T(256)}, bf16[11,11,2,96]{3,2,1,0:T(8,128)}, pred[], s32[3]) all-reduce()"
STARTED = """
  %all-reduce-start.4 = f32[64]{0} all-reduce-start(f32[64]{0} %p), channel_id=4
  %all-reduce-done.4 = f32[64]{0} all-reduce-done(f32[64]{0} %all-reduce-start.4)
  %all-gather-start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(bf16[2,8]{1,0} %x), dimensions={0}
  %all-gather-done = bf16[8,8]{1,0} all-gather-done((bf16[2,8]{1,0}, bf16[8,8]{1,0}) %all-gather-start)
  %collective-permute-start = (f32[5]{0}, f32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y)
  %collective-permute-done = f32[5]{0} collective-permute-done(%collective-permute-start)
"""
OTHERS = """
  %get-tuple-element.5 = f32[96]{0} get-tuple-element(%all-reduce.9), index=0
  %fusion.2 = f32[96]{0} fusion(%all-reduce.1, %all-gather-done), kind=kLoop, calls=%fused_all-reduce
"""


def test_collectives_are_read_from_the_text_of_a_module():
    assert collectives(ONE) == (Collective("all-reduce", 4 * 4_096_000),)
    assert collectives(TUPLE) == (Collective("all-reduce", 4 * 96 + 2 * 121 * 2 * 96 + 1 + 12),)
    assert not collectives(OTHERS)


def test_what_is_started_and_done_counts_once():
    expected = [("all-reduce", 256), ("all-gather", 128), ("collective-permute", 20)]
    assert list(collectives(STARTED)) == [Collective(*one) for one in expected]


def test_a_reduce_scatter_counts_what_a_chip_gives():
    text = "  %reduce-scatter.1 = f32[16]{0} reduce-scatter(%g), replica_groups=[1,4]<=[4], dimensions={0}"
    module = f"HloModule jit_step, is_scheduled=true, num_partitions=4, frontend_attributes={{}}\n{text}\n"
    assert collectives(module) == (Collective("reduce-scatter", 256),)


def test_small_and_odd_element_types_have_their_size():
    text = "  %x = (f8e4m3fn[8]{0}, s4[8]{0}, c64[2]{0}) all-to-all(%a, %b, %c)"
    assert collectives(text) == (Collective("all-to-all", 8 + 4 + 16),)


# Times


def on(name, chips):
    """A topology without the devices, which times need only the number of."""
    kind, _, sides = name.partition(":")
    shape = tuple(map(int, sides.split("x")))
    return topology.Topology(name, [None] * math.prod(shape), shape, chips // 4, 1e9, topology.CHIPS[kind])


@pytest.mark.parametrize("name, published", [("v5e:16x16", 51.2e12), ("v6e:16x16", 102.4e12)])
def test_an_all_reduce_over_a_pod_has_its_published_bandwidth(name, published):
    """It is given for all chips, and by the passes of a ring every byte travels twice."""
    seconds = estimate.collective(Collective("all-reduce", 10**9), on(name, 256))
    assert 10**9 * 256 * 2 / seconds == pytest.approx(published, rel=0.02)


def test_a_line_has_half_the_bandwidth_of_a_ring_and_twice_the_way():
    small, large = Collective("all-gather", 0), Collective("all-gather", 10**12)
    line, ring = on("v5e:8x8", 64), on("v5p:8x8", 64)  # of which the second has links of twice the bandwidth
    assert estimate.collective(small, line) == pytest.approx(14e-6)
    assert estimate.collective(small, ring) == pytest.approx(8e-6)
    assert estimate.collective(large, line) == pytest.approx(4 * estimate.collective(large, ring), rel=1e-3)


def test_times_grow_with_their_cause():
    here, far = Kmeans(10**6, 256, 1000, 20), Kmeans(10**9, 256, 1000, 20)
    pod, host = on("v5e:16x16", 256), on("v5e:2x2", 4)
    assert estimate.on_first_host(far, pod)[1] == pytest.approx(1000 * estimate.on_first_host(here, pod)[1])
    assert estimate.on_first_host(here, host)[0] == 0.0  # its own host is the first
    assert estimate.on_all_chips(far, pod) < estimate.on_all_chips(far, host) / 50


# The largest batch


@given(
    fixed=st.integers(0, 10**6),
    image=st.integers(10, 10**5),
    start=st.integers(1, 512),
    limit=st.integers(10**5, 10**8),
)
def test_the_largest_batch_is_found_in_few_compilations(fixed, image, start, limit):
    tried = []

    def needed(batch):
        tried.append(batch)
        return fixed + image * batch if fixed + image * batch <= 2 * limit else math.inf  # far beyond it is refused

    best, used = measure.largest(needed, limit, start, fixed, 10**9)
    most = (limit - fixed) // image
    assert len(tried) <= measure.COMPILES
    assert best <= max(most, 0) and used <= max(limit, fixed)
    if start <= most:
        assert best * measure.CLOSE + 8 >= most
    elif most >= start / 8:
        assert best >= most / 4


def test_a_size_that_was_found_elsewhere_is_tried_first():
    tried = []
    measure.largest(lambda batch: tried.append(batch) or 100 + 10 * batch, 10_000, 1, 100, 10**9, hint=984)
    assert tried == [1, 984]


def test_without_a_search_one_batch_is_compiled():
    tried = []
    measure.largest(lambda batch: tried.append(batch) or 10 * batch, 1e6, 48, 0, 48)
    assert tried == [48]
    found = {"chips": 4, "memory/chip": 16e9, "memory/train": 4e9, "memory/features": 1e9, "fits": True}
    assert plan.verdict(found) == "fits, 4 GB of 16 GB a chip"
    largest = {"largest/batch_per_chip": 100}
    assert plan.verdict(found | largest) == "fits, 4 GB of 16 GB a chip; at most 400 images a step (100 a chip)"


def test_no_batch_is_larger_than_the_data_set():
    assert measure.largest(lambda batch: 10 * batch, 1e6, 8, 0, 1000) == (1000, 10_000)
    only = {"taken": lambda batch: batch % 48 == 0}
    assert measure.largest(lambda batch: 10 * batch, 1e6, 48, 0, 1000, **only) == (960, 9600)


def test_memory_that_grows_in_steps_is_searched_too():
    most = measure.largest(lambda batch: 100 + 10 * -(-batch // 64) * 64, 10_000, 1, 100, 10**9)[0]
    assert 0.75 * 960 <= most <= 960


# What is refused


def refused(tmp_path, *arguments, **fields):
    config = smaller_config(runtime__devices=0, batch_size=64, **fields)
    plan.run(config, tmp_path, Options(topology=arguments[0]))


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "--job=plan needs --topology"),
        ("v9:2x2", r"--topology='v9:2x2' is unknown. There is, for example: cpu:8, v5e:16x16"),
        ("v5e", "is unknown"),
        ("v5e:4x0", "is unknown"),
        ("cpu:00", "is unknown"),
        ("v5e:32x32", "a v5e slice has at most 256 chips"),
        ("cpu:8,gpu:8", "'gpu:8' is unknown"),
        ("cpu:64", "JAX was started with 8 CPU devices"),
        ("cpu:3", r"config.batch_size=64 must divide by 3 devices; nearest: 63, 66"),
    ],
)
def test_a_topology_that_cannot_be_planned_for_is_named(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        refused(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_says_how_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"v5e:2x2 needs the TPU compiler: pip install 'jaxclust\[plan\]'"):
        refused(tmp_path, "v5e:2x2")


def test_of_several_stages_each_has_its_own_images_and_batches():
    """Of SPICE on CIFAR-10: MoCo's queue is a multiple of its batch, and it does not see the test images."""
    config = from_file(Path("configs/spice.py"), "cifar10")
    infos = plan.images(config)[0]
    assert {name: info.size for name, info in infos.items()} == {"moco": 50_000} | dict.fromkeys(
        ("embed", "self", "reliable", "semi"), 60_000
    )
    assert [name for name in infos if plan.trains(config, name)] == ["moco", "self", "semi"]
    moco = config_lib.for_stage(config, "moco")
    assert [measure.takes(moco, infos["moco"], 128 * times) for times in (1, 3, 5, 200)] == [True, False, True, False]


@whole
def test_what_is_planned_is_kept_when_a_later_stage_is_stopped(tmp_path, monkeypatch, found):
    def first_alone(config, name, info, topologies, search):
        assert search
        if name != "moco":
            raise KeyboardInterrupt
        return {"cpu:8": found}

    monkeypatch.setattr(plan, "plans_of", first_alone)
    with pytest.raises(KeyboardInterrupt):
        plan.run(from_file(Path("configs/spice.py"), "smoke"), tmp_path, Options(topology="cpu:8"))
    assert json.loads((tmp_path / "plan.json").read_text()) == {"moco": {"cpu:8": found}}
    assert "Not planned: embed, reliable" in (tmp_path / "plan.md").read_text()


def test_images_that_are_elsewhere_must_be_described(tmp_path):
    with pytest.raises(ConfigError, match=r"'folder:/elsewhere' is not on this machine; say .*data.num_images"):
        refused(tmp_path, "cpu:8", data__source="folder:/elsewhere")
    config = from_file(Path("configs/deepcluster.py"), "imagenet")
    assert plan.images(config)[0]["deepcluster"][:2] == (1_281_167, (224, 224, 3))
    config = config_lib.base()
    config.data.source, config.data.num_images, config.data.image_size = "tfds:any", 100, 32
    assert plan.images(config)[0]["deepcluster"][:2] == (100, (32, 32, 3))


@pytest.mark.medium
def test_a_batch_that_does_not_fit_says_so_and_what_would(tmp_path, monkeypatch, capsys):
    whole = topology.get

    def small(name):
        return whole(name)._replace(memory=2_000_000)

    monkeypatch.setattr(topology, "get", small)
    refused(tmp_path, "cpu:8", model__width=64)
    found = json.loads((tmp_path / "plan.json").read_text())["deepcluster"]["cpu:8"]
    assert not found["fits"] and found["memory/train"] > 2_000_000
    assert "**does not fit**: config.batch_size needs" in capsys.readouterr().out


@pytest.mark.medium
@pytest.mark.wide
def test_a_compiler_that_refuses_is_believed(tmp_path, monkeypatch, capsys):
    real = measure.train_program

    def refusing(stage):
        if stage.config.batch_size > 16:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 16G"
            )
        return real(stage)

    monkeypatch.setattr(measure, "train_program", refusing)
    refused(tmp_path, "cpu:8")
    found = json.loads((tmp_path / "plan.json").read_text())["deepcluster"]["cpu:8"]
    assert found["largest/batch_per_chip"] == 2 and "Used 20G" in found["refused"]
    assert "**does not fit**: config.batch_size is refused (RESOURCE_EXHAUSTED: Ran out" in capsys.readouterr().out


# Forms


def test_figures_are_shown_in_units_that_read_well():
    assert [size(0), size(999), size(1.5e6), size(16e9), size(4e12)] == ["0 B", "999 B", "1.5 MB", "16 GB", "4 TB"]
    assert [time(5e-6), time(0.02), time(1.5), time(90), time(180), time(7200)] == [
        "5 µs", "20 ms", "1.5 s", "90 s", "3 min", "2 h",
    ]  # fmt: skip
    assert [work(5e6), work(3.95e11), work(2e15)] == ["5 MFLOP", "395 GFLOP", "2 PFLOP"]


def test_a_figure_that_one_topology_lacks_is_a_dash():
    text = table({"cpu:8": {"chips": 8}, "v5e:2x2": {"chips": 4, "train/seconds": 0.02}})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["chips", "8", "4", ""] in rows and ["**a step**", "-", "20 ms", "estimated"] in rows
    assert len({len(line) for line in text.splitlines()}) == 1


# The TPU's own compiler


@pytest.mark.slow
def test_the_digits_are_planned_for_a_pod(tmp_path):
    pytest.importorskip("libtpu", reason="needs the extra `plan`")
    config = smaller_config(runtime__devices=0, batch_size=512)
    runtime.start(config)
    plan.run(config, tmp_path, Options(topology="v5e:2x2,v5e:16x16"))
    both = json.loads((tmp_path / "plan.json").read_text())["deepcluster"]
    for count, hosts in ((4, 1), (256, 64)):
        found = both["v5e:2x2" if count == 4 else "v5e:16x16"]
        assert (found["chips"], found["hosts"], found["fits"]) == (count, hosts, True)
        assert found["train/collective_bytes"] >= 0.95 * found["memory/parameters"]
        assert 0 < found["train/seconds"] < 0.1
    with pytest.raises(ConfigError, match="the TPU compiler refuses it: .*not divisible"):
        topology.get("v5e:3x3")
