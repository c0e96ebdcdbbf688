"""Hide credentials in text that is shown, logged or stored."""

from __future__ import annotations

import re


def redact(text: str) -> str:
    """Return `text` with the user name and password of every URI in it replaced by `***`."""
    return re.sub(r"://[^/\s]*@", "://***@", text)
