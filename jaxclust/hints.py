"""What a misspelt name may mean."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A hint for a misspelt `name`, or a full stop."""
    names = list(names)
    same_ending = [known for known in names if known.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6) or same_ending
    return f"; did you mean {close[0]!r}?" if close else "."
