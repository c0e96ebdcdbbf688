"""The nearest valid name for a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SIMILARITY = 0.4  # below this share of common letters a suggestion would puzzle


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'?" with the nearest of `known`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), 1, SIMILARITY)
    return f"; did you mean '{near[0]}'?" if near else ""
