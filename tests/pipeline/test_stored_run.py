"""A run that an older version of this program stored: it continues, and every tool still reads it.

tests/data/stored_run holds toy faces of 16 pixels, 48 trained images, and one checkpoint.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.load import with_values
from pipeline.config.paths import absolute_paths
from pipeline.data.order import FIRST_STREAM
from pipeline.prepare import prepare, recorded, require_continuable
from pipeline.rundir import layout, record
from pipeline.rundir.metrics_log import read_metrics
from pipeline.stages import STAGES
from pipeline.training.checkpoints.store import Checkpoints
from tests.conftest import ROOT, run_stage_here
from tests.tiny_run import make_classifier

# Losses of the next steps, computed by code that had one stream of random numbers only.
LOSSES = {7: 498.47145593, 8: 515.25602845, 9: 534.72671954}
STORED = ROOT / "tests" / "data" / "stored_run"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A copy of the stored run in another place, as after a move."""
    shutil.copytree(STORED, tmp_path / "runs")
    return tmp_path / "runs" / "stored"


def tool(name: str, *words: object) -> str:
    command = [sys.executable, f"tools/{name}.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_configuration_is_read_with_new_names_and_from_where_it_lies(run_dir):
    assert "checkpoint_interval: 3" in (run_dir / "config.yaml").read_text()
    config = record.run_config(run_dir)
    assert config.train.max_lost_steps == 3
    assert config.runs_dir == str(run_dir.parent)
    assert STAGES["shard"].complete(config, run_dir) and STAGES["train"].complete(config, run_dir)
    assert record.status(run_dir, config) == "FINISHED"


def test_it_trains_longer_from_its_checkpoint(run_dir):
    config = absolute_paths(with_values(recorded(run_dir), {"train.images": 80}))
    require_continuable(run_dir, config)
    prepare(run_dir, config, ["train"])
    run_stage_here(config, run_dir, "train")
    assert json.loads((run_dir / "train/done.json").read_text())["step"] == 10
    assert "resuming at step 6" in (run_dir / "logs/train/rank0.log").read_text()
    steps = [line["step"] for line in read_metrics(run_dir / "train/metrics.jsonl")]
    assert {1, 6, 10} <= set(steps)
    lines = [line for line in read_metrics(run_dir / "train/metrics.jsonl") if "train/loss" in line["values"]]
    losses = {line["step"]: line["values"]["train/loss"] for line in lines}
    for step, loss in LOSSES.items():
        assert losses[step] == pytest.approx(loss, rel=1e-5), step
    checkpoint = Checkpoints(layout.checkpoints_dir(run_dir)).read(10)
    assert checkpoint.meta["stream"] == FIRST_STREAM
    assert "changed" in record.history(run_dir)[-1]
    assert not (run_dir.parent.parent / "home").exists()


def test_status_and_shard_check_read_it(run_dir):
    assert "stored" in tool("status", run_dir)
    tool("check_shards", run_dir)


def test_it_is_evaluated_and_compared(run_dir):
    config = record.run_config(run_dir)
    small = {"eval.n": 4, "eval.block": 2, "eval.iw_images": 2, "eval.iw_samples": 2, "eval.rare_samples": 2}
    config = with_values(config, small | {"eval.metrics": ["reconstruction", "likelihood"]})
    make_classifier(config)
    run_stage_here(config, run_dir, "eval")
    (evaluation,) = record.evaluations(run_dir)
    assert evaluation.protocol["step"] == 6
    assert "stored" in tool("compare", run_dir, "--out", run_dir / "comparison.html")
