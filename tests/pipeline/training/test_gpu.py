"""Tests that only a GPU can show; run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import load as configuration
from pipeline.rundir import layout, record
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from pipeline.training.checkpoints import store as checkpoint
from pipeline.training.checkpoints.saver import Saver
from pipeline.training.checkpoints.store import Checkpoints
from pipeline.training.phases import phase
from pipeline.training.step import modes
from pipeline.training.trainer import Trainer
from tests.conftest import ROOT, run_stage_here
from tests.tiny_run import ATTENTION, make_checkpoint, make_classifier, make_shards, tiny_config
from tests.workers.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WORKER = ROOT / "tests" / "workers" / "train_until.py"
SHORT = ["train.images=192", "train.log_interval=1", "train.val_interval=12", "train.max_lost_steps=6"]


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16", "fp32"])
def test_every_precision_trains(tiny_overrides, tmp_path, precision):
    run_stage_here(
        configuration.load([], [*tiny_overrides, *SHORT, f"train.precision={precision}"]),
        tmp_path / "run",
        "train",
    )
    lines = [
        json.loads(line)["values"]
        for line in (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [v["train/loss"] for v in lines if "train/loss" in v]
    assert losses[-1] < losses[0] and max(v.get("train/bad_steps", 0) for v in lines) == 0
    assert json.loads((tmp_path / "run" / "train" / "done.json").read_text())["peak_gpu_memory_mib"] > 0


@pytest.mark.parametrize(
    "precision,step",
    [("fp32", "eager"), ("bf16", "eager"), ("fp16", "eager"), ("fp32", "graph"), ("bf16", "graph")],
)
def test_deterministic_resume_is_bitwise(tiny_overrides, tmp_path, precision, step, monkeypatch):
    """Stopped during the eager steps before a capture, and once more after it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changes = [f"train.precision={precision}", "train.deterministic=true", f"train.step={step}"]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        config = configuration.load([], [*tiny_overrides, *SHORT, *changes])
        (tmp_path / name / "config.yaml").write_text(configuration.dump(config))
    run_ranks(WORKER, [str(tmp_path / "whole")], 1)
    run_ranks(WORKER, [str(tmp_path / "parts"), "4"], 1)
    run_ranks(WORKER, [str(tmp_path / "parts"), "20"], 1)
    run_ranks(WORKER, [str(tmp_path / "parts")], 1)
    whole, parts = (
        load_file(Checkpoints(layout.checkpoints_dir(tmp_path / n)).path(24)) for n in ("whole", "parts")
    )
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def numbers_of(overrides: list[str], folder: Path, steps: int) -> torch.Tensor:
    """The numbers of every step of a training, [steps, K]."""
    folder.mkdir()
    config = configuration.load([], overrides)
    ranks = Ranks(device=torch.device("cuda", 0))
    trainer = Trainer(phase("train", config), Context(folder, ranks, StopFlag(), logging.getLogger("test")))
    return torch.stack([trainer.train_step(trainer.prepare(s)).numbers.cpu() for s in range(steps)])


@pytest.mark.parametrize(
    "changes", [[], ["train.micro_batch=2"], ["data.rotation_degrees=10"], ATTENTION], ids=str
)
def test_a_hundred_steps_of_the_graph_are_those_of_eager_mode(tiny_overrides, tmp_path, changes):
    base = [*tiny_overrides, "train.precision=fp32", "train.deterministic=true", *changes]
    eager = numbers_of([*base, "train.step=eager"], tmp_path / "eager", 100)
    graph = numbers_of([*base, "train.step=graph"], tmp_path / "graph", 100)
    torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-9)


