"""Settings: each has a default that passes its own check, a reader, and an error that helps."""

import ast
import math
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import prepared, small_config

from jaxclust import config as c
from jaxclust import kinds
from jaxclust.errors import ConfigError
from jaxclust.main import parse
from jaxclust.train.lengths import due, lengths


def load(path, variant):
    return runpy.run_path(path)["get_config"](variant)


def test_every_field_is_read_somewhere():
    text = "\n".join(path.read_text() for path in Path("jaxclust").rglob("*.py") if "fields" not in path.parts)
    names = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
    names |= {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    unread = [name for name, _ in c.flatten(c.base()) if name.rpartition(".")[2] not in names]
    assert not unread


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("cluster.k", 1, "at least 2"),
        ("cluster.k", "many", "int"),
        ("seed", -1, "from 0 to"),
        ("data.channels", 2, "0, 1 or 3"),
        ("data.std", (0.0,), "from 0.001 to 1"),
        ("data.mean", (0.5, 0.5), "one number or three"),
        ("views.train.erase_fill", (0.5, 0.5), "one number or three"),
        ("refresh_every", "1 fortnight", "duration"),
        ("refresh_every", "-1 epochs", "duration"),
        ("optimizer.body.name", "sdg", "one of adam, sgd"),
        ("cluster.whiten", 1, "bool"),
        ("batch_size", True, "int"),
        ("optimizer.body.lr", math.nan, "at least 0"),
    ],
)
def test_a_wrong_value_names_field_value_and_what_is_allowed(name, value, words):
    config = c.base()
    node = config
    *path, last = name.split(".")
    for key in path:
        node = node[key]
    with node.ignore_type():
        node[last] = value
    with pytest.raises(ConfigError) as error:
        c.validate(config)
    assert f"config.{name}={value!r}" in str(error.value) and words in str(error.value)


def test_unknown_keys_name_the_nearest_field():
    config = c.base()
    with config.unlocked():
        config.cluster.kk = 3
    with pytest.raises(ConfigError, match=r"config.cluster.kk is unknown; did you mean 'cluster.k'\?"):
        c.validate(config)
    with pytest.raises(ConfigError, match=r"variant 'mnits' is unknown; did you mean 'mnist'\?"):
        load("configs/deepcluster.py", "mnits")


def test_rounds_and_steps_cannot_both_say_the_length():
    config = c.base()
    config.steps = 5
    with pytest.raises(ConfigError, match="only one can say how long"):
        c.validate(config)


def test_a_stage_sees_the_whole_config_with_its_section_laid_over():
    config = c.base()
    with config.unlocked():
        config.stage.first = {"rounds": 3, "optimizer": {"body": {"lr": 0.5}}, "views": {"key": {"flip": 0.5}}}
    c.validate(config)
    stage = c.for_stage(config, "first")
    assert (stage.rounds, stage.optimizer.body.lr, stage.views.key.flip) == (3, 0.5, 0.5)
    assert stage.optimizer.body.name == config.optimizer.body.name
    assert c.for_stage(config, "second").rounds == config.rounds
    with config.unlocked():
        config.stage.first.optimizer.body.learning_rate = 1.0
    with pytest.raises(ConfigError, match="stage.first.optimizer.body.learning_rate"):
        c.validate(config)


