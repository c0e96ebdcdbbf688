"""Every file of a run has the mode that the umask leaves, whoever writes it."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from pipeline.config.load import with_values
from pipeline.rundir import record
from pipeline.tracking.sync import tracker_of
from tests.conftest import ROOT, run_stage_here
from tests.tiny_run import make_classifier

STORED = ROOT / "tests" / "data" / "stored_run"


def modes(folder: Path) -> dict[str, int]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): stat.S_IMODE(file.stat().st_mode) for file in files}


@pytest.mark.parametrize("mask", [0o002, 0o077], ids=oct)
def test_all_files_of_a_run_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        runs = tmp_path / "runs"
        run_dir = runs / "stored"
        shutil.copytree(STORED, runs, copy_function=shutil.copyfile)
        longer = {"train.images": 80, "tracking.enabled": True}
        small = {"eval.n": 4, "eval.block": 2, "eval.metrics": ["reconstruction"]}
        config = with_values(record.run_config(run_dir), longer | small)
        run_stage_here(config, run_dir, "train")
        make_classifier(config)
        run_stage_here(config, run_dir, "eval")
        tracker_of(run_dir).push()
    finally:
        os.umask(before)
    found = modes(runs)
    assert {"mlflow.db", "stored/train/owner.json", "stored/report.html"} <= found.keys()
    assert any(name.endswith(".safetensors") for name in found)
    wrong = {name: oct(mode) for name, mode in found.items() if mode != 0o666 & ~mask}
    assert not wrong