def test_auto_takes_the_graph_and_a_step_without_a_finite_loss_changes_nothing(tiny_overrides, tmp_path):
    config = configuration.load([], [*tiny_overrides, "train.precision=fp32"])
    ranks = Ranks(device=torch.device("cuda", 0))
    trainer = Trainer(phase("train", config), Context(tmp_path, ranks, StopFlag(), logging.getLogger("test")))
    assert isinstance(trainer.run_step, modes.GraphedStep)
    for step in range(modes.WARM_UP + 2):
        trainer.train_step(trainer.prepare(step))
    before = trainer.weights.vector.detach().clone()
    batch = trainer.prepare(20)
    bad = trainer.train_step(batch._replace(noise=batch.noise * float("nan")))
    assert dict(zip(bad.names, bad.numbers.tolist(), strict=True))["bad"] == 1
    assert torch.equal(before, trainer.weights.vector.detach())
    trainer.stop.requested = True
    good = trainer.train_step(batch)
    assert dict(zip(good.names, good.numbers.tolist(), strict=True))["stop"] == 1
    assert not torch.equal(before, trainer.weights.vector.detach())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("step", ["eager", "graph"])
def test_two_ranks_follow_one(tiny_overrides, tmp_path, step):
    weights = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        changes = ["train.precision=fp64", f"train.step={step}"]
        config = configuration.load([], [*tiny_overrides, *SHORT, *changes])
        (folder / "config.yaml").write_text(configuration.dump(config))
        run_ranks(WORKER, [str(folder)], world)
        weights.append(load_file(Checkpoints(layout.checkpoints_dir(folder)).path(24)))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-8, atol=1e-10)


def test_a_checkpoint_holds_the_step_that_asked_while_the_stream_moves_on(tmp_path, monkeypatch):
    """`save` only queues the copy to page-locked memory; later work must not show in the file."""
    moved, save_file = threading.Event(), checkpoint.save_file

    def held_back(*args):
        assert moved.wait(60)
        save_file(*args)

    monkeypatch.setattr(checkpoint, "save_file", held_back)
    state = {f"model.{i}": torch.full((1 << 20,), float(i), device="cuda") for i in range(16)}
    saver = Saver(Checkpoints(tmp_path))
    saver.save(
        5,
        state,
        {
            "images": 1,
            "attributes": [],
            "size": 16,
            "sections": {},
            "scaler": {},
            "validation": None,
            "seconds": 0.0,
        },
    )
    for tensor in state.values():
        tensor.add_(100)
    moved.set()
    saver.close()
    saved = load_file(Checkpoints(tmp_path).path(5))
    assert all(
        torch.equal(saved[name], torch.full((1 << 20,), float(name.removeprefix("model.")))) for name in state
    )


def evaluate(run_dir, **env):
    """The eval stage in a process of its own; its headline numbers."""
    command = [sys.executable, "-m", "pipeline.run", str(run_dir), "eval"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    newest = record.evaluations(run_dir)[-1]
    return newest.protocol["device"], newest.metrics


def test_an_evaluation_has_the_same_digits_again_and_the_cpus_nearly(tmp_path):
    """Untrained nets on noise: only rounding differs from the CPU, mostly that of convolutions (no tf32)."""
    config = tiny_config(tmp_path)
    make_shards(config, train=400, val=80, test=80)
    make_classifier(config)
    make_checkpoint(tmp_path / "run", config, ["Male", "Smiling"])
    (first_device, first), (second_device, second) = evaluate(tmp_path / "run"), evaluate(tmp_path / "run")
    assert (first_device, second_device) == ("cuda", "cuda") and first == second
    device, there = evaluate(tmp_path / "run", CUDA_VISIBLE_DEVICES="")
    assert device == "cpu" and there.keys() == first.keys()
    for name in ("fd_classifier_samples", "mse", "iw_log_likelihood_nats", "attribute_accuracy"):
        assert first[name] == pytest.approx(there[name], rel=1e-3), name


def test_the_classifier_trains(tmp_path):
    config = tiny_config(tmp_path, "classifier.precision=bf16", "classifier.epochs=3")
    make_shards(config, train=400, val=80, test=80)
    run_stage_here(config, tmp_path / "run", "classifier")
    scores = json.loads((layout.classifier_dir(config) / "metrics.json").read_text())
    assert scores["val"]["balanced_accuracy"] > 0.5
