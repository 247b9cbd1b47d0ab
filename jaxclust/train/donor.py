"""What a stage takes from others: the body that it starts with, and the files that they left."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxclust import models
from jaxclust.config import for_stage, load, stage_names
from jaxclust.errors import ConfigError
from jaxclust.methods.base import Method
from jaxclust.models.pretrained import TORCH, open_weights
from jaxclust.train.checkpoint import Checkpoints, Snapshot
from jaxclust.train.torch_file import File

KINDS = ("checkpoints", "assignments", "rows")  # folders of a workdir with one for each stage


class Donor(NamedTuple):
    """Where a stage takes its body from."""

    check: Callable[[Snapshot, Method], None]
    """(state or its shapes, its method): ConfigError unless the body fits."""
    give: Callable[[Snapshot, Method], Snapshot]
    """(first state, its method) -> the same with the body."""
    name: Callable[[], str]
    """Whose body it is, once it is there."""


def find(config: ConfigDict, name: str, workdir: Path) -> Donor | None:
    """What gives stage `name` of the whole `config` its body, None: it starts with a new one.

    "torch:FILE" in place of what `body` reads is for the first stage, one whose own section says it, and those that
    would take the body of a stage that this run leaves out.
    """
    own, earlier = for_stage(config, name), stage_names(config)[: stage_names(config).index(name)]
    left_out = own.init_from.startswith("@") and own.init_from[1:] not in earlier
    text = config.init_from if left_out and config.init_from.startswith(TORCH) else own.init_from
    if text.startswith(TORCH):
        said_here = "init_from" in config.stage[name] if name in config.stage else False
        if earlier and not said_here:
            return None
        file = File(open_weights(Path(text.removeprefix(TORCH)).expanduser()), own, name, workdir)
        return Donor(file.check, lambda like, method: file.give(like), lambda: text)
    folder = body(config, name, workdir)
    if folder is None:
        return None
    whole = config if folder.parents[1] == workdir else load(folder.parents[1] / "config.json")

    def check(like: Snapshot, method: Method) -> None:
        if "body" in like.state.params:
            check_network(for_stage(whole, folder.name), own, folder)
        if Checkpoints.exist(folder):
            Checkpoints(folder).check_body(like, method)

    def whose() -> str:
        return f"{folder}, step {Checkpoints(folder).latest():,}"

    return Donor(check, lambda like, method: Checkpoints(folder).restore_body(like, method), whose)


def check_network(there: ConfigDict, here: ConfigDict, folder: Path) -> None:
    """ConfigError unless `config.model` is of one network in the config of the stage in `folder` and in another one.

    Networks may differ though all their arrays agree.
    """
    with_ours = ConfigDict({**there.to_dict(), "runtime": here.runtime.to_dict()})
    with_ours.model.dropout = here.model.dropout
    if models.get(with_ours) != models.get(here):
        fields = [name for name in here.model if name != "name" and with_ours.model[name] != here.model[name]]
        of_donor, own = (
            " ".join([config.model.name, *(f"config.model.{name}={config.model[name]!r}" for name in fields)])
            for config in (there, here)
        )
        raise ConfigError(
            f"config.init_from: the body in {folder} is of another network: {of_donor} there, {own} here. Use its "
            "settings, or train a body of this network first"
        )


def noisy(first: Snapshot, given: Snapshot, share: float, key: jax.Array) -> Snapshot:
    """`given`, where to each parameter w that is not the very one of `first` is added `share` |w| / 2 N(0, 1)."""
    old, (new, tree) = jax.tree.leaves(first.state.params), jax.tree.flatten(given.state.params)

    def moved(number: int, w: jax.Array) -> jax.Array:
        drawn = jax.random.normal(jax.random.fold_in(key, number), w.shape, w.dtype)
        return jax.device_put(w + 0.5 * share * jnp.linalg.norm(w.ravel()) * drawn, w.sharding)

    taken = [share > 0 and now is not before for before, now in zip(old, new, strict=True)]
    params = [moved(number, w) if taken[number] else w for number, w in enumerate(new)]
    return given._replace(state=given.state._replace(params=jax.tree.unflatten(tree, params)))


def body(config: ConfigDict, name: str, workdir: Path) -> Path | None:
    """The folder of checkpoints whose body stage `name` of the whole `config` starts with, None: with a new one.

    `init_from` names the workdir of another run, which is for the first stage, or "@" and another stage: of this run,
    or where this one leaves it out, of the workdir that the config's own `init_from` names or of an earlier start. Of
    another run without such a stage it is the last one. Only a folder of this run may still be empty.
    """
    names, text = stage_names(config), for_stage(config, name).init_from
    if not text.startswith("@"):
        return _of_run(Path(text), None) if text and name == names[0] else None
    earlier = text[1:]
    if earlier in names[: names.index(name)]:
        return workdir / "checkpoints" / earlier
    if config.init_from and not config.init_from.startswith(("@", TORCH)):
        return _of_run(Path(config.init_from), earlier)
    if Checkpoints.exist(workdir / "checkpoints" / earlier):
        return workdir / "checkpoints" / earlier
    raise ConfigError(
        f"config.stage.{name}.init_from={text!r}, but config.stages={config.stages!r} has no stage {earlier!r} before "
        f"{name!r}, and {workdir} no checkpoint of one; train it first, or name a run: --config.init_from=WORKDIR"
    )


def _of_run(workdir: Path, stage: str | None) -> Path:
    """The checkpoints of `stage`, or of the last stage of another run; ConfigError if there are none."""
    saved = workdir / "config.json"
    if not saved.exists():
        raise ConfigError(f"config.init_from={str(workdir)!r} holds no run (there is no {saved})")
    if stage and Checkpoints.exist(workdir / "checkpoints" / stage):
        return workdir / "checkpoints" / stage
    folder = workdir / "checkpoints" / stage_names(load(saved))[-1]
    if not Checkpoints.exist(folder):
        raise ConfigError(f"config.init_from={str(workdir)!r} has no checkpoint yet (there is none in {folder})")
    return folder


def files(config: ConfigDict, name: str, workdir: Path) -> Mapping[str, Path]:
    """Folders, such as "assignments/reliable", of the stages before `name`, which may not have written them yet.

    Stages that this run leaves out are looked for in `workdir`, then in that of the config's `init_from`.
    """
    names = stage_names(config)
    found = {f"{kind}/{stage}": workdir / kind / stage for stage in names[: names.index(name)] for kind in KINDS}
    others = [Path(config.init_from)] if config.init_from and not config.init_from.startswith(("@", TORCH)) else []
    for root in (workdir, *others):
        for path in _folders(root):
            if path.name not in names:
                found.setdefault(f"{path.parent.name}/{path.name}", path)
    return found


def _folders(workdir: Path) -> Sequence[Path]:
    return sorted(path for kind in KINDS for path in (workdir / kind).glob("*/") if path.is_dir())
