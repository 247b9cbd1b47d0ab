"""A plug-in is a module; it is found by its name, and a missing one lists what there is."""

import importlib
import pkgutil
from types import ModuleType

from jaxclust.errors import ConfigError
from jaxclust.hints import did_you_mean


def names(package: str) -> list[str]:
    """Names of the public modules in `package` (dotted), sorted."""
    path = importlib.import_module(package).__path__
    return sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_"))


def load(package: str, name: str, field: str, provides: str | tuple[str, ...]) -> ModuleType:
    """The module `name` of `package`; ConfigError unless it exists and has an attribute that `provides` names."""
    if name.isidentifier() and name in names(package):
        module = importlib.import_module(f"{package}.{name}")
        if _has(module, provides):
            return module
    choices = providing(package, provides)
    raise ConfigError(f"{field}={name!r} is unknown{did_you_mean(name, choices)} There is: {', '.join(choices)}.")


def providing(package: str, provides: str | tuple[str, ...]) -> list[str]:
    """Names of the public modules of `package` that have an attribute which `provides` names."""
    return [name for name in names(package) if _has(importlib.import_module(f"{package}.{name}"), provides)]


def _has(module: ModuleType, provides: str | tuple[str, ...]) -> bool:
    return any(hasattr(module, name) for name in ([provides] if isinstance(provides, str) else provides))
