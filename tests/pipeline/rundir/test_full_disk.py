"""A full disk under what the tools write: one message that names the file, exit code 2, no half file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import exit_code
from tests.conftest import full_disk
from tests.fake_run import add_eval
from tests.tiny_run import ATTRIBUTES, make_checkpoint, make_shards, tiny_config
from tools import compare, edit, explore, export, inspect_data, sample

ROOM = 400  # bytes that each file may have


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an export and an evaluation, a run without, and a photo."""
    made = tmp_path_factory.mktemp("full")
    config = tiny_config(made)
    make_shards(config)
    for name in ("run", "fresh"):
        make_checkpoint(made / name, config, ATTRIBUTES)
    export.export(made / "run", made / "run/model")
    add_eval(made / "run", 1)
    Image.new("RGB", (64, 64)).save(made / "photo.png")
    return made


COMMANDS = {
    "export": (export.main, "fresh", "new", "--formats", "pt2"),
    "sample, first export": (sample.main, "fresh", "Male", "--out", "new.png"),
    "sample, one picture": (sample.main, "run", "Male", "--n", "4", "--out", "new.png"),
    "sample, files": (sample.main, "run", "Male", "--n", "2", "--out", "many"),
    "edit": (edit.main, "run", "photo.png", "Male=1", "--out", "new.jpg"),
    "explore": (explore.main, "fresh"),
    "compare": (compare.main, "run", "--out", "new.html"),
    "inspect_data, a picture": (inspect_data.main, "run", "--out", "new.png"),
    "inspect_data, a page": (inspect_data.main, "run", "--out", "new.html"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_tool_names_the_file_and_leaves_nothing(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    main, *words = COMMANDS[name]
    with full_disk(ROOM):
        assert exit_code(partial(main, words)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "could not be written (File too large); make room" in errors[0]
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
