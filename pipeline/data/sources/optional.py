"""Libraries that only some data sets need. They are imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.errors import DataError


def needed(module: str, extra: str, purpose: str) -> Any:
    """Import and return a library of one of setup.cfg's extras. Raises DataError with the pip command."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{purpose} needs {module}, which is not installed: pip install -e '.[{extra}]'"
        ) from None