def test_a_setting_of_all_stages_may_be_given_to_one():
    def read(*flags):
        return parse(["jaxclust", "--config=configs/spice.py", *flags]).config

    config = read("--config.stage.self.spice.mstep_bn=batch", "--config.stage.reliable.reliable.score=0.5")
    assert (config.stage.self.spice.mstep_bn, config.spice.mstep_bn) == ("batch", "frozen")
    assert c.for_stage(config, "reliable").reliable.score == 0.5 and list(config.stage.self.spice) == ["mstep_bn"]
    for flag, words in (
        ("stage.self.spice.mstepbn=batch", "config.stage.self.spice.mstepbn is unknown"),
        ("stage.selv.rounds=3", "config.stage.selv.rounds is unknown; did you mean 'stage.self.rounds'"),
        ("stage.self.spice.num_head=many", "many"),
        ("stage.self.spice.num_head=0", "num_head=0 must be"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(f"--config.{flag}")


def test_what_stages_do_not_take_of_a_setting_is_said():
    config = small_config(stages="moco,embed,self", batch_size=32)
    with config.unlocked():
        config.stage = {"moco": {"batch_size": 64}, "self": {"batch_size": 32, "rounds": 3}, "semi": {"seed": 1}}
    (line,) = c.left_alone(config, ["batch_size", "seed", "stage.moco.batch_size"])
    assert line == "note: config.batch_size=32 is not for all stages: config.stage.moco.batch_size=64"
    (line,) = c.left_alone(config, ["rounds"])
    assert line.endswith("is not for all stages: config.stage.self.rounds=3")
    config.stages = "embed,semi"
    assert c.left_alone(config, ["batch_size", "rounds"]) == []
    assert c.left_alone(config, ["seed"]) == ["note: config.seed=0 is not for all stages: config.stage.semi.seed=1"]


def test_an_error_says_which_settings_a_stage_has_for_itself():
    config = c.base()
    with config.unlocked():
        config.stage.first = {"batch_size": 1500, "optimizer": {"body": {"lr": 0.5}}}
    said, more = (
        "config.batch_size=1500 images, and there are 300",
        r" \(for this stage: config.stage.first.batch_size\)",
    )
    with pytest.raises(ConfigError, match=f"^{said}{more}$"), c.naming_section(config, "first"):
        raise ConfigError(said)
    others = "config.eval_batch_size=1", "config.optimizer.body.lrs=1"
    for name, words in (("second", said), *(("first", other) for other in others)):
        with pytest.raises(ConfigError, match=f"^{words}$"), c.naming_section(config, name):
            raise ConfigError(words)


def test_json_round_trip(tmp_path):
    config = load("configs/deepcluster.py", "folder")
    with config.unlocked():
        config.views.key = config.views.train.copy_and_resolve_references()
        config.stage.first = {"rounds": 3}
    c.save(config, tmp_path / "config.json")
    assert c.load(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text('{"sede": 1}')
    with pytest.raises(ConfigError, match="config.sede"):
        c.load(tmp_path / "config.json")


def test_differences_leave_out_what_may_change_between_two_starts():
    old, new = c.base(), c.base()
    new.rounds, new.runtime.devices, new.init_from, new.data.source = 99, 4, "elsewhere", "digits"
    assert c.differences(old, new) == []
    new.optimizer.body.lr = 0.5
    new.data.source = "folder:photos"
    assert [name for name, _, _ in c.differences(old, new)] == ["data.source", "optimizer.body.lr"]


@given(st.sampled_from(["step", "steps", "epoch", "epochs", "round"]), st.floats(0.001, 1e6))
def test_durations_are_read_as_written(unit, amount):
    duration = kinds.parse_duration(f"{amount!r} {unit}")
    assert duration == (amount, unit.removesuffix("s"))


def test_lengths_in_steps():
    config = c.base()
    config.batch_size, config.rounds, config.refresh_every = 64, 3, "0.5 epochs"
    config.log_every, config.eval_every, config.save_every = "7 steps", "never", "2 rounds"
    made = lengths(config, 1797)
    assert made.round == math.ceil(898 / 64) == 15
    assert made[:5] == (45, 15, 7, 0, 30)
    assert made.every == {"body": 15, "top": 15}
    config.refresh_every = "2 epochs"
    assert lengths(config, 1797).round == math.ceil(2 * 1797 / 64)
    assert [step for step in range(8) if due(step, 3)] == [0, 3, 6]
    assert not due(0, 0)
    for wrong in ("never", "1 round"):
        config.refresh_every = wrong
        with pytest.raises(ConfigError, match="refresh_every"):
            lengths(config, 1797)


def test_numbers_for_three_colours_are_refused_for_grey_images(tmp_path):
    """They would make three channels of one."""
    with pytest.raises(ConfigError, match=r"config.data.std=\(0.2, 0.3, 0.4\) has 3 .*'digits' have channels: 1"):
        prepared(small_config(data__std=(0.2, 0.3, 0.4)), tmp_path)
