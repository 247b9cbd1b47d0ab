"""Files appear whole or not at all, and locks of the operating system say who may write them."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxclust.errors import ConfigError, DataError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    The suffix is kept, since writers choose a format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_place(path: Path, flag: str) -> None:
    """ConfigError, naming the `flag` that asks for it, if `path` cannot be made: what exists above it is no folder, or
    may not be written to."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{flag}={path}: {above} is a file and no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag}={path}: {above} may not be written to")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, for people to read too."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; DataError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__} and no object")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged, such as by a copy that was cut off or a full disk: {error}") from None
    return content


@contextmanager
def locked(path: Path, how: int) -> Iterator[bool]:
    """Whether the lock `path` is ours within the block; the kernel frees it when the process ends, however it does.

    `how` is `fcntl.LOCK_EX`, to wait for it, or with `fcntl.LOCK_NB`, not to. ConfigError where there are no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, how)
        except BlockingIOError:
            mine = False
        except OSError as error:
            raise ConfigError(
                f"--workdir: its file system cannot lock {path} ({error}); choose another place"
            ) from None
        else:
            mine = True
        yield mine
