"""docs/migrating.md: every flag and setting of the originals stands in it once, and what it says works."""

import ast
import functools
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxclust import config as config_lib
from jaxclust import main, models, plugins

TEXT = Path("docs/migrating.md").read_text()
BASE = "--config=configs/deepcluster.py"
OF_SPICE = "--config=configs/spice.py:cifar10"
CLUSTNET_CONFIG = "--config=configs/clustnet.py:mnist"
OF_CLUSTNET = ("ClustNet, `trainVal.py`", "ClustNet's script of results")
OF_DSCL = "--config=configs/dscl.py:seed"
OWN = {
    f"{BASE}:v2": r"\.(views\.(large|small)|optimizer\.prototypes)\.",
    OF_SPICE: r"\.(stage|views\.query)\.",
    OF_DSCL: r"config\.(steps=|dscl\.)",
}

FLAGS = [
    "DIR", "--arch", "-a", "--sobel", "--clustering", "--nmb_cluster", "--k", "--lr", "--wd", "--reassign", "--workers",
    "--epochs", "--start_epoch", "--batch", "--momentum", "--resume", "--checkpoints", "--seed", "--exp", "--verbose",
]  # fmt: skip
SETTINGS = [
    "cfg.py", "train.py", "pred.py", "train_cuda.py", "pred_cuda.py", "ClusterDataset", "VGG16", "num_classes", "sobel",
    "exp_lr_scheduler", "ReduceOnPlateau", "PIC", "detach",
]  # fmt: skip
UAD = [
    "main_promoted2.0.py", "main_promoted2.1.py", "--mode", "--low_layers", "--low_grid", "--low_pool", "--fusion_norm",
    "--fusion_pca", "--low_weight", "--low_dim", "--uncertainty", "--fuzzifier", "--num_nearest", "--weight_strength",
    "--weight_power", "--weight_max", "--weight_direction", "--weight_warmup", "--loss_norm",
]  # fmt: skip
V2 = [
    "main_deepclusterv2.py", "--data_path", "--nmb_crops", "--size_crops", "--min_scale_crops", "--max_scale_crops",
    "--nmb_prototypes", "--temperature", "--feat_dim", "--hidden_mlp", "--base_lr", "--final_lr", "--warmup_epochs",
    "--start_warmup", "--freeze_prototypes_niters", "--checkpoint_freq", "--dump_path", "--dist_url", "--world_size",
    "--rank", "--local_rank", "--sync_bn", "--syncbn_process_group_size",
]  # fmt: skip
PROBE = ["eval_linear.py", "--data", "--model", "--conv", "--tencrops", "--batch_size", "--weight_decay"]

SPICE = [
    "config_file", "dataset_folder", "pretrained_self_supervised_model", "resume", "save_folder", "logs_folder",
    "save-freq", "epochs", "start-epoch", "lr", "wd", "batch_size", "target_sub_batch_size", "train_sub_batch_size",
    "num_repeat", "num_head", "num_cluster", "center_ratio", "batch_size_test", "img_size", "mean", "std", "--moco-dim",
    "--moco-k", "--moco-m", "--moco-t", "--mlp", "--aug-plus", "--cos", "--schedule", "show_images",
    "num_train", "num_trans_aug", "att_*", "sim_center_ratio", "ims_per_batch", "aspect_ratio_grouping", "num_labels",
]  # fmt: skip
CLUSTNET = [
    "trainVal.py", "-c", "dataset", "exp_id", "ind_id", "seed", "epochs", "batch_size", "test_batch_size", "lr",
    "lr_cl", "momentum", "optim", "batch_period", "clust", "decision_clu", "noise", "clnblayers", "clker", "clchan",
    "clmaxpoolsize", "clmaxpoolsize_out", "cldrop", "clnb_denselayers", "clsize_denselayers", "denblayers", "deker",
    "dechan", "demaxpoolsize", "demaxpoolsize_out", "dedrop", "avpool", "denb_denselayers", "desize_denselayers",
    "encnblay", "encchan", "encker", "encmaxpl1", "encmaxpl2", "encdrop", "enchidd_repr_size", "pretrain",
    "pretrain_cae", "full_clust", "clu_train_mode", "rand_prop_val_sched", "entweig", "clustdivers", "filter_dis",
    "featmap_entr", "featmap_var", "init", "init_clu", "init_enc", "init_pos", "init_neg", "noise_init",
    "reverse_target", "clbn", "debn", "cl_to_find_size", "harddecision", "log_interval", "num_workers", "no_cuda",
    "cae_last_relu", "csv_extra", "csv_every", "--root", "--weig", "--elementwise", "--spar", "--acc_evol",
    "--nets_to_remove", "--failurecases", "--cludis", "--feat_map_var", "--stat", "--tsne", "--train",
    "encoder_grad", "combine", "temperature", "norm", "bn_selected_only", "--overwrite", "--layer", "cae1_3.jpg",
    "cae1_3_epoch2_Rec.jpg", "cae1_epoch5",
]  # fmt: skip
PICTURES = ["gradient_ascent.py", "--idim", "--niter", "--step", "--sig", "activ-retrieval.py", "--count"]


