"""Weights of torchvision and timm: every tensor in its place, and files of anything else refused in words.

`torch_networks` has the networks by torchvision's names, once on NumPy and once on PyTorch.
"""

import csv
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from small import few_digits, few_vectors, prepared, run, small_config
from torch_networks import FORWARD, Net, TorchNet

from jaxclust import config as config_lib
from jaxclust import models
from jaxclust.errors import ConfigError, DataError
from jaxclust.methods.base import Method, Targets, TrainState
from jaxclust.models import pretrained
from jaxclust.train import donor, torch_file
from jaxclust.train.checkpoint import Snapshot

METHOD = Method(init=None, loss=None, embed=None)

SCALE = 1 / 16
WIDTHS = {"alexnet": 6, "alexnet_owt": 4, "vgg16": 4, "inception_v3": 2}  # of the others 4
SLOW_TO_COMPILE = ("vgg16", "resnet34", "resnet50")
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name == "inception_v3" else pytest.mark.medium) for name in FORWARD
]


def sized(name, **model):
    """The config of a network as small as the file that `drawn` makes."""
    config = config_lib.base()
    flat = "net" in name and "res" not in name or name == "vgg16"
    config.model.update({"name": name, "width": WIDTHS.get(name, 4), "dim": 10 if flat else 0, **model})
    return config_lib.validate(config)


def images(name, batch=2):
    side = 80 if name == "inception_v3" else 67
    return np.random.default_rng(1).normal(size=(batch, 3, side, side - 4)).astype(np.float32)


@functools.cache
def drawn(name):
    """Tensors of a small network by torchvision's names, and the feature of the images."""
    net = Net(SCALE, 10)
    feature = FORWARD[name](net, images(name))
    return net.tensors, feature


def saved(tensors, path):
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture
def file_of(tmp_path):
    return lambda name: saved(drawn(name)[0], tmp_path / f"{name}.safetensors")


def shapes(config, x):
    variables = jax.eval_shape(models.get(config).init, jax.random.key(0), x.transpose(0, 2, 3, 1))
    return {part: variables.get(part, {}) for part in ("params", "batch_stats")}


def leaves(variables):
    return {
        f"{layer}.{kind}": leaf
        for part in variables.values()
        for layer, of in part.items()
        for kind, leaf in of.items()
    }


def loaded(config, path, x):
    """Variables of the network from a file, and what was matched."""
    variables = shapes(config, x)
    sizes = {leaf: array.shape for leaf, array in leaves(variables).items()}
    weights = pretrained.open_weights(path)
    matched = pretrained.match(config, weights, sizes)
    arrays = pretrained.load(config.model.name, weights, matched, sizes)
    filled = {
        part: {layer: {kind: arrays[f"{layer}.{kind}"] for kind in of} for layer, of in layers.items()}
        for part, layers in variables.items()
    }
    return filled, matched


def parity(net, config, path, x):
    """The largest difference of features, in units of the largest feature."""
    variables, _ = loaded(config, path, x)
    found = jax.jit(models.get(config).apply)(variables, x.transpose(0, 2, 3, 1))
    return np.abs(np.asarray(found) - net).max() / np.abs(net).max()


@pytest.mark.parametrize("name", NAMES)
def test_the_network_says_what_torchvision_s_says(name, file_of):
    tensors, feature = drawn(name)
    assert feature.std(axis=0).max() > 1e-3 * np.abs(feature).max()  # images differ, by far more than is allowed
    assert parity(feature, sized(name), file_of(name), images(name)) < 1e-5


