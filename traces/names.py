"""Refusing an unknown name in one sentence."""

import difflib
from collections.abc import Iterable


def nearest(kind: str, given: str, known: Iterable[str]) -> str:
    """Return the sentence that refuses an unknown name and suggests the nearest one."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
    return f"{kind} {given!r} is unknown; {hint}"
