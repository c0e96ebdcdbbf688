"""The train stage: bitwise resume, stop signals, bad numbers, configurations and shards that changed."""

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import load as configuration
from pipeline.config.schema import RunConfig
from pipeline.data.loader import TrainBatches
from pipeline.data.shards import Shards
from pipeline.errors import CheckpointError
from pipeline.rundir import layout
from pipeline.rundir.files import seal
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages.train import run as run_train
from pipeline.training.checkpoints import store as checkpoint
from pipeline.training.checkpoints.saver import Recorder, Saver
from pipeline.training.checkpoints.store import Checkpoints
from pipeline.training.checkpoints.weights import load_model
from pipeline.training.phases import phase
from pipeline.training.steps import TrainingDiverged
from pipeline.training.trainer import Trainer
from tests.conftest import ROOT, run_stage_here
from tests.tiny_run import ATTENTION
from tests.workers.ranks import run_ranks
from tools.dev.benchmarks.store import serving

WORKER = ROOT / "tests" / "workers" / "train_until.py"
SHORT = [
    "train.images=192",
    "train.log_interval=1",
    "train.val_interval=12",
    "train.max_lost_steps=6",
]  # 24 steps of 8
CLOCKS = ("images_per_s", "data_wait_share")


def make_run(folder: Path, overrides: list[str]) -> RunConfig:
    folder.mkdir(parents=True)
    config = configuration.load([], overrides)
    (folder / "config.yaml").write_text(configuration.dump(config))
    return config


def deterministic_metrics(run_dir: Path) -> list:
    lines = [json.loads(line) for line in (run_dir / "train" / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], {k: v for k, v in r["values"].items() if not k.endswith(CLOCKS)}) for r in lines]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(Checkpoints(layout.checkpoints_dir(run_dir)).path(24))


@pytest.fixture
def streamed_overrides(encoded_overrides, tmp_path):
    """Encoded shards behind a URL; a node's folder holds five of twelve tars."""
    folder = layout.shards_dir(configuration.load([], encoded_overrides))
    room = 5 * max(tar.stat().st_size for tar in folder.glob("train-*.tar")) / 1e9
    with serving(folder) as store:
        cache = [f"data.tars={store.url}", f"data.cache_dir={tmp_path}", f"data.cache_gb={room:.9f}"]
        yield [*encoded_overrides, *cache, "data.random_crop=0.3"]


@pytest.mark.parametrize(
    "world,data,extra",
    [
        (1, "tiny_overrides", ["train.precision=bf16", *ATTENTION]),
        (2, "streamed_overrides", ["train.micro_batch=2"]),
        pytest.param(2, "tiny_overrides", ["train.step=compiled"], marks=pytest.mark.slow),
    ],
)
def test_stop_and_resume_equals_an_uninterrupted_run_bitwise(request, tmp_path, world, data, extra):
    """Stopped twice (one rank is asked, all stop), nothing is lost and no step is missing or doubled."""
    overrides = request.getfixturevalue(data)
    for name in ("whole", "parts"):
        make_run(tmp_path / name, [*overrides, *SHORT, *extra])
    run_ranks(WORKER, [str(tmp_path / "whole")], world)
    for asked_at, saved in ((9, 11), (17, 18)):  # numbers are read one step late, but at a checkpoint at once
        done = run_ranks(WORKER, [str(tmp_path / "parts"), str(asked_at)], world)
        assert all(f"stopped: by a signal, saved at step {saved} of 24" in p.stdout for p in done)
    run_ranks(WORKER, [str(tmp_path / "parts")], world)
    whole, parts = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name
    assert deterministic_metrics(tmp_path / "whole") == deterministic_metrics(tmp_path / "parts")