@pytest.mark.parametrize("name", FORWARD)
def test_every_leaf_takes_one_tensor_and_what_is_left_over_is_the_classifier(name, file_of):
    tensors, x = drawn(name)[0], images(name)
    variables, matched = loaded(sized(name), file_of(name), x)
    head = "classifier.6" if f"{name[:3]}" in ("ale", "vgg") else "fc"
    counters = {tensor for tensor in tensors if tensor.endswith("num_batches_tracked")}
    assert set(matched.unused) == {f"{head}.weight", f"{head}.bias"} | counters
    assert len(set(matched.used.values())) == len(matched.used) == len(tensors) - len(matched.unused)
    assert matched.missing == []
    for leaf, array in leaves(variables).items():
        tensor = tensors[matched.used[leaf]]
        assert array.size == tensor.size and np.sort(array.ravel()).tolist() == np.sort(tensor.ravel()).tolist(), leaf
        if array.ndim == 4:
            np.testing.assert_array_equal(array[0, -1, :, 1], tensor[1, :, 0, -1])


def test_a_flattened_map_is_read_in_our_order():
    rng = np.random.default_rng(0)
    maps, kernel = rng.normal(size=(1, 7, 7, 5)), rng.normal(size=(3, 5 * 49))
    expected = maps.transpose(0, 3, 1, 2).reshape(1, -1) @ kernel.T
    np.testing.assert_allclose(maps.reshape(1, -1) @ pretrained.turned(kernel, (5 * 49, 3), 7), expected)
    as_timm = kernel.reshape(3, 5, 7, 7)
    np.testing.assert_array_equal(pretrained.turned(as_timm, (5 * 49, 3), 7), pretrained.turned(kernel, (5 * 49, 3), 7))


def test_names_of_timm_and_of_parallel_training_are_the_same_weights(tmp_path):
    tensors, x = drawn("vgg16")[0], images("vgg16")
    timm = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2", "classifier.6": "head.fc"}
    other = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        side = {"classifier.0": 7, "classifier.3": 1}.get(module, 0) if leaf == "weight" else 0
        own = tensor.reshape(len(tensor), -1, side, side) if side else tensor
        other[f"module.{timm.get(module, module)}.{leaf}"] = own
    expected, _ = loaded(sized("vgg16"), saved(tensors, tmp_path / "a.safetensors"), x)
    found, matched = loaded(sized("vgg16"), saved(other, tmp_path / "b.safetensors"), x)
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
    assert len(matched.unused) == 2 + 13


