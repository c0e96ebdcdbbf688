"""A copy of the code for queued jobs: what is edited after the submission does not reach them."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from pipeline.prepare import ROOT

PACKAGES = ("cvae", "pipeline", "slurm", "tools", "configs")
KINDS = (".py", ".yaml", ".txt")


def code() -> dict[Path, bytes]:
    """Everything that a job may import or read, under its path relative to the root of the code."""
    found = [file for package in PACKAGES for file in (ROOT / package).rglob("*") if file.suffix in KINDS]
    return {file.relative_to(ROOT): file.read_bytes() for file in sorted([*found, ROOT / "launch.py"])}


def snapshot_folder(shared: Path, content: dict[Path, bytes]) -> Path:
    """`shared`/code/<digest of the content>."""
    digest = hashlib.sha256()
    for file, text in content.items():
        digest.update(f"{file}\0{len(text)}\0".encode() + text)
    return shared / "code" / digest.hexdigest()[:12]


def snapshot(shared: Path) -> Path:
    """Copy the code to its `snapshot_folder` unless it is there; returns that folder. It appears by one rename."""
    content = code()
    folder = snapshot_folder(shared, content)
    if folder.exists():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for file, text in content.items():
        (temporary / file).parent.mkdir(parents=True, exist_ok=True)
        (temporary / file).write_bytes(text)
    try:
        temporary.rename(folder)
    except OSError:  # another launch was quicker
        shutil.rmtree(temporary)
    return folder
