"""What the compiler says of a program: memory, FLOPs and collectives of one chip."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

_COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>.+?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"ragged-all-to-all|collective-permute|collective-broadcast)(?P<start>-start)?\(",
    re.MULTILINE,
)
_CHIPS = re.compile(r"\bnum_partitions=(\d+)")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One exchange between all chips, and the bytes of the larger of what a chip gives and gets."""

    kind: str
    bytes: int


class Program(NamedTuple):
    """A compiled program on one chip; bytes and FLOPs of one call."""

    arguments: int
    outputs: int  # beside those that take the place of arguments
    temporaries: int
    code: int
    flops: float
    traffic: float  # bytes that its operations read and write
    collectives: tuple[Collective, ...]


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compiles a jitted `function` for the devices of its abstract `arguments`.

    JaxRuntimeError if the compiler finds that it does not fit the chip.
    """
    program = function.lower(*arguments).compile()  # type: ignore[attr-defined]
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return Program(
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
        cost.get("flops", math.nan),
        cost.get("bytes accessed", math.nan),
        collectives(program.as_text()),
    )


def collectives(hlo: str) -> tuple[Collective, ...]:
    """The collectives in the text of a compiled module, an asynchronous one once.

    One in the body of a loop counts once too, however often the loop runs. A reduce-scatter shows what a chip gets,
    of which it gave as much for each chip.
    """
    partitions = _CHIPS.search(hlo)
    chips = int(partitions[1]) if partitions else 1
    found = []
    for match in _COLLECTIVE.finditer(hlo):
        kind, shapes = match["kind"], _SHAPE.findall(match["type"])
        if match["start"] and kind != "all-reduce":  # shows what is given, what is got, and at times two counters
            shapes = [shape for shape in shapes if shape[0] != "u32"]
            shapes = shapes[len(shapes) // 2 :]
        sizes = [_bytes(bits, sides) for _, bits, sides in shapes]
        found.append(Collective(kind, sum(sizes) * (chips if kind == "reduce-scatter" else 1)))
    return tuple(found)


def _bytes(bits: str, sides: str) -> int:
    return math.prod(map(int, filter(None, sides.split(",")))) * int(bits or 8) // 8


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, which may be abstract."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