@pytest.fixture(scope="module")
def trained(tiny_overrides, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run_stage_here(configuration.load([], [*tiny_overrides, *SHORT]), run_dir, "train")
    return run_dir


def test_a_finished_run_says_so(trained):
    done = json.loads((trained / "train" / "done.json").read_text())
    assert (done["step"], done["images"]) == (24, 192) and done["peak_memory_mib"] > 0


def test_metrics_have_every_promised_number(trained):
    train, val = [dict(deterministic_metrics(trained)[i][1]) for i in (0, -1)]
    for name in ("loss", "nll", "kl", "log_det", "mse", "sigma", "beta", "lr", "grad_norm", "bad_steps"):
        assert f"train/{name}" in train
    for name in ("loss", "bits_per_dim", "mse", "active_units", "log_det_min", "log_det_mean", "log_det_max"):
        assert f"val_ema/{name}" in val and f"val_raw/{name}" in val


def test_a_further_loss_term_shows_up_in_training_and_validation(tiny_overrides, tmp_path):
    overrides = [*tiny_overrides, "train.images=16", "train.log_interval=1", "model.losses.edges.weight=0.1"]
    run_stage_here(configuration.load([], overrides), tmp_path / "run", "train")
    (_, first), (_, second), (_, val) = deterministic_metrics(tmp_path / "run")
    for values in (first, second):
        expected = values["train/nll"] + values["train/beta"] * values["train/kl"]
        assert values["train/edges"] > 0
        assert values["train/loss"] == pytest.approx(expected + 0.1 * values["train/edges"])
    for weights in ("val_raw", "val_ema"):
        assert val[f"{weights}/edges"] > 0
        assert val[f"{weights}/loss"] == pytest.approx(val[f"{weights}/nll"] + val[f"{weights}/kl"])


def test_only_rank_0_records(tmp_path):
    recorder = Recorder()
    recorder.append(1, {"train/loss": 1.0})
    recorder.save(1, {}, {}, wait=True)
    recorder.poll()
    recorder.close()
    recorder.finish({})
    assert not list(tmp_path.iterdir())


def test_checkpoints_are_few_and_best_is_the_lowest_validation_loss(trained):
    store = Checkpoints(layout.checkpoints_dir(trained))
    losses = {s: v["val_ema/loss"] for s, v in deterministic_metrics(trained) if "val_ema/loss" in v}
    assert store.best() == min(losses, key=losses.get)
    assert set(store.steps()) == {21, 24, store.best()}


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_loaded_weights_are_those_of_the_checkpoint(trained, weights):
    model, info = load_model(trained, "latest", weights, torch.device("cpu"))
    saved = final_tensors(trained)
    prefix = {"ema": "ema.", "raw": "model."}[weights]
    assert info.step == 24 and info.s2 > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[prefix + name])


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    trained, tmp_path, tiny_overrides, caplog
):
    shutil.copytree(trained, tmp_path / "run")
    store = Checkpoints(layout.checkpoints_dir(tmp_path / "run"))
    data = bytearray(store.path(24).read_bytes())
    data[len(data) // 2] ^= 1
    store.path(24).write_bytes(data)
    with pytest.raises(CheckpointError, match="step_00000024.safetensors: damaged"):
        store.read(24)
    run_stage_here(configuration.load([], [*tiny_overrides, *SHORT]), tmp_path / "run", "train")
    assert (store.folder / "step_00000024.safetensors.damaged").exists()
    again = load_file(store.path(24))
    assert all(torch.equal(again[n], t) for n, t in final_tensors(trained).items())


@pytest.mark.parametrize("interval", [1, 5, 6])
def test_a_crash_costs_one_interval_at_most_however_slow_the_disk(
    tiny_overrides, tmp_path, monkeypatch, interval
):
    """Every write takes as long as it can: until training waits for it."""
    waiting, exposed, store = threading.Event(), [], Checkpoints(layout.checkpoints_dir(tmp_path / "run"))
    save_file, wait, train_step = checkpoint.save_file, Saver.wait, Trainer.train_step

    def slow_save(*args):
        assert waiting.wait(60)
        save_file(*args)

    def wait_for_it(self):
        waiting.set()
        wait(self)
        waiting.clear()

    def count(self, batch):
        record = train_step(self, batch)
        exposed.append(self.step - max(store.steps(), default=0))
        return record

    monkeypatch.setattr(checkpoint, "save_file", slow_save)
    monkeypatch.setattr(Saver, "wait", wait_for_it)
    monkeypatch.setattr(Trainer, "train_step", count)
    overrides = [
        *tiny_overrides,
        "train.images=192",
        "train.val_interval=12",
        f"train.max_lost_steps={interval}",
    ]
    run_stage_here(configuration.load([], overrides), tmp_path / "run", "train")
    assert max(exposed) == max(1, interval // 2 * 2)


def test_another_configuration_is_refused_by_key(trained, tiny_overrides, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/inputs.json").unlink()
    changed = configuration.load([], [*tiny_overrides, *SHORT, "optim.lr=0.5", "data.flip=false"])
    with pytest.raises(
        CheckpointError, match=r"data.flip: True then, False now; optim.lr: 0.001 then, 0.5 now"
    ):
        run_stage_here(changed, tmp_path / "run", "train")
    assert not (tmp_path / "run/inputs.json").exists()  # what was refused is not recorded


def test_a_checkpoint_that_is_older_than_a_key_continues(trained, tiny_overrides, tmp_path):
    """A key that its sections lack counts as the key's default, and as nothing else."""
    shutil.copytree(trained, tmp_path / "run")
    store = Checkpoints(layout.checkpoints_dir(tmp_path / "run"))
    for step in store.steps():
        meta = dict(store.read(step).meta)
        sections = meta["sections"]
        for key in ("encoder", "decoder", "losses"):
            del sections["model"][key]
        for key in ("name", "schedule"):
            del sections["optim"][key]
        file = store.description(step)
        file.write_text(json.dumps(seal({k: v for k, v in meta.items() if k != "digest"})))
    load_model(tmp_path / "run", "latest", "ema", torch.device("cpu"))
    longer = [*tiny_overrides, *SHORT, "train.images=208"]
    with pytest.raises(CheckpointError, match="optim.schedule: 'cosine' then, 'linear' now"):
        run_stage_here(configuration.load([], [*longer, "optim.schedule=linear"]), tmp_path / "run", "train")
    run_stage_here(configuration.load([], longer), tmp_path / "run", "train")
    assert store.steps()[-1] == 26


def test_a_run_that_is_shortened_after_a_stop_can_be_used(tiny_overrides, tmp_path):
    """No step is left to make, and its newest checkpoint was saved without a validation."""
    run_dir = tmp_path / "run"
    config = make_run(run_dir, [*tiny_overrides, *SHORT])
    stop = StopFlag()
    stop.requested = True
    with pytest.raises(Stopped):
        run_train(config, Context(run_dir, Ranks(), stop, logging.getLogger("test")))
    (step,) = Checkpoints(layout.checkpoints_dir(run_dir)).steps()
    shorter = configuration.load([], [*tiny_overrides, *SHORT, f"train.images={8 * step}"])
    run_stage_here(shorter, run_dir, "train")
    assert json.loads((run_dir / "train/done.json").read_text())["step"] == step
    for which in ("best", "latest"):
        _, info = load_model(run_dir, which, "ema", torch.device("cpu"))
        assert info.step == step and info.s2 > 0


def test_training_longer_continues(trained, tiny_overrides, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    run_stage_here(
        configuration.load([], [*tiny_overrides, *SHORT, "train.images=208"]), tmp_path / "run", "train"
    )
    assert [s for s, _ in deterministic_metrics(tmp_path / "run")][-2:] == [26, 26]


def test_init_from_starts_with_the_best_weights_of_another_run(trained, tiny_overrides, tmp_path):
    config = make_run(tmp_path / "run", [*tiny_overrides, f"train.init_from={trained}"])
    trainer = Trainer(
        phase("train", config), Context(tmp_path / "run", Ranks(), StopFlag(), logging.getLogger("test"))
    )
    trainer.resume()
    best, _ = load_model(trained, "best", "ema", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), best.parameters(), strict=True))


def test_init_from_takes_the_trained_weights_of_a_run_that_goes_on_to_refine(
    trained, tiny_overrides, tmp_path
):
    """A refined model has another prior, which the new training could not hold."""
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    asked = configuration.load([other / "config.yaml"], ["refine.images=64"])
    (other / "config.yaml").write_text(configuration.dump(asked))
    config = make_run(tmp_path / "run", [*tiny_overrides, f"train.init_from={other}"])
    context = Context(tmp_path / "run", Ranks(), StopFlag(), logging.getLogger("test"))
    trainer = Trainer(phase("train", config), context)
    trainer.resume()
    best, _ = load_model(trained, "best", "ema", torch.device("cpu"), "train")
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), best.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("data.attributes=[Male,Smiling]", "'train.init_from': .* its model reads .*data.attributes"),
        ("model.variance.name=learned", "'train.init_from': .* its weights do not fit this model"),
    ],
)
def test_init_from_refuses_a_model_of_another_kind(trained, tiny_overrides, tmp_path, changed, said):
    config = make_run(tmp_path / "run", [*tiny_overrides, f"train.init_from={trained}", changed])
    context = Context(tmp_path / "run", Ranks(), StopFlag(), logging.getLogger("test"))
    with pytest.raises(CheckpointError, match=said):
        Trainer(phase("train", config), context).resume()