DSCL = [
    "--data_dir", "--dataset", "--width_size", "--channels", "--label_size", "--vector_size", "--large_batch_size",
    "--small_batch_size", "--large_batch_epoch", "--dropout_rate", "--fine_tune", "test.py", "--save_as_numpy", "--eps",
    "CustomDataset", "car_ims_cropped", "train.py --lr", "train.py --model", "test.py --k",
    "test.py --large_batch_epoch", "fc-<step>", "opt.txt", "loss_log.txt",
    "--display_winsize", "--display_id", "--display_port", "--display_single_pane_ncols", "--plot_freq",
    "--print_small_batch", "--num_preprocess_workers", "--gpu_ids", "--ckpt_dir", "--test_dir",
]  # fmt: skip


class Row(NamedTuple):
    section: str
    cells: dict[str, str]  # by the header of the table


def cells(line):
    """Of a line of a table; a pipe after a backslash belongs to its cell."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def read_tables(text):
    section, header = "", []
    for line, following in zip(lines := text.splitlines(), [*lines[1:], ""], strict=True):
        if line.startswith("## "):
            section = line[3:].strip()
        if not line.lstrip().startswith("|"):
            header = []
        elif not header:
            header = cells(line)
            assert re.fullmatch(r"[|: -]+", following), f"{line!r} begins a table and no rule follows"
        elif not re.fullmatch(r"[|: -]+", line):
            assert len(cells(line)) == len(header), f"{line!r} has not the columns {header}"
            yield Row(section, dict(zip(header, cells(line), strict=True)))


def spans(text):
    return re.findall(r"`([^`]+)`", text)


def arguments(text):
    """The flags of ours in the code spans of `text`, as the shell would give them."""
    return [
        argument for span in spans(text) if re.match("--(config|job|workdir)", span) for argument in shlex.split(span)
    ]


def overrides(text):
    """(setting, value as written) of each override in `text`."""
    found = [a for a in arguments(text) if a.startswith("--config.")]
    return [tuple(a.removeprefix("--config.").split("=", 1)) for a in found]


def parse(arguments, base=BASE):
    """The command; settings that only the second version, SPICE or DSCL has need its config."""
    for config, own in OWN.items():
        base = config if any(re.search(own, a) for a in arguments) else base
    first = [] if any(a.startswith("--config=") for a in arguments) else [base]
    return main.parse(["jaxclust", *first, *arguments])


def read_value(name, text):
    """What `text` means for a setting, of the type of its default."""
    kind = type(config_lib.field_of(name).default)
    if kind in (bool, tuple):
        return ast.literal_eval(text)
    return kind(text)


def words(text):
    return re.findall(r"[\w.\-]+", text.lower())


ROWS = list(read_tables(TEXT))
WITH_OVERRIDES = [row for row in ROWS if "ours" in row.cells and overrides(row.cells["ours"])]
APPLIED = [row for row in ROWS if {"default", "ours"} <= row.cells.keys()]


def base_of(row):
    configs = {
        "DeepCluster-v2, `main_deepclusterv2.py`": f"{BASE}:v2",
        "SPICE": OF_SPICE,
        "DSCL, `train.py` and `test.py`": OF_DSCL,
    }
    return {**configs, **dict.fromkeys(OF_CLUSTNET, CLUSTNET_CONFIG)}.get(row.section, BASE)


@functools.cache
def plain(base):
    """The settings of a config without overrides."""
    return dict(config_lib.flatten(parse([], base).config))


def title(row):
    return row.cells["original"].replace("`", "")


def test_the_tables_are_all_read():
    assert len(ROWS) > 40 and len(WITH_OVERRIDES) > 30
    assert len({row.section for row in ROWS}) == 13
    lines = [line for line in TEXT.splitlines() if line.startswith("|")]
    assert len(lines) == len(ROWS) + 2 * 13, "each table has a header and a rule"


def test_every_flag_and_setting_of_the_originals_stands_in_one_row():
    """Keys of ClustNet may be called as those of SPICE are; else a name is in no second row."""
    of_clustnet = Counter(name for row in ROWS if row.section in OF_CLUSTNET for name in spans(row.cells["original"]))
    names = Counter(name for row in ROWS for name in spans(row.cells["original"])) - of_clustnet
    known = [*FLAGS, *SETTINGS, *UAD, *V2, *PROBE, *PICTURES, *SPICE, *DSCL]
    assert {name: names[name] for name in known} == dict.fromkeys(known, 1)
    assert {name: max(of_clustnet[name], names[name]) for name in CLUSTNET} == dict.fromkeys(CLUSTNET, 1)
    assert max(names.values()) == max(of_clustnet.values()) == 1


@pytest.mark.parametrize("row", WITH_OVERRIDES, ids=title)
def test_the_overrides_of_a_row_give_the_values_that_it_says_and_change_nothing_else(row):
    said = overrides(row.cells["ours"])
    before = plain(base_of(row))
    after = dict(config_lib.flatten(parse(arguments(row.cells["ours"]), base_of(row)).config))
    assert len(dict(said)) == len(said)
    for name, text in said:
        value = read_value(name, text)
        assert after[name] == value and type(after[name]) is type(value), name
    assert {name for name in after if after[name] != before[name]} <= dict(said).keys()
    for line in config_lib.left_alone(parse(arguments(row.cells["ours"]), base_of(row)).config, dict(said)):
        stages = re.findall(r"config\.(stage\.\w+)", line)
        assert stages and all(stage in row.cells["note"] for stage in stages), f"the row does not say: {line}"


@pytest.mark.parametrize("row", [row for row in WITH_OVERRIDES if row.cells["default"] != "–"], ids=title)
def test_overrides_carry_the_default_of_the_original_or_switch_on_what_was_off(row):
    said, default = overrides(row.cells["ours"]), words(row.cells["default"])
    if default == ["off"]:
        assert any(read_value(name, text) != config_lib.field_of(name).default for name, text in said)
    else:
        units = {"epoch", "epochs", "rounds", "steps"}
        assert {word for _, text in said for word in words(text)} - units == set(default)


def test_the_overrides_of_all_flags_work_together():
    section = "Flags of `main.py`"
    rows = [row for row in WITH_OVERRIDES if row.section == section or row.section.startswith("Fixed in")]
    said = [override for row in rows for override in overrides(row.cells["ours"])]
    assert len(dict(said)) == len(said) > 30, "two rows say the same setting"
    after = dict(config_lib.flatten(parse([f"--config.{name}={text}" for name, text in said]).config))
    assert all(after[name] == read_value(name, text) for name, text in said)


def test_rows_that_are_applied_have_something_to_apply_and_no_two_the_same():
    assert not [title(row) for row in APPLIED if not arguments(row.cells["ours"])]
    said = Counter(frozenset(arguments(row.cells["ours"])) for row in APPLIED)
    assert max(said.values()) == 1
    notes = Counter(row.cells["note"] for row in ROWS if row.cells.get("note"))
    assert max(notes.values()) == 1


def test_retired_flags_say_why_and_files_say_where():
    others = {row.section for row in ROWS if row not in APPLIED}
    assert others == {"Files", "Retired"}
    for row in ROWS:
        if row.section == "Retired":
            assert len(words(row.cells["why"])) >= 5 and not arguments(row.cells["why"])
        if row.section == "Files":
            assert spans(row.cells["ours"]), title(row)


def test_later_work_is_named_without_a_flag():
    section = TEXT.partition("\n## Not yet\n")[2].partition("\n## ")[0]
    assert section.strip() and not spans(section)


@pytest.mark.wide
def test_every_override_in_the_text_is_valid():
    said = [span for span in spans(TEXT.replace("```", "")) if span.startswith("--config.")]
    assert len(said) > 80
    for span in said:
        parse(shlex.split(span))


def test_jobs_networks_and_methods_that_the_text_names_exist():
    named = {override for row in WITH_OVERRIDES for override in overrides(row.cells["ours"])}
    named |= {("job", job) for job in re.findall(r"--job=(\w+)", TEXT)}
    known = {
        "job": plugins.names("jaxclust.jobs"),
        "model.name": models.networks(),
        "method": plugins.names("jaxclust.methods"),
    }
    for setting, names in known.items():
        values = {value for name, value in named if name == setting}
        assert values and values <= set(names), values


def test_presets_are_what_the_text_says():
    presets = set(re.findall(r"configs/deepcluster\.py:(\w+)", TEXT)) | set(re.findall(r"`:(\w+)`", TEXT))
    assert presets == {"imagenet", "imagenette", "cifar10", "folder", "v2"}
    for name in re.findall(r"configs/spice\.py:(\w+)", TEXT):
        config_lib.from_file(Path("configs/spice.py"), name)
    configs = {name: config_lib.from_file(Path("configs/deepcluster.py"), name) for name in presets}
    published, users = configs["imagenet"], configs["imagenette"]
    assert (published.model.name, published.model.sobel, published.cluster.k) == ("alexnet", True, 10_000)
    assert (users.model.name, users.optimizer.body.name, users.optimizer.top.name) == ("vgg16", "adam", "sgd")


def test_the_example_is_a_command():
    block = re.search(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)[1].replace("\\\n", " ")
    there, ours = (shlex.split(line, comments=True) for line in block.splitlines())
    assert there[:2] == ["python", "main.py"] and {a for a in there if a.startswith("--")} <= set(FLAGS)
    command = main.parse(["jaxclust", *ours[3:]])
    assert (command.config.cluster.k, command.config.data.source) == (500, "folder:PHOTOS")
    assert command.config.model.sobel and str(command.workdir) == "EXP"
