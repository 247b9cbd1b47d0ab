"""Errors that a user can cause; `main` prints their message alone and exits with their code."""


class JaxclustError(Exception):
    """Base of every error with an exit code of its own."""

    exit_code = 1


class ConfigError(JaxclustError, ValueError):
    """A setting is unknown, of the wrong type, out of range or at odds with another (exit 2)."""

    exit_code = 2


class DataError(JaxclustError, ValueError):
    """The data cannot be read, or does not fit the settings (exit 3)."""

    exit_code = 3


class NonFiniteError(JaxclustError, ArithmeticError):
    """The loss became NaN or infinite, or all steps were skipped because it was, or is too large (exit 4)."""

    exit_code = 4


class CollapseError(JaxclustError):
    """Fewer than two clusters hold images, so there is nothing left to learn (exit 1)."""


class HostError(JaxclustError):
    """Another host ended, hangs or is too slow (exit 1)."""


class Stopped(JaxclustError):
    """A signal ended the run after its state was saved; the same command goes on (exit 75)."""

    exit_code = 75
