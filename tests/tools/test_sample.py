"""A run is exported, sampled and edited from the command line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cvae
from cvae.io import MAX_ROWS
from pipeline.data.pixels import crop_centre, resize, to_uint8
from pipeline.errors import UserError
from pipeline.rundir import layout
from tests.conftest import ROOT
from tests.test_docs import blocks, lines
from tests.tiny_run import ATTRIBUTES, SIZE, make_checkpoint, make_shards, tiny_config, tiny_images
from tools import edit, export, sample
from tools.parts.photo import Eyes, crop_side, read_photo

SHOWN = 4 * SIZE  # pixels of an image in a picture: small ones are enlarged to at least 128


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the run sigma_cvae_nf, not yet exported."""
    folder = tmp_path_factory.mktemp("place") / "runs"
    config = tiny_config(folder, "name=sigma_cvae_nf", "shard.crop=100")
    make_shards(config)
    make_checkpoint(folder / "sigma_cvae_nf", config, ATTRIBUTES)
    (folder / "demo").symlink_to(folder)
    return folder


@pytest.fixture
def run_dir(runs) -> Path:
    shutil.rmtree(runs / "sigma_cvae_nf" / "model", ignore_errors=True)
    return runs / "sigma_cvae_nf"


def test_an_export_is_the_live_model(run_dir, tmp_path, capsys):
    config = tiny_config(run_dir.parent)
    net = make_checkpoint(tmp_path / "twin", config, ATTRIBUTES)
    export.main([str(run_dir), str(tmp_path / "exported")])
    assert "step 10, 32 pixels, 6 attributes" in capsys.readouterr().out
    model = cvae.load(tmp_path / "exported")
    y, noise = torch.rand(4, 6).round(), torch.randn(4, 8)
    with torch.no_grad():
        expected = net.decode(net.prior(y).sample(noise), y)
        found = model.net.decode(model.net.prior(y).sample(noise), y)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not (run_dir / "model").exists()


def test_a_picture_stands_behind_the_faces(run_dir, tmp_path, monkeypatch):
    green = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
    green[..., 1] = 255
    monkeypatch.setattr(sample.Model, "draw", lambda *inputs: green)
    Image.new("RGB", (40, 50), (10, 20, 250)).save(tmp_path / "sea.png")
    words = [str(run_dir), "--n", "2", "--background", str(tmp_path / "sea.png")]
    sample.main([*words, "--out", str(tmp_path / "faces")])
    face = np.asarray(Image.open(tmp_path / "faces/000001.png"))
    assert (face == (10, 20, 250)).all()
    with pytest.raises(UserError, match="--background .*none.png: cannot be read"):
        sample.main([str(run_dir), "--background", str(tmp_path / "none.png")])


def test_an_export_carries_rows_of_training_images_and_where_it_comes_from(run_dir):
    export.main([str(run_dir)])
    model = cvae.load(run_dir)
    assert len(model.card.rows) == 60 <= MAX_ROWS
    assert model.card.provenance["run"] == "sigma_cvae_nf"
    assert model.card.provenance["step"] == 10
    assert model.card.provenance["checkpoint"] == "step_00000010.safetensors"
    stored = json.loads((run_dir / "model/model.json").read_text())
    assert stored["format"] == 1 and stored["attributes"] == ATTRIBUTES


def test_a_run_is_exported_on_the_fly_once(run_dir, tmp_path, capsys):
    grid = tmp_path / "grid.png"
    words = [str(run_dir), "Male,Heavy_Makeup,!Smiling", "--n", "5", "--out", str(grid)]
    sample.main(words)
    assert "exported" in capsys.readouterr().err
    first = grid.read_bytes()
    sample.main(words)
    assert "exported" not in capsys.readouterr().err
    assert grid.read_bytes() == first
    assert Image.open(grid).size == (3 * (128 + 2) + 2, 2 * (128 + 2) + 2)  # small images are enlarged
    newest = next(layout.checkpoints_dir(run_dir).glob("*.json"))
    later = (run_dir / "model/model.json").stat().st_mtime_ns + 1
    os.utime(newest, ns=(later, later))
    sample.main(words)
    assert "exported" in capsys.readouterr().err


