"""inspect_data: what it says of a source, of shards and of a run; the contact sheet; the command."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import load as configuration
from pipeline.data.sources.toy.shapes import ATTRIBUTES, make_toy_shapes
from pipeline.errors import DataError, UserError
from pipeline.rundir import layout
from tests.conftest import run_stage_here
from tools.inspect_data import main


def test_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_toy_shapes(tmp_path / "shapes", 60)
    damaged = tmp_path / "shapes" / "pictures" / "shape_00007.png"
    damaged.write_bytes(damaged.read_bytes()[:90])
    (tmp_path / "shapes" / "pictures" / "shape_00008.png").unlink()
    main([str(tmp_path / "shapes"), "--out", str(tmp_path / "sheet.png"), "--check", "0"])
    said = capsys.readouterr().out
    assert "kind        images+csv" in said and "images      59 of 60 annotated" in said
    assert "damaged     1 of 59 images opened" in said
    assert "shape_00007.png: is a damaged or truncated PNG" in said
    assert "shorter sides 4" in said and all(name in said for name in ATTRIBUTES)
    command = said.splitlines()[-1]
    assert f"shard.source={tmp_path / 'shapes'}" in command
    assert "shard.allow_subset=true shard.skip_damaged=true shard.size=32" in command  # the smallest is 40
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 900 and len(sheet.convert("RGB").getcolors(1 << 24) or []) > 50

    main([str(tmp_path / "shapes"), "--out", str(tmp_path / "sheet.html")])
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<img") == 47 and "http" not in page


@pytest.mark.parametrize("form", ["strided", "encoded"])
def test_a_run_and_its_shards(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_toy_shapes(tmp_path / "shapes", 60)
    overrides = [f"shard.source={tmp_path / 'shapes'}", f"runs_dir={tmp_path / 'runs'}", "shard.size=16"]
    config = configuration.load([], [*overrides, f"shard.format={form}"])
    run_stage_here(config, tmp_path / "runs" / "run", "shard")
    capsys.readouterr()
    for place in (tmp_path / "runs" / "run", layout.shards_dir(config)):
        main([str(place), "--out", str(tmp_path / "sheet.png")])
        said = capsys.readouterr().out
        assert "kind        shards of toy shapes" in said and "sizes       16x16 (60)" in said
        assert f"data.shards={layout.shards_dir(config)}" in said
    if form == "encoded":
        shards = layout.shards_dir(config)
        elsewhere = shutil.copytree(shards, tmp_path / "elsewhere")
        for tar in shards.glob("*.tar"):
            tar.unlink()
        moved = replace(config, data=replace(config.data, tars=str(elsewhere)))
        (tmp_path / "runs" / "run" / "config.yaml").write_text(configuration.dump(moved))
        main([str(tmp_path / "runs" / "run"), "--out", str(tmp_path / "sheet.png")])
        assert f"data.tars={elsewhere}" in capsys.readouterr().out


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"--out: got sheet.gif, expected a name that ends in .png or .html"):
        main([str(tmp_path), "--out", "sheet.gif"])
    with pytest.raises(UserError, match="--check: got -3, expected a number of images, or 0 for all"):
        main([str(tmp_path), "--check", "-3"])
