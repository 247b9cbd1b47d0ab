"""--job=plan --topology=v5e:16x16: whether a training fits a machine that is not there, and about how fast it is.

The train step and the feature pass are compiled for it ahead of time; nothing runs, and no image is read.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxclust.config import for_stage, stage_names
from jaxclust.data.source import of_stage, open_source
from jaxclust.errors import ConfigError
from jaxclust.files import replacing, write_json
from jaxclust.jobs.options import Options
from jaxclust.methods.base import DataInfo
from jaxclust.plan import estimate, measure, topology
from jaxclust.plan.estimate import Kmeans
from jaxclust.plan.program import Program, nbytes
from jaxclust.plan.table import Plan, count, size, table
from jaxclust.plan.topology import Chip, Topology
from jaxclust.train import workdir as workdir_lib
from jaxclust.train.stage import Stage


def run(config: ConfigDict, workdir: Path, options: Options) -> None:
    """Writes plan.json and plan.md, with a column for each of the topologies (separated by commas), as stages are done.

    ConfigError on an unknown topology, a batch that its chips cannot share, or images of which nothing is known.
    """
    if not options.topology:
        raise ConfigError("--job=plan needs --topology=…, such as v5e:16x16 or cpu:8")
    jax.config.update("jax_platforms", "cpu")  # this machine's own accelerators have nothing to do
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there has no analysis
    topologies = [topology.get(name.strip()) for name in options.topology.split(",")]
    infos, known = images(config)
    config = workdir_lib.resolved(config, infos[stage_names(config)[0]].image_shape)
    text = f"# Plan\n\nImages {known}, {config.runtime.dtype}; {estimate.ASSUMPTIONS}.\n"
    trained = [name for name in infos if trains(config, name)]
    if left_out := [name for name in infos if name not in trained]:
        text += f"\nNot planned: {', '.join(left_out)}, which take no step.\n"
    plans: dict[str, dict[str, Plan]] = {}
    for name in trained:
        plans[name] = plans_there = plans_of(config, name, infos[name], topologies, options.largest)
        shape = " x ".join(map(str, infos[name].image_shape))
        text += f"\n## {name}\n\n{infos[name].size:,} images of {shape}\n\n{table(plans_there)}\n"
        text += "\n".join(f"- {where}: {verdict(plan)}" for where, plan in plans_there.items()) + "\n"
        write_json(workdir / "plan.json", plans)  # after each stage: the next one may take minutes
        with replacing(workdir / "plan.md") as temporary:
            temporary.write_text(text)
    print(f"{text}\nresults: {workdir / 'plan.md'}", flush=True)


def trains(config: ConfigDict, name: str) -> bool:
    """Whether stage `name` has steps; those of a run of one stage are planned in any case."""
    own = for_stage(config, name)
    return bool(own.rounds or own.steps) or len(stage_names(config)) == 1


def plans_of(
    config: ConfigDict, name: str, info: DataInfo, topologies: list[Topology], search: bool = True
) -> dict[str, Plan]:
    """The plan of stage `name` for each topology, with the largest batch if there is to be a `search` for it."""
    config = for_stage(config, name)
    config.stage = ConfigDict()  # now part of it, and no longer laid over another batch size
    plans: dict[str, Plan] = {}
    largest: dict[Chip | None, int] = {}
    for on in topologies:
        plans[on.name] = plan(config, name, info, on, largest.get(on.chip, 0) if search else None)
        largest[on.chip] = plans[on.name].get("largest/batch_per_chip", 0)
    return plans


def images(config: ConfigDict) -> tuple[dict[str, DataInfo], str]:
    """What each stage may know of its images, and how that is known; they need not be on this machine."""
    data, names = config.data, stage_names(config)
    kind, _, where = data.source.partition(":")
    if kind != "tfds" and (not where or Path(where).expanduser().exists()):  # tfds would download
        config = ConfigDict(config.to_dict())
        config.data.cache_bytes = 0
        source = open_source(config)
        splits = {name: of_stage(source, config, name).splits["train"] for name in names}
        infos = {name: DataInfo(split.size, split.image_shape, source.train_classes) for name, split in splits.items()}
        return infos, f"read from {data.source}"
    if not (data.num_images and data.image_size):
        raise ConfigError(
            f"config.data.source={data.source!r} is not on this machine; say what is there with "
            "--config.data.num_images=1000000 and --config.data.image_size=224"
        )
    shape = (data.image_size, data.image_size, data.channels or 3)
    numbers = {name: for_stage(config, name).data.num_images for name in names}
    infos = {name: DataInfo(number, shape, config.cluster.k or None) for name, number in numbers.items()}
    return infos, f"of {data.source} as config.data describes them"


def plan(config: ConfigDict, name: str, info: DataInfo, on: Topology, hint: int | None) -> Plan:
    """Everything about stage `name` on a topology, by the names of `table.ROWS`.

    `hint` is the largest batch of a chip of the same kind, where another plan has found it; None: none is looked for.
    """
    chips, start = len(on.devices), config.batch_size // len(on.devices)
    stage = measure.stage_on(on, config, name, info, config.batch_size)
    said(on, "the feature pass", config.eval_batch_size // chips)
    features, refusal = accepted(measure.feature_program, stage)
    programs: dict[int, Program | None] = {}
    refused: dict[int, str] = {}

    def needed(batch: int) -> float:
        """Bytes of a chip that trains on so many images a step, inf where the compiler refuses."""
        said(on, "the train step", batch)
        at = measure.stage_on(on, config, name, info, batch * chips)
        programs[batch], refused[batch] = accepted(measure.train_program, at)
        program = programs[batch]
        return sum(measure.train_memory(at, program).values()) if program else math.inf

    def taken(batch: int) -> bool:
        return measure.takes(config, stage.info, batch * chips)

    most = start if hint is None else info.size // chips
    best, memory = measure.largest(needed, on.memory, start, nbytes(stage.shapes), most, hint or 0, taken)
    found: dict[str, Any] = {
        "chips": chips,
        "hosts": on.hosts,
        "memory/chip": int(on.memory),
        "memory/features": features and measure.feature_memory(stage, features),
        "train/batch": config.batch_size,
        "train/batch_per_chip": config.batch_size / chips,
        "refused": refusal or refused[start],
    }
    if hint is not None:
        found |= {"largest/batch_per_chip": best, "largest/batch": best * chips, "largest/memory": memory}
    train = programs[start]
    if train:
        parts = measure.train_memory(stage, train)
        found |= {f"memory/{part}": value for part, value in parts.items()}
        found |= {"memory/train": sum(parts.values()), **speed(stage, train, on)}
    fits = [found.get(f"memory/{what}") for what in ("train", "features")]
    found["fits"] = all(value is not None and value <= on.memory for value in fits)
    return found | of_a_round(stage, features, found.get("train/seconds"), on)


def accepted(compiled: Callable[[Stage], Program], stage: Stage) -> tuple[Program | None, str]:
    """A program of a stage, or none and why the compiler finds no place for it."""
    try:
        return compiled(stage), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).splitlines()[0]


def said(on: Topology, what: str, batch: int) -> None:
    """Tells what takes the next half minute."""
    print(f"{on.name}: compiling {what} for {batch:,} images a chip", flush=True)


def speed(stage: Stage, train: Program, on: Topology) -> dict[str, Any]:
    """Work of a train step as compiled, and the time it may take."""
    batch = stage.config.batch_size
    found: dict[str, Any] = {
        "train/flops": train.flops,
        "train/traffic": train.traffic,
        "train/collectives": len(train.collectives),
        "train/collective_bytes": sum(one.bytes for one in train.collectives),
    }
    seconds = estimate.times(train, on)
    if seconds is None:
        return found
    return found | {
        "train/compute_seconds": seconds.compute,
        "train/traffic_seconds": seconds.traffic,
        "train/collective_seconds": seconds.collectives,
        "train/seconds": seconds.total,
        "train/images_per_second": batch / seconds.total,
        "train/images_per_second_host": batch / seconds.total / on.hosts,
    }


def of_a_round(stage: Stage, features: Program | None, step: float | None, on: Topology) -> dict[str, Any]:
    """What a round costs: its steps, and before them features or a memory bank, clusterings and what goes around."""
    found: dict[str, Any] = {
        "round/steps": stage.lengths.round,
        "round/train_seconds": step and step * stage.lengths.round,
    }
    if stage.method.refresh is None:
        return found
    images, width = stage.info.size, measure.feature_dim(stage)
    number, dim = stage.method.points(stage.shapes) if stage.method.points else (1, 0)
    found["round/feature_bytes_host"] = 4 * width * images / on.hosts
    found["round/label_bytes"] = 8 * number * images
    found["round/label_seconds"] = estimate.to_every_host(8 * number * images, on)
    if stage.method.memory:  # in place of a pass over the images, but for the first round
        found["round/bank_bytes"] = 4 * width * images
        found["round/bank_seconds"] = estimate.to_every_host(4 * width * images, on)
    else:
        seconds = features and estimate.times(features, on)
        found["round/feature_seconds"] = seconds and seconds.total * -(-images // stage.config.eval_batch_size)
    if stage.method.points:
        found |= of_clusterings(stage.config.cluster, images, width, number, dim, on)
    return found


def of_clusterings(c: ConfigDict, images: int, width: int, number: int, dim: int, on: Topology) -> dict[str, Any]:
    """What it costs to make `dim` columns of features of length `width`, and to cluster them so often."""
    found: dict[str, Any] = {"round/point_bytes": 4 * dim * images}
    if c.pca_dim:
        found["round/reduce_seconds"] = estimate.reduction(images, width, dim, on)
    if c.method in ("kmeans", "spherical"):
        one = Kmeans(images, dim, c.k, (c.iterations + 1) * c.runs)
        gather, faiss = estimate.on_first_host(one, on) or (None, None)
        times = {"gather": gather, "faiss": faiss, "sharded": estimate.on_all_chips(one, on)}
        found |= {f"round/{name}_seconds": seconds and number * seconds for name, seconds in times.items()}
    return found


def verdict(found: Plan) -> str:
    """Whether it fits, in a line."""
    best, chips, has = found.get("largest/batch_per_chip"), found["chips"], size(found["memory/chip"])
    most = f"; at most {count(best * chips)} images a step ({count(best)} a chip)" if best else ""
    if best == 0:
        most = "; not even one image a chip does: take a smaller network"
    if found["fits"]:
        return f"fits, {size(found['memory/train'])} of {has} a chip{most}"
    needs = {"batch_size": found.get("memory/train"), "eval_batch_size": found["memory/features"]}
    setting = next(name for name, value in needs.items() if value is None or value > found["memory/chip"])
    amount = f"needs {size(needs[setting])}" if needs[setting] else f"is refused ({found['refused']})"
    return f"**does not fit**: config.{setting} {amount}, a chip has {has}{most}"
