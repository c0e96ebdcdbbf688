"""Toy faces as a source: they lie in CelebA's official layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from pipeline.data.sources.base import DatasetInfo
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.celeba_names import CELEBA_INFO


class ToyFaces(Celeba):
    """Faces that the project draws itself. An empty `shard.source` asks for them, never a folder."""

    expects: ClassVar[str] = ""
    info: ClassVar[DatasetInfo] = replace(CELEBA_INFO, name="toy")

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Return False: a folder in CelebA's layout is taken for CelebA."""
        return False
