"""Nothing gets into the environment unpinned: what an audit has seen is what is installed."""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def pinned() -> dict[str, str]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line) for line in lines), "an exact version per line"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def closure(names: list[str]) -> set[str]:
    """The distributions that `names` need, as installed here."""
    seen: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        seen.add(name)
        wanted = [Requirement(text) for text in needs]
        waiting += [
            canonicalize_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
    return seen


def test_every_dependency_and_theirs_is_pinned_exactly():
    text = (ROOT / "setup.cfg").read_text()
    direct = re.findall(r"^    ([A-Za-z0-9-]+)>=", text, re.MULTILINE)
    assert len(direct) > 15
    missing = {n for n in closure(direct) - set(pinned()) if not n.startswith(("nvidia-", "triton", "cuda-"))}
    assert not missing - {"setuptools", "pip"}, f"add to constraints.txt: {missing}"
