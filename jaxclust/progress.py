"""Progress on anything longer than a few seconds: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from jaxclust.heartbeats import tick

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def progress(items: Iterable[T], total: int, title: str, unit: str = "it") -> Iterator[T]:
    """Yields `items`, each a piece of work that is done, and shows how many of `total`; a short job shows nothing.

    The bar goes away when it is full, since a line of results follows it. Of several hosts only the first shows it.
    """
    items = _counted(items)
    if not _is_first_host():
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title, unit=unit, leave=False, delay=1.0, dynamic_ncols=True)
        return
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - start) / done * (total - done) if done else float("nan")
            print(f"{title}: {done:,} of {total:,} {unit}, {left:,.0f} s left", file=sys.stderr, flush=True)
        yield item


def _counted(items: Iterable[T]) -> Iterator[T]:
    for item in items:
        tick()
        yield item


def _is_first_host() -> bool:
    if "jax" not in sys.modules:  # a report starts without it
        return True
    from jaxclust import hosts

    return hosts.is_first()