def test_a_run_that_can_only_be_read_is_opened_without_an_export(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.export._may_export", lambda run_dir: False)
    monkeypatch.setattr("tools.export._is_current", lambda run_dir: False)
    before = sorted(run_dir.rglob("*"))
    assert len(export.open_model(run_dir).sample({}, 2)) == 2
    assert sorted(run_dir.rglob("*")) == before


def test_a_folder_gets_single_files_that_are_those_of_python(run_dir, tmp_path):
    sample.main([str(run_dir), "Male", "--n", "70", "--seed", "2", "--out", str(tmp_path / "many")])
    files = sorted((tmp_path / "many").glob("*.png"))
    assert len(files) == 70
    images = cvae.load(run_dir).sample({"Male": 1}, n=70, seed=2).int()
    for number in (0, 69):
        found = torch.from_numpy(np.array(Image.open(files[number]))).int()
        assert (found - images[number]).abs().max() <= 1


def read_table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_folder_gets_a_table_with_the_attributes_of_every_image(run_dir, tmp_path, capsys):
    sample.main([str(run_dir), "Male,!Smiling", "--n", "5", "--out", str(tmp_path / "many")])
    lines = read_table(tmp_path / "many/images.csv")
    assert [line["file"] for line in lines] == [f"{i:06d}.png" for i in range(5)]
    labels = cvae.load(run_dir).labels({"Male": 1, "Smiling": 0}, n=5)
    for line, row in zip(lines, labels.int().tolist(), strict=True):
        assert [int(line[name]) for name in ATTRIBUTES] == row
        assert line["request"] == "Male,!Smiling" and line["Male"] == "1" and line["Smiling"] == "0"
    told = capsys.readouterr().err
    assert "attributes that are not named come from" in told and "which carry the request" in told


def test_many_requests_come_from_a_csv_file(run_dir, tmp_path):
    batch = tmp_path / "batch.csv"
    batch.write_text("Male,Smiling,n,seed\n1,0,3,\n,1,2,9\n")
    out = tmp_path / "many"
    sample.main([str(run_dir), "--requests", str(batch), "--seed", "4", "--out", str(out)])
    lines = read_table(out / "images.csv")
    asked = [(line["request"], line["seed"]) for line in lines]
    assert asked == [("Male,!Smiling", "4")] * 3 + [("Smiling", "9")] * 2
    model = cvae.load(run_dir)
    expected = torch.cat(
        [model.sample({"Male": 1, "Smiling": 0}, n=3, seed=4), model.sample({"Smiling": 1}, n=2, seed=9)]
    ).int()
    for number, image in enumerate(expected):
        found = torch.from_numpy(np.array(Image.open(out / f"{number:06d}.png"))).int()
        assert (found - image).abs().max() <= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Mal\n1\n", "did you mean 'Male'"),
        ("Male\nyes\n", "line 2: expected numbers"),
        ("Male\n", "no request"),
    ],
)
def test_mistakes_in_a_csv_file_draw_nothing(run_dir, tmp_path, text, message):
    (tmp_path / "batch.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        sample.main([str(run_dir), "--requests", str(tmp_path / "batch.csv"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "file"], "--out: file is a file, expected a folder"),
        (["--out", "file/below"], "--out: file is a file, expected a folder"),
        (["--out", "file/grid.png"], "--out: file is a file, expected a folder"),
        (["--temperature", "nan"], "--temperature: got nan, expected a number of at least 0"),
        (["--temperature", "-1"], "--temperature: got -1.0, expected"),
    ],
)
def test_a_mistake_on_the_command_line_draws_nothing(runs, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        sample.main([str(runs / "sigma_cvae_nf"), "Male", "--n", "1", *words])
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def cell(strip: np.ndarray, column: int) -> np.ndarray:
    """Return one image of a row, [SIZE, SIZE, 3], which the row shows enlarged."""
    left = 2 + column * (SHOWN + 2)
    shown = strip[2 : 2 + SHOWN, left : left + SHOWN]
    small = shown[:: SHOWN // SIZE, :: SHOWN // SIZE]
    assert np.array_equal(shown, small.repeat(SHOWN // SIZE, 0).repeat(SHOWN // SIZE, 1))
    return small


def test_a_photo_is_cut_edited_and_laid_side_by_side(run_dir, tmp_path):
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (218, 178, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    out = tmp_path / "edited.png"
    edit.main([str(run_dir), str(tmp_path / "photo.png"), "Eyeglasses=1", "--out", str(out)])
    strip = np.array(Image.open(out))
    assert strip.shape == (SHOWN + 4, 4 * (SHOWN + 2) + 2, 3)
    model = cvae.load(run_dir)
    seen = read_photo(tmp_path / "photo.png", model.card)
    assert np.array_equal(seen, resize(crop_centre(photo, model.card.crop)[None], SIZE))
    assert np.array_equal(cell(strip, 0), seen[0])
    assert np.array_equal(cell(strip, 2), model.edit(seen, {"Eyeglasses": 1})[0].numpy())


def test_a_photo_of_another_size_loses_the_same_share(run_dir):
    export.main([str(run_dir)])
    card = cvae.load(run_dir).card
    assert crop_side(218, 178, card) == card.crop
    assert crop_side(3 * 218, 3 * 178, card) == 3 * card.crop
    assert crop_side(SIZE, SIZE, card) == SIZE


MISTAKES = {
    "name": (["Mal"], "did you mean 'Male'?"),
    "value": (["Male=3"], "expected NAME"),
    "n": (["Male", "--n", "0"], "expected at least 1"),
    "out": (["Male", "--out", "grid.webp"], "the name of a picture"),
    "guidance": (["Male", "--guidance", "2"], "cannot be guided"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_of_a_request(run_dir, tmp_path, monkeypatch, case):
    words, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        sample.main([str(run_dir), *words])
    assert message in str(error.value)
    assert not list(tmp_path.glob("grid*"))


def test_a_photo_is_aligned_by_its_eyes(run_dir, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)).save(photo)
    words = [str(run_dir), str(photo), "Eyeglasses=1", "--eyes", "150,120,230,130", "--out"]
    edit.main([*words, str(tmp_path / "edited.png")])
    seen = read_photo(photo, cvae.load(run_dir).card, eyes=Eyes(150, 120, 230, 130))
    strip = np.array(Image.open(tmp_path / "edited.png"))
    assert np.array_equal(cell(strip, 0), seen[0])


def test_mistakes_with_a_photo(run_dir, tmp_path):
    (tmp_path / "note.jpg").write_text("no photo")
    for photo, message in (("absent.jpg", "cannot be read"), ("note.jpg", "is not a JPEG, PNG or WebP file")):
        with pytest.raises(UserError, match=message):
            edit.main([str(run_dir), str(tmp_path / photo), "Male=1"])


def test_a_damaged_export_ends_with_exit_code_2(run_dir, tmp_path):
    folder = export.export(run_dir, tmp_path / "exported")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    command = [sys.executable, "tools/sample.py", str(folder), "Male"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "model.safetensors: is damaged" in done.stderr


@pytest.mark.parametrize("block", blocks("python", "use"))
def test_the_lines_of_the_documentation_run(run_dir, monkeypatch, block):
    export.main([str(run_dir)])
    monkeypatch.chdir(run_dir.parents[1])
    images, _ = tiny_images(2, 9)
    names: dict = {"photos": images}
    exec(compile(block, "documentation", "exec"), names)
    made = [value for name, value in names.items() if name in ("faces", "edited", "between")]
    assert made and all(value.dtype == torch.uint8 for value in made)


def test_the_commands_of_the_documentation_run(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parents[1])
    Image.fromarray(tiny_images(1, 3)[0][0]).save("photo.jpg")
    verbs = {"tools/sample.py": sample, "tools/edit.py": edit, "tools/export.py": export}
    shown = [words for block in blocks("sh", "parse") for words in lines(block.values[0])]
    ours = [words[1:] for words in shown if words[1] in verbs]
    assert {words[0] for words in ours} == set(verbs)
    for script, *words in ours:
        for size in ("--crop", "--eyes"):
            if size in words:  # the photo is smaller than that
                at = words.index(size)
                words = words[:at] + words[at + 2 :]
        if "--requests" in words:
            Path("batch.csv").write_text("Male,n\n1,2\n")
        for word in ("--register", "--formats"):  # they are slow; see test_export.py
            if word in words:
                words = words[: words.index(word)]
        verbs[script].main(words)


def test_levels_are_rounded_as_the_pipeline_does(run_dir):
    export.main([str(run_dir)])
    model = cvae.load(run_dir)
    y = torch.ones(2, 6)
    with torch.no_grad():
        z = model.encode(tiny_images(2, 1)[0], y)
        expected = to_uint8(model.net.decode(z, y))
    assert torch.equal(model.reconstruct(tiny_images(2, 1)[0], y), expected)
