"""What only a GPU shows; run with `pytest -m gpu` on a machine that has one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import config as configuration
from pipeline import layout
from pipeline.runtime.checkpoint import Checkpoints
from tests.conftest import run_ranks, run_stage_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WORKER = Path(__file__).parents[1] / "workers" / "train_until.py"
SHORT = ["train.images=192", "train.log_interval=1", "train.val_interval=12", "train.checkpoint_interval=6"]


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_every_precision_trains(tiny_overrides, tmp_path, precision):
    run_stage_here(configuration.load([], [*tiny_overrides, *SHORT, f"train.precision={precision}"]), tmp_path / "run", "train")
    lines = [json.loads(line)["values"] for line in (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()]
    losses = [v["train/loss"] for v in lines if "train/loss" in v]
    assert losses[-1] < losses[0] and lines[-2]["train/bad_steps"] == 0
    assert json.loads((tmp_path / "run" / "train" / "done.json").read_text())["peak_gpu_memory_mib"] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_deterministic_resume_is_bitwise(tiny_overrides, tmp_path, precision, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        config = configuration.load([], [*tiny_overrides, *SHORT, f"train.precision={precision}", "train.deterministic=true"])
        (tmp_path / name / "config.yaml").write_text(configuration.dump(config))
    run_ranks(WORKER, [str(tmp_path / "whole")], 1)
    run_ranks(WORKER, [str(tmp_path / "parts"), "8"], 1)
    run_ranks(WORKER, [str(tmp_path / "parts")], 1)
    whole, parts = (load_file(Checkpoints(layout.checkpoints_dir(tmp_path / n)).path(24)) for n in ("whole", "parts"))
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name
