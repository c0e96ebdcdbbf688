"""Every worked example of docs/extending.md runs as it is printed."""

from __future__ import annotations

import re
import sys
import types
from importlib import import_module

import pytest

from tests.conftest import ROOT
from tests.test_docs import FENCE

PAGE = ROOT / "docs/extending.md"
REGISTRIES = (
    "cvae.priors.prior:PRIORS",
    "pipeline.evaluation.metrics.registry:METRICS",
    "pipeline.data.sources.registry:SOURCES",
    "cvae.losses:LOSS_TERMS",
    "pipeline.training.optim:OPTIMIZERS",
    "pipeline.training.optim:SCHEDULES",
    "pipeline.stages:STAGES",
    "pipeline.tracking.sync:TRACKERS",
    "pipeline.config.limits:CHOICES",
)


def examples() -> list:
    """The Python blocks of the page, named by the heading above each."""
    text = PAGE.read_text()
    found = []
    for match in FENCE.finditer(text):
        language, mode, code = match.groups()
        if (language, mode) == ("python", "run"):
            heading = re.findall(r"^## (.*)$", text[: match.start()], re.M)[-1]
            found.append(pytest.param(code, id=heading))
    return found


@pytest.fixture(autouse=True)
def _registries_as_they_were():
    """An example registers something; the next test must not see it."""
    found = []
    for name in REGISTRIES:
        module, _, attribute = name.partition(":")
        found.append(getattr(import_module(module), attribute))
    copies = [dict(registry) for registry in found]
    yield
    for registry, copy in zip(found, copies, strict=True):
        registry.clear()
        registry.update(copy)


@pytest.mark.parametrize("code", examples())
def test_example_runs(code, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), module.__dict__)


def test_every_row_of_the_table_has_an_example():
    rows = re.findall(r"^\| an? ([\w ]+?) \|", PAGE.read_text(), re.M)
    headings = re.findall(r"^## An? ([\w ]+)$", PAGE.read_text(), re.M)
    assert rows and rows == headings
