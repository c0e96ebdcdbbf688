"""The library alone is a package: built as an sdist, installed in a fresh environment, it opens an export."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import cvae
from tests.conftest import ROOT
from tests.cvae.test_use import ALONE, card_of, config_of, live, write

BUILD = "from setuptools.build_meta import build_sdist; build_sdist('../dist')"


@pytest.fixture
def sdist(tmp_path) -> Path:
    """The sdist, built from a copy, so that no build folder appears in the checkout."""
    skipped = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT / "cvae", tmp_path / "source", ignore=skipped)
    (tmp_path / "dist").mkdir()
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path / "source", check=True, capture_output=True)
    (file,) = (tmp_path / "dist").iterdir()
    return file


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees the libraries of this one, but neither its links nor this checkout."""
    venv.create(folder)
    python = folder / "bin/python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def test_an_sdist_installs_and_opens_an_export(sdist, tmp_path):
    config = config_of("flow")
    folder = write(tmp_path / "exported", live(config), card_of(config))
    python = fresh_environment(tmp_path / "fresh")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    install += ["--no-build-isolation", "--no-index", "--disable-pip-version-check", str(sdist)]
    subprocess.run(install, check=True, cwd=tmp_path, env=clean, capture_output=True)
    # The other packages of the environment, pipeline among them, are refused here.
    script = ALONE + "\nprint(cvae.__file__)"
    command = [str(python), "-W", "ignore", "-c", script, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers, place = done.stdout.splitlines()
    expected = cvae.load(folder).sample({"Male": 1}, n=2)
    assert numbers.split() == [str(part) for part in (*expected.shape, int(expected.sum()))]
    assert Path(place).is_relative_to(tmp_path / "fresh")


def test_both_packages_agree_on_version_and_python():
    project = (ROOT / "cvae/pyproject.toml").read_text()
    whole = configparser.ConfigParser()
    whole.read(ROOT / "setup.cfg")
    found = dict(re.findall(r'^(version|requires-python) = "(.*)"$', project, re.M))
    assert found["version"] == whole["metadata"]["version"]
    assert found["requires-python"] == whole["options"]["python_requires"]
    needs = re.findall(r'"(\w+>=[\d.]+)"', re.search(r"^dependencies = (.*)$", project, re.M)[1])
    assert set(needs) <= set(whole["options"]["install_requires"].split())
    folders = {file.parent.relative_to(ROOT).as_posix() for file in (ROOT / "cvae").rglob("*.py")}
    listed = re.search(r"^packages = (.*)$", project, re.M)[1]
    assert set(re.findall(r'"([\w.]+)"', listed)) == {folder.replace("/", ".") for folder in folders}