def test_a_run_with_checkpoints_needs_its_source_no_more_and_no_state_of_fp16(
    trained, tiny_overrides, tmp_path
):
    """Checkpoints of other precisions hold no state of the gradient's scaler."""
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    words = [*tiny_overrides, *SHORT, f"train.init_from={source}"]
    run_stage_here(configuration.load([], words), tmp_path / "run", "train")
    shutil.rmtree(source)
    config = configuration.load([], [*words, "train.images=208"])
    context = Context(tmp_path / "run", Ranks(), StopFlag(), logging.getLogger("test"))
    trainer = Trainer(phase("train", config), context)
    trainer.precision.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer.resume()
    assert trainer.step == 24


def poisoned_trainer(config: RunConfig, run_dir: Path, steps: set[int]) -> Trainer:
    trainer = Trainer(
        phase("train", config), Context(run_dir, Ranks(), StopFlag(), logging.getLogger("test"))
    )
    prepare = trainer.prepare
    trainer.prepare = lambda step: prepare(step)._replace(
        noise=prepare(step).noise * (float("nan") if step in steps else 1)
    )
    return trainer


def test_a_step_without_a_finite_loss_changes_nothing(tiny_overrides, tmp_path):
    trainer = poisoned_trainer(make_run(tmp_path / "run", tiny_overrides), tmp_path / "run", {1})
    trainer.train_step(trainer.prepare(0))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    record = trainer.train_step(trainer.prepare(1))
    measured = dict(zip(record.names, record.numbers.tolist(), strict=True))
    assert measured["bad"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    trainer.train_step(trainer.prepare(2))
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_too_many_bad_steps_stop_the_run_with_the_step(tiny_overrides, tmp_path, monkeypatch):
    config = make_run(tmp_path / "run", [*tiny_overrides, "train.max_bad_steps=2"])
    monkeypatch.setattr(
        "pipeline.training.loop.Trainer", lambda p, ctx: poisoned_trainer(p.config, ctx.run_dir, {5, 6, 7, 8})
    )
    with pytest.raises(TrainingDiverged, match="step 8: 3 steps in a row.*step_00000009_rank0.json"):
        run_train(config, Context(tmp_path / "run", Ranks(), StopFlag(), logging.getLogger("test")))
    told = json.loads((tmp_path / "run/train/forensics/step_00000009_rank0.json").read_text())
    assert [step["step"] for step in told["steps"]] == [6, 7, 8]
    assert {step["terms"]["loss"] for step in told["steps"]} == {"nan"}
    shards = Shards(layout.shards_dir(config), "train")
    wanted = TrainBatches(shards, config.data, config.seed, 8, 8, 0, 1).at(6).indices
    assert told["steps"][1]["samples"] == shards.keys(wanted)


def test_a_profile_is_a_trace(tiny_overrides, tmp_path):
    config = configuration.load([], [*tiny_overrides, "train.images=64", "train.profile=2"])
    run_stage_here(config, tmp_path / "run", "train")
    trace = json.loads((tmp_path / "run" / "train" / "trace_rank0.json").read_text())
    assert any("conv" in event.get("name", "") for event in trace["traceEvents"])
