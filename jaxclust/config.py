"""A config: made, read, written and checked; `fields/` has the settings.

A config is an `ml_collections.ConfigDict` made by `base()`, changed by a file in `configs/` and by
`--config.a.b=value` on the command line, and checked by `validate` before any work starts.
"""

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxclust.errors import ConfigError
from jaxclust.fields import FIELDS
from jaxclust.files import read_json, write_json
from jaxclust.hints import did_you_mean
from jaxclust.kinds import Each, Field


def _defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in fields.items():
        if isinstance(field, Field):
            tree[name] = field.default
        elif isinstance(field, Each):
            tree[name] = {section: _defaults(field.fields) for section in field.names}
        else:
            tree[name] = _defaults(field)
    return tree


def base() -> ConfigDict:
    """The config of all defaults."""
    return ConfigDict(_defaults(FIELDS))


def from_file(path: Path, variant: str = "") -> ConfigDict:
    """`get_config(variant)` of a config file."""
    if not path.is_file():
        raise ConfigError(f"--config={path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: ConfigDict = module.get_config(variant)
    return made


def apply_variants(config: ConfigDict, text: str, variants: Mapping[str, Callable[[ConfigDict], None]]) -> ConfigDict:
    """Applies the comma separated variants of `text` in order; ConfigError names the known ones."""
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in variants:
            hint = did_you_mean(name, variants)
            raise ConfigError(f"variant {name!r} is unknown{hint} There is: {', '.join(variants)}.")
        variants[name](config)
    return config


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a config or of its dict."""
    for name, value in tree.items():
        if isinstance(value, ConfigDict | Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def field_of(name: str) -> Field | None:
    """The field behind a dotted name, None when there is none."""

    def walk(node: Any, parts: list[str]) -> Field | None:
        if isinstance(node, Field):
            return None if parts else node
        if not parts:
            return None
        if isinstance(node, Each):
            return walk(node.fields, parts[1:])
        return walk(node[parts[0]], parts[1:]) if parts[0] in node else None

    return walk(FIELDS, name.split("."))


def unknown(name: str, names: Iterable[str]) -> ConfigError:
    """The error for a setting that does not exist; it names the nearest one that does."""
    return ConfigError(f"config.{name} is unknown{did_you_mean(name, names)}")


def wrong_type(name: str, value: Any, field: Field) -> ConfigError:
    """The error for a value that is of another type than its setting."""
    kind = type(field.default).__name__
    return ConfigError(f"config.{name}={value!r} must be of type {kind} ({field.allowed}): {field.doc}.")


def _check_leaf(name: str, value: Any, field: Field) -> None:
    kind = type(field.default)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise wrong_type(name, value, field)
    if not field.check(value):
        raise ConfigError(f"config.{name}={value!r} must be {field.allowed}: {field.doc}.")


def validate(config: ConfigDict) -> ConfigDict:
    """Returns `config` if every setting is known, of its type and in its range; ConfigError otherwise."""
    known = [name for name, _ in flatten(base())]
    for name, value in flatten(config):
        field = field_of(name)
        if field is None:
            raise unknown(name, known)
        _check_leaf(name, value, field)
    if config.sweep:
        raise ConfigError(f"config.sweep={config.sweep!r} is for --job=sweep, which makes a run of each combination")
    for name in stage_names(config):
        stage = for_stage(config, name)
        if stage.cluster.method != "pic" and stage.cluster.k == 0:
            raise ConfigError(
                "config.cluster.k=0: say into how many clusters, such as --config.cluster.k=20; compare several with "
                "--job=sweep --config.sweep=cluster.k=5,10,20, or let --config.cluster.method=pic find their number"
            )
        if stage.rounds and stage.steps:
            raise ConfigError(
                f"config.rounds={stage.rounds} and config.steps={stage.steps}: only one can say how long stage "
                f"{name!r} is; set the other to 0"
            )
    return config


def stage_names(config: ConfigDict) -> list[str]:
    """Names of the stages in their order."""
    return [name.strip() for name in config.stages.split(",") if name.strip()]


def for_stage(config: ConfigDict, name: str) -> ConfigDict:
    """The config that stage `name` sees: the whole one, with its section `stage.<name>` laid over."""
    merged = ConfigDict(config.to_dict())
    if name in config.stage:
        merged.update(config.stage[name].to_dict())
    return merged


def make_room(config: ConfigDict, name: str) -> None:
    """Gives a stage a setting of its own, `stage.<stage>.<setting>`, with the value for all, if it is to be set."""
    first, _, rest = name.partition(".")
    stage, _, setting = rest.partition(".")
    values = dict(flatten(config))
    if (
        first != "stage"
        or stage not in {*stage_names(config), *config.stage}
        or setting not in values
        or name in values
    ):
        return
    *sections, last = setting.split(".")
    with config.unlocked():
        node = config.stage
        for section in (stage, *sections):
            node[section] = node.get(section, ConfigDict())
            node = node[section]
        node[last] = values[setting]


def left_alone(config: ConfigDict, settings: Iterable[str]) -> list[str]:
    """A line for each setting, said for all stages, that those with a value of their own do not take.

    `init_from` is not for all: it is where the run begins.
    """
    whole, lines = dict(flatten(config)), []
    for name in [name for name in settings if name != "init_from"]:
        own = [f"stage.{stage}.{name}" for stage in stage_names(config)]
        kept = [f"config.{n}={whole[n]!r}" for n in own if name in whole and whole.get(n, whole[name]) != whole[name]]
        if kept:
            lines.append(f"note: config.{name}={whole[name]!r} is not for all stages: {', '.join(kept)}")
    return lines


@contextmanager
def naming_section(config: ConfigDict, name: str) -> Iterator[None]:
    """Adds to a ConfigError where stage `name` has the settings that it names, if in a section of its own."""
    try:
        yield
    except ConfigError as error:
        own = [setting for setting, _ in flatten(config.stage.get(name, ConfigDict()))]
        named = [f"config.stage.{name}.{s}" for s in own if re.search(rf"\bconfig\.{re.escape(s)}\b", str(error))]
        if not named:
            raise
        raise ConfigError(f"{error} (for this stage: {', '.join(named)})") from None


def save(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON."""
    write_json(path, config.to_dict())


def load(path: Path) -> ConfigDict:
    """Reads what `save` wrote; ConfigError on a setting this version does not know, DataError: the file is damaged."""
    config = base()

    def fill(node: ConfigDict, tree: Mapping[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                if name not in node:
                    node[name] = ConfigDict()
                fill(node[name], value, f"{prefix}{name}.")
            elif field_of(prefix + name) is None:
                raise ConfigError(f"{path}: config.{prefix}{name} is unknown to this version of jaxclust")
            else:
                node[name] = tuple(value) if isinstance(value, list) else value

    with config.unlocked():
        fill(config, read_json(path), "")
    return config


def differences(old: ConfigDict, new: ConfigDict) -> list[tuple[str, Any, Any]]:
    """(name, old, new) of every setting that makes `new` another run than `old`.

    How long a run is, where its files lie and what it runs on may change between two starts.
    """

    def essence(config: ConfigDict) -> dict[str, Any]:
        leaves = dict(flatten(config))
        leaves["data.source"] = leaves["data.source"].partition(":")[0]
        return {name: value for name, value in leaves.items() if not _may_change(name)}

    a, b = essence(old), essence(new)
    return [(name, a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def _may_change(name: str) -> bool:
    last = name.rpartition(".")[2]
    free = (
        "rounds",
        "steps",
        "stages",
        "init_from",
        "keep_checkpoints",
        "data_dir",
        "cache_bytes",
        "num_images",
        "sweep",
        "eval_every",
    )
    return name.startswith("runtime.") or last in free or name.startswith(("evaluate.", "features.", "report."))


def table() -> str:
    """All settings as a Markdown table, which docs/config.md is."""
    lines = ["| setting | default | allowed | meaning |", "|---|---|---|---|"]
    for name, default in flatten(base()):
        field = field_of(name)
        assert field is not None
        shown = f"`{default!r}`".replace("|", "\\|")
        lines.append(f"| `{name}` | {shown} | {field.allowed} | {field.doc} |")
    return "\n".join(lines) + "\n"
