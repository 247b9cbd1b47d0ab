"""Machines that a plan can be made for: devices to compile for without having them, and their published figures."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxclust.errors import ConfigError

GB = 10**9


class Chip(NamedTuple):
    """Peaks of one chip, per second where they are rates; FLOPs are those of bfloat16 products.

    JAX multiplies float32 in one pass of bfloat16 on a TPU unless told otherwise, so they hold for float32 too.
    """

    flops: float
    memory: float  # bytes
    bandwidth: float  # of its memory, bytes
    link: float  # bytes over one link, one way; a chip has two links for each axis of the topology
    ring: int  # axes of a multiple of this length are rings, the others lines
    pod: int  # chips that there are at most
    cores: int  # vCPUs of a host of four chips
    example: str


CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819 * GB, 50 * GB, 16, 256, 112, "v5e:16x16"),
    "v5p": Chip(459e12, 95 * GB, 2765 * GB, 100 * GB, 4, 6144, 208, "v5p:2x2x4"),
    "v6e": Chip(918e12, 32 * 2**30, 1638 * GB, 100 * GB, 16, 256, 180, "v6e:16x16"),
}
"""docs.cloud.google.com/tpu/docs/v5e, v5p and v6e, read in November 2026. A link has the bandwidth of the chip, of what
is called bidirectional a half, over the number of its links."""


class Topology(NamedTuple):
    """Devices to compile for. Without a `chip` there are no published figures, and so no times."""

    name: str
    devices: Sequence[jax.Device]
    shape: tuple[int, ...]
    hosts: int
    memory: float  # bytes that a device has
    chip: Chip | None = None


def get(name: str) -> Topology:
    """The topology NAME:AxB, or cpu:N; ConfigError says what there is, or what is missing to compile for it."""
    kind, _, size = name.partition(":")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size) or kind not in ("cpu", *CHIPS):
        examples = ", ".join(["cpu:8", *(chip.example for chip in CHIPS.values())])
        raise ConfigError(f"--topology={name!r} is unknown. There is, for example: {examples}")
    shape = tuple(map(int, size.split("x")))
    if kind in CHIPS and math.prod(shape) > CHIPS[kind].pod:
        raise ConfigError(f"--topology={name}: a {kind} slice has at most {CHIPS[kind].pod:,} chips")
    return _cpu(name, math.prod(shape)) if kind == "cpu" else _tpu(name, shape, CHIPS[kind])


def _cpu(name: str, count: int) -> Topology:
    try:
        if jax.config.values["jax_num_cpu_devices"] < count:
            jax.config.update("jax_num_cpu_devices", count)
        devices = jax.devices("cpu")[:count]
    except RuntimeError:  # JAX has started with fewer
        devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"--topology={name}: JAX was started with {len(devices)} CPU devices")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / count
    return Topology(name, devices, (count,), 1, memory)


def _tpu(name: str, shape: tuple[int, ...], chip: Chip) -> Topology:
    # Before libtpu is loaded: there is no server that describes this machine, and who has its lock does not matter.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    options = {"chips_per_host_bounds": [1, 1, 1]} if math.prod(shape) == 1 else {}
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"--topology={name} needs the TPU compiler: pip install 'jaxclust[plan]'; --topology=cpu:8 needs nothing"
        ) from None
    try:
        devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"--topology={name}: the TPU compiler refuses it: {str(error).splitlines()[0]}") from None
    hosts = len({device.process_index for device in devices})
    return Topology(name, devices, shape, hosts, chip.memory, chip)
