"""Every damaged tar is listed, and made again byte for byte from its source."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.config import load as configuration
from pipeline.data.encoded.index import index_file
from pipeline.errors import DataError
from pipeline.rundir import layout
from tests.conftest import run_stage_here, write_noise_celeba
from tools.check_shards import main


@pytest.fixture
def run_dir(tmp_path) -> Path:
    source = write_noise_celeba(tmp_path / "source", 20)
    overrides = [
        f"shard.source={source}",
        f"runs_dir={tmp_path / 'runs'}",
        "shard.size=16",
        "shard.samples_per_shard=4",
    ]
    run_stage_here(configuration.load([], overrides), tmp_path / "runs" / "run", "shard")
    return tmp_path / "runs" / "run"


def tars(run_dir: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder_of(run_dir).glob("*.tar")}


def folder_of(run_dir: Path) -> Path:
    return layout.shards_dir(configuration.load([run_dir / "config.yaml"]))


def test_damage_is_listed_and_repaired_from_the_source(run_dir, capsys):
    main([str(run_dir)])
    assert "intact" in capsys.readouterr().out
    folder, before = folder_of(run_dir), tars(run_dir)
    first, second, third = sorted(before)[:3]
    os.truncate(folder / first, 700)
    (folder / second).write_bytes(bytes([before[second][0] ^ 1]) + before[second][1:])
    (folder / third).unlink()
    with pytest.raises(SystemExit):
        main([str(folder)])
    listed = capsys.readouterr().out
    assert all(name in listed for name in (first, second, third)) and "3 damaged" in listed
    main([str(folder), "--repair", str(run_dir)])
    assert tars(run_dir) == before and "intact" in capsys.readouterr().out


def test_encoded_tars_and_their_indexes_are_repaired(run_dir, capsys):
    config = configuration.load([run_dir / "config.yaml"], ["shard.format=encoded"])
    run_stage_here(config, run_dir, "shard")
    folder = folder_of(run_dir)
    before = {file.name: file.read_bytes() for file in folder.glob("train-*")}
    first, second = sorted(folder.glob("train-*.tar"))[:2]
    os.truncate(first, 700)
    index_file(second).write_bytes(b"")
    with pytest.raises(SystemExit):
        main([str(run_dir)])
    assert "2 damaged" in capsys.readouterr().out
    main([str(run_dir), "--repair", str(run_dir)])
    assert {file.name: file.read_bytes() for file in folder.glob("train-*")} == before


def test_annotations_are_checked_and_made_again(run_dir, capsys):
    file = folder_of(run_dir) / "annotations.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1])
    with pytest.raises(SystemExit):
        main([str(run_dir)])
    assert "annotations.safetensors: is missing or differs" in capsys.readouterr().out
    main([str(run_dir), "--repair", str(run_dir)])
    assert file.read_bytes() == before


def test_an_extra_tar_is_listed_and_left_alone(run_dir, capsys):
    (folder_of(run_dir) / "train-00099.tar").write_bytes(b"?")
    with pytest.raises(SystemExit):
        main([str(run_dir), "--repair", str(run_dir)])
    assert "train-00099.tar: is not listed" in capsys.readouterr().out


def test_another_source_repairs_nothing(run_dir, tmp_path):
    before = tars(run_dir)
    victim = folder_of(run_dir) / min(before)
    victim.write_bytes(b"")
    shutil.rmtree(tmp_path / "source")
    write_noise_celeba(tmp_path / "source", 20, seed=1)
    with pytest.raises(DataError, match="is not the source that these shards were made from"):
        main([str(run_dir), "--repair", str(run_dir)])
    assert victim.read_bytes() == b""
