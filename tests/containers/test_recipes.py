"""The container recipes, as far as they can be checked without the internet and without a daemon."""

from __future__ import annotations

import configparser
import re
import subprocess

from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT

FOLDER = ROOT / "containers"
OCI = (FOLDER / "Containerfile").read_text()
APPTAINER = (FOLDER / "sigma-cvae.def").read_text()
SCRIPT = (FOLDER / "install.sh").read_text()


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Containerfile, without comments."""
    lines = [line for line in OCI.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def sections() -> dict[str, str]:
    """The sections of the definition file."""
    parts = re.split(r"^%(\w+)\n", APPTAINER, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_both_recipes_start_from_one_image_with_a_python_that_is_supported():
    base = re.search(r"^ARG BASE=(.*)$", OCI, re.M)[1]
    assert base == re.search(r"^From: (.*)$", APPTAINER, re.M)[1]
    whole = configparser.ConfigParser()
    whole.read(ROOT / "setup.cfg")
    version = re.search(r"python:(\d+\.\d+)-", base)[1]
    assert version in SpecifierSet(whole["options"]["python_requires"])


def test_both_recipes_run_the_one_script_on_the_whole_checkout():
    words = [word for word, _ in instructions()]
    assert words == ["ARG", "FROM", "ARG", "COPY", "RUN", "ENV", "CMD"]
    assert ("COPY", ". /build") in instructions() and ". /build" in sections()["files"]
    run = dict(instructions())["RUN"]
    assert "sh containers/install.sh" in run and "sh containers/install.sh" in sections()["post"]
    assert set(sections()) == {"files", "post", "environment", "runscript", "test"}


def test_the_scripts_are_valid_shell():
    texts = [SCRIPT, *(sections()[name] for name in ("post", "environment", "runscript", "test"))]
    for text in [*texts, dict(instructions())["RUN"]]:
        subprocess.run(["sh", "-n"], input=text, text=True, check=True)


def test_the_script_installs_what_the_project_has():
    whole = configparser.ConfigParser()
    whole.read(ROOT / "setup.cfg")
    extras = re.search(r'"\.\[([\w,]+)\]"', SCRIPT)[1].split(",")
    assert set(extras) <= set(whole["options.extras_require"])
    assert f"uninstall -y {whole['metadata']['name']}" in SCRIPT
    assert "-c constraints.txt" in SCRIPT and (ROOT / "constraints.txt").exists()
    ignored = (ROOT / ".containerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
