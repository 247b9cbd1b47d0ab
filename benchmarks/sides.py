"""Sides of a comparison, each in a process of its own, so that neither thread pools nor memory mix."""

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

Ask = Callable[..., "Answer"]


class Answer(NamedTuple):
    """What a side returned, and the most memory its process has held so far (bytes)."""

    value: Any
    peak: int


@contextmanager
def side(make: Callable[..., Callable[..., Any]], *arguments: Any) -> Iterator[Ask]:
    """A new process that calls `make(*arguments)` once and then, whenever it is asked, what that returned.

    RuntimeError if the process fails; its traceback is on stderr.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, arguments))
    process.start()
    theirs.close()

    def ask(*question: Any) -> Answer:
        try:
            ours.send(question)
            answer: Answer = ours.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"{make.__name__} failed; see the traceback above") from None
        return answer

    try:
        yield ask
    except BaseException:
        process.terminate()
        raise
    finally:
        ours.close()
        process.join()


@contextmanager
def sides(makers: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Ask]]:
    """Several sides at once: {name: (make, *arguments)}."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(side(*maker)) for name, maker in makers.items()}


def take_turns(asks: Mapping[str, Ask], turns: int, *question: Any) -> dict[str, list[Answer]]:
    """Asks every side in turn, A B A B …"""
    answers: dict[str, list[Answer]] = {name: [] for name in asks}
    for _ in range(turns):
        for name, ask in asks.items():
            answers[name].append(ask(*question))
    return answers


def _serve(connection: Connection, make: Callable[..., Callable[..., Any]], arguments: tuple[Any, ...]) -> None:
    run = make(*arguments)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        value = run(*question)
        connection.send(Answer(value, peak_memory()))


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