def test_half_precision_is_read_and_what_is_not_finite_is_refused(tmp_path):
    tensors, x = dict(drawn("resnet18")[0]), images("resnet18")
    halves = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    found, _ = loaded(sized("resnet18"), saved(halves, tmp_path / "half.safetensors"), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    tensors["layer3.1.bn2.running_var"] = np.full_like(tensors["layer3.1.bn2.running_var"], np.nan)
    with pytest.raises(DataError, match=r"layer3\.1\.bn2\.running_var has numbers that are not finite"):
        loaded(sized("resnet18"), saved(tensors, tmp_path / "bad.safetensors"), x)


# What does not fit


@pytest.fixture(scope="module")
def as_published(tmp_path_factory):
    """Files with the tensors of whole networks, all zero, by the name of the network."""
    folder = tmp_path_factory.mktemp("published")

    @functools.cache
    def file(name):
        shape_of = {}
        config = config_lib.base()
        config.model.name = name
        for leaf, array in leaves(shapes(config, images(name, 1))).items():
            tensor, size = pretrained.wanted(name, leaf, array.shape)
            shape_of[tensor] = size
        tensors = {tensor: np.broadcast_to(np.float16(0), size) for tensor, size in shape_of.items()}
        return saved(tensors, folder / f"{name}.safetensors")

    return file


def refused(name, path, **model):
    config = config_lib.base()
    config.model.update({"name": name, **model})
    x = images(name, 1)[:, : model.pop("inputs", 3)]
    sizes = {leaf: array.shape for leaf, array in leaves(shapes(config, x)).items()}
    with pytest.raises(ConfigError) as error:
        pretrained.match(config, pretrained.open_weights(path), sizes)
    return str(error.value)


def test_a_file_of_another_network_names_the_first_difference_and_the_network(as_published, tmp_path):
    said = refused("resnet34", as_published("resnet18"))
    assert "layer1.2.conv1.weight is missing in" in said and said.endswith(
        "looks like resnet18: config.model.name=resnet18"
    )
    said = refused("resnet18", as_published("resnet34"))
    assert "layer1.2.bn1.bias" in said and "fills nothing of config.model.name='resnet18'" in said
    assert said.endswith("the file looks like config.model.name=resnet34")
    assert "looks like alexnet_owt: config" in refused("alexnet", as_published("alexnet_owt"))
    said = refused("resnet50", as_published("resnet18"))
    assert "layer1.0.conv1.weight is (64, 64, 3, 3)" in said and "this config makes (64, 64, 1, 1)" in said
    strange = saved({"blocks.0.attn.qkv.weight": np.zeros((6, 2))}, tmp_path / "vit.safetensors")
    said = refused("resnet18", strange)
    assert "conv1.weight is missing" in said and "of none of the networks that can be filled: alexnet, " in said


def test_a_deeper_relative_that_is_none_of_ours_is_refused(as_published, tmp_path):
    from safetensors.numpy import load_file

    deeper = load_file(as_published("resnet50"))
    deeper["layer3.6.conv1.weight"] = np.zeros((256, 1024, 1, 1), np.float16)
    said = refused("resnet50", saved(deeper, tmp_path / "resnet101.safetensors"))
    assert "layer3.6.conv1.weight" in said and "looks like a deeper relative of it" in said


@pytest.mark.parametrize(
    ("name", "model", "words"),
    [
        ("resnet18", {"width": 16}, "config.model.width=0, not 16"),
        ("resnet18", {"stem": "small"}, "config.model.stem='imagenet', not 'small'"),
        ("vgg16", {"dim": 20}, "config.model.dim=0, not 20"),
        ("resnet18", {"inputs": 1}, "the file sees colours: config.data.channels=3 and config.model.sobel=False"),
        ("alexnet", {"sobel": True}, "the file sees colours: config.data.channels=3 and config.model.sobel=False"),
        ("convnet", {}, "no such weights for config.model.name='convnet'; there are for alexnet, alexnet_owt, vgg16, "),
    ],
)
def test_settings_that_make_another_network_are_named(name, model, words, as_published):
    assert words in refused(name, as_published(name if name in pretrained.MODULES else "resnet18"), **model)


def test_a_dense_feature_behind_the_mean_is_drawn_and_said(file_of):
    config, x = sized("resnet18", dim=7), images("resnet18")
    sizes = {leaf: array.shape for leaf, array in leaves(shapes(config, x)).items()}
    weights = pretrained.open_weights(file_of("resnet18"))
    matched = pretrained.match(config, weights, sizes)
    assert sorted(matched.missing) == ["feature.bias", "feature.kernel"]
    said = torch_file.summary(config, weights, matched)
    assert "100 of its 122 tensors fill resnet18; unused: fc.bias, fc.weight, and 20 counters of batches" in said
    assert "as it was drawn: feature." in said
    assert "config.data.mean=(0.485, 0.456, 0.406)" in said  # and here it is 0.5
    config.data.mean, config.data.std = pretrained.IMAGENET
    assert "note" not in torch_file.summary(config, weights, matched)


def test_inception_knows_images_from_minus_one_to_one(file_of):
    config = sized("inception_v3")
    weights = pretrained.open_weights(file_of("inception_v3"))
    assert "note" not in torch_file.summary(config, weights, pretrained.Matched({}, [], []))
    config.data.mean, config.data.std = pretrained.IMAGENET
    assert "config.data.mean=(0.5,)" in torch_file.summary(config, weights, pretrained.Matched({}, [], []))


def test_the_scaling_of_the_published_dscl_is_a_mean_and_a_deviation():
    pixels = np.linspace(0, 1, 5)[:, None]
    mean, std = map(np.array, pretrained.IMAGENET)
    expected = pixels * (std / 0.5) + (mean - 0.5) / 0.5  # section 5.5 of its specification
    config = config_lib.base()
    config.data.mean, config.data.std = (0.0655, 0.1964, 0.4178), (2.1834, 2.2321, 2.2222)
    data = config_lib.validate(config).data
    np.testing.assert_allclose((pixels - data.mean) / data.std, expected, atol=1e-4)


# Files


@pytest.mark.parametrize("damage", ["empty", "random", "truncated", "header"])
def test_a_damaged_file_is_refused(damage, file_of):
    path = file_of("resnet18")
    whole = path.read_bytes()
    changed = {"empty": b"", "random": b"\x93NUMPY" * 99, "truncated": whole[:-1000], "header": b"\xff" * 8 + whole[8:]}
    path.write_bytes(changed[damage])
    with pytest.raises(DataError, match=r"resnet18.safetensors' is no whole file of safetensors"):
        pretrained.open_weights(path)


def test_files_that_are_none_of_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no file .*nothing.safetensors"):
        pretrained.open_weights(tmp_path / "nothing.safetensors")
    (tmp_path / "weights.pkl").touch()
    with pytest.raises(ConfigError, match=r"weights.pkl' must end in \.safetensors, \.pth, "):
        pretrained.open_weights(tmp_path / "weights.pkl")
    with pytest.raises(DataError, match="holds no tensor"):
        pretrained.open_weights(saved({}, tmp_path / "none.safetensors"))


def test_without_torch_its_files_are_refused_with_a_way_out(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"pip install torch\).*safetensors.torch.save_file"):
        pretrained.open_weights(tmp_path / "weights.pth")


# With PyTorch


@pytest.mark.medium
@pytest.mark.parametrize("name", FORWARD)
def test_the_network_says_what_pytorch_says(name, tmp_path):
    torch = pytest.importorskip("torch")
    net, x = TorchNet(SCALE, 10), images(name)
    with torch.no_grad():
        feature = FORWARD[name](net, torch.from_numpy(x)).numpy()
    content = {key: torch.from_numpy(np.array(value)) for key, value in net.tensors.items()}
    torch.save({"epoch": 3, "arch": name, "state_dict": content}, tmp_path / "weights.pth")
    assert parity(feature, sized(name), tmp_path / "weights.pth", x) < 1e-4


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_of_pytorch_that_would_run_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "x": Hostile(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(DataError, match="bad.pth' is damaged, or holds more than tensors"):
        pretrained.open_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bad.pth").read_bytes()[:200])
    with pytest.raises(DataError, match="cut.pth' is damaged"):
        pretrained.open_weights(tmp_path / "cut.pth")


# As the body of a stage

TINY = {"model__name": "resnet18", "model__width": 4, "model__dim": 0}


def test_every_copy_of_the_body_is_filled(tmp_path, file_of):
    config, x = sized("resnet18"), images("resnet18")
    body = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), shapes(config, x))
    top = {"kernel": jnp.zeros((32, 2))}
    extra = {"batch_stats": body["batch_stats"], "key": {"body": body["params"], "batch_stats": body["batch_stats"]}}
    params = {"body": body["params"], "top": top}
    state = TrainState(jnp.zeros(()), params, extra, {"mu": params}, {})
    first = Snapshot(state, Targets(*4 * [np.zeros(1)]))
    file = torch_file.File(pretrained.open_weights(file_of("resnet18")), config, "moco", tmp_path)
    file.check(first, METHOD)
    state = file.give(first).state
    kernel = drawn("resnet18")[0]["layer3.0.downsample.0.weight"].transpose(2, 3, 1, 0).astype(jnp.bfloat16)
    variance = drawn("resnet18")[0]["layer4.1.bn1.running_var"].astype(jnp.bfloat16)
    for of in (state.params, state.extra["key"]):
        np.testing.assert_array_equal(of["body"]["conv4_1_skip_conv"]["kernel"], kernel)
    for of in (state.extra, state.extra["key"]):
        np.testing.assert_array_equal(of["batch_stats"]["conv5_2_1_norm"]["var"], variance)
    assert not any(leaf.any() for leaf in jax.tree.leaves((state.params["top"], state.opt_state)))
    with (tmp_path / "weights-moco.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [row["state"] for row in rows].count("used") == 100 and len(rows) == 122
    assert {"tensor": "fc.bias", "shape": "10", "fills": "", "state": "unused"} in rows
    assert {"tensor": "bn1.weight", "shape": "4", "fills": "conv1_norm.scale", "state": "used"} in rows


def test_the_first_stage_takes_it_or_the_one_that_says_so(tmp_path, file_of):
    config = small_config(stages="first,second", init_from=f"torch:{file_of('resnet18')}", **TINY)
    assert donor.find(config, "first", tmp_path) is not None
    assert donor.find(config, "second", tmp_path) is None
    with config.unlocked():
        config.stage.second = {"init_from": config.init_from}
    assert donor.find(config, "second", tmp_path) is not None
    assert "checkpoints/first" in donor.files(config, "second", tmp_path)


def test_stages_take_it_for_the_body_of_one_that_is_left_out(tmp_path, file_of):
    path = f"torch:{file_of('resnet18')}"
    config = small_config(stages="moco,embed,self", init_from=path, **TINY)
    with config.unlocked():
        config.stage = {name: {"init_from": "@moco"} for name in ("embed", "self")}
        config.stage.reliable = {"init_from": "@self", "method": "reliable"}
    assert donor.body(config, "self", tmp_path) == tmp_path / "checkpoints" / "moco"
    config.stages = "embed,self"
    assert [donor.find(config, name, tmp_path).name() for name in ("embed", "self")] == [path, path]
    config.stages = "reliable"
    with pytest.raises(ConfigError, match=r"is a body, and stage 'reliable' begins with heads and selected too"):
        donor.find(config, "reliable", tmp_path).check(None, METHOD._replace(given=("heads", "selected")))


def test_vectors_and_networks_of_a_method_s_own_take_no_weights(tmp_path, file_of):
    path = f"torch:{file_of('resnet18')}"
    with pytest.raises(ConfigError, match="holds vectors, which pass through no body"):
        prepared(small_config(init_from=path, freeze_body=True, **TINY), tmp_path, few_vectors())
    config = small_config(method="cae", stages="cae", init_from=path, clustnet__encoder__layers=2, **TINY)
    with config.unlocked():
        config.clustnet.encoder.update({"kernel": 3, "pool": 1, "pool_out": 1})
    with pytest.raises(
        ConfigError, match=r"output.bias of config.method='cae' is no layer of config.model.name='resnet18'"
    ):
        prepared(config, tmp_path, few_digits(40))


@pytest.mark.wide
def test_a_run_clusters_the_features_of_a_file(tmp_path, file_of, capsys):
    path, workdir = file_of("alexnet_owt"), tmp_path / "run"
    settings = ["--config.model.name=alexnet_owt", "--config.model.width=4", "--config.model.dim=10"]
    settings += ["--config.data.channels=3", "--config.model.blocks=2"]
    settings += [f"--config.init_from=torch:{path}", "--config.freeze_body=True", "--config.rounds=1"]
    arguments = ("--config=configs/deepcluster.py:smoke", f"--workdir={workdir}", *settings)
    assert run(*arguments, "--config.model.width=5") == 2
    assert "features.0.bias is (4,) in" in capsys.readouterr().err and not workdir.exists()
    assert run(*arguments) == 0
    said = f"{path}: 14 of its 16 tensors fill alexnet_owt; unused: classifier.6.bias, classifier.6.weight"
    assert said in capsys.readouterr().out
