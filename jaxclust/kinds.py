"""Kinds of settings: what a field is, and the fields of numbers, choices, durations and texts."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxclust.errors import ConfigError


class Field(NamedTuple):
    """One setting: its default, whether a value is allowed, and both in words."""

    default: Any
    check: Callable[[Any], bool]
    allowed: str
    doc: str


class Each(NamedTuple):
    """Sections with free names that all have the same fields, and the names that exist at first."""

    fields: Mapping[str, Any]
    names: tuple[str, ...]


class Duration(NamedTuple):
    """A length of training: an amount of `step`, `epoch` or `round`."""

    amount: float
    unit: str


UNITS = ("step", "epoch", "round")


def parse_duration(text: str) -> Duration:
    """Reads "500 steps", "1 epoch", "0.5 rounds" or "never"; ConfigError on anything else."""
    if text == "never":
        return Duration(math.inf, "step")
    amount, _, unit = text.strip().partition(" ")
    try:
        duration = Duration(float(amount), unit.strip().removesuffix("s"))
    except ValueError:
        duration = Duration(math.nan, "")
    if duration.unit not in UNITS or not 0 < duration.amount < math.inf:
        raise ConfigError(f"{text!r} is not a duration; write '500 steps', '1 epoch', '2 rounds' or 'never', say")
    return duration


def _is_duration(text: str) -> bool:
    try:
        parse_duration(text)
    except ConfigError:
        return False
    return True


def number(default: float, low: float, high: float, doc: str) -> Field:
    """A number from `low` to `high`."""
    words = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
    return Field(default, lambda v: low <= v <= high, words, doc)


def positive(default: float, doc: str) -> Field:
    """A number over 0."""
    return Field(default, lambda v: 0 < v < math.inf, "more than 0", doc)


def choice(default: str, others: tuple[str, ...], doc: str) -> Field:
    """One of some words."""
    names = (default, *others)
    return Field(default, lambda v: v in names, f"one of {', '.join(names)}", doc)


def duration(default: str, doc: str) -> Field:
    """A length of training, or "never"."""
    return Field(default, _is_duration, "a duration such as '500 steps', '1 epoch', '2 rounds' or 'never'", doc)


def text(default: str, doc: str) -> Field:
    """Any text."""
    return Field(default, lambda v: True, "text", doc)


def name(default: str, doc: str) -> Field:
    """Any text that is not empty."""
    return Field(default, lambda v: bool(v.strip()), "a name", doc)


def flag(default: bool, doc: str) -> Field:
    """Yes or no."""
    return Field(default, lambda v: True, "True or False", doc)


def some(default: tuple[float, ...], low: float, high: float, doc: str) -> Field:
    """Any number of numbers from `low` to `high`, none of them only where that is the default."""
    kind = type(default[0]) if default else float

    def check(values: tuple[float, ...]) -> bool:
        fit = (isinstance(v, int | kind) and not isinstance(v, bool) and low <= v <= high for v in values)
        return bool(values or not default) and all(fit)

    words = "whole numbers" if kind is int else "numbers"
    limits = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
    return Field(default, check, f"{words} {limits}, of one such as ({(default or (0.1,))[0]!r},)", doc)


def numbers(default: tuple[float, ...], low: float, high: float, doc: str) -> Field:
    """A number of each channel, or one for all; as many as the default has are allowed too."""

    def check(values: tuple[float, ...]) -> bool:
        return len(values) in (1, 3, len(default)) and all(
            isinstance(v, int | float) and low <= v <= high for v in values
        )

    return Field(default, check, f"one number or three, each from {low:g} to {high:g}", doc)


def spans(text: str) -> tuple[range, ...]:
    """Reads whole numbers and spans of them such as "1-4,7"; ConfigError on anything else."""
    found = []
    for part in filter(None, text.replace(" ", "").split(",")):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ConfigError(f"{part!r} is no whole number or span of them; write '1-4,7', say")
        found.append(range(int(first), int(last) + 1))
    return tuple(found)


def _are_spans(text: str) -> bool:
    try:
        spans(text)
    except ConfigError:
        return False
    return True


def whole_numbers(default: str, doc: str) -> Field:
    """Whole numbers and spans of them, or none."""
    return Field(default, _are_spans, "whole numbers and spans of them such as '1-4,7'", doc)
