"""One optimizer step: the same in every way that it can run, few operations, and nothing that stops a GPU."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.config import load as configuration
from pipeline.errors import ConfigError
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from pipeline.training.optim import OPTIMIZERS
from pipeline.training.phases import phase
from pipeline.training.step import modes
from pipeline.training.step.flat import FlatWeights
from pipeline.training.trainer import Trainer
from tests.conftest import ROOT
from tests.tiny_run import ATTENTION, SIZE, make_shards, tiny_config
from tools.dev.benchmarks.host import operations

MOST_OPERATIONS = 1_800  # of an eager step of configs/sigma_cvae_nf.yaml


def trainer_of(config, folder: Path) -> Trainer:
    return Trainer(phase("train", config), Context(folder, Ranks(), StopFlag(), logging.getLogger("test")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Makes trainers of a model of two coupling layers on 32-pixel noise."""
    base = tmp_path_factory.mktemp("step")
    make_shards(tiny_config(base))
    numbers = iter(range(100))

    def make(*overrides: str) -> Trainer:
        config = tiny_config(base, "train.batch_size=4", "train.kl_warmup_images=40", *overrides)
        return trainer_of(config, base / f"run{next(numbers)}")

    return make


def follow(trainer: Trainer, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of all steps, and the weights and averages at the end."""
    numbers = [trainer.train_step(trainer.prepare(step)).numbers.clone() for step in range(steps)]
    return torch.stack(numbers), trainer.weights.vector.detach(), trainer.ema.averages.vector.detach()


def test_an_eager_step_has_few_operations(tmp_path):
    overrides = [f"runs_dir={tmp_path}", f"shard.size={SIZE}", "train.batch_size=2", "tracking.enabled=false"]
    overrides += ["train.step=eager", "train.precision=fp32"]  # bf16, where a CPU has it, adds casts
    config = configuration.load([ROOT / "configs/sigma_cvae_nf.yaml"], overrides)
    make_shards(config)
    trainer = trainer_of(config, tmp_path / "run")
    batch = trainer.prepare(0)
    trainer.train_step(batch)
    assert operations(lambda: trainer.train_step(batch)) <= MOST_OPERATIONS


class OnlyOnTheDevice(TorchDispatchMode):
    """Fails where a captured step would: the host reads a tensor, or makes one from numbers of its own."""

    forbidden = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select")

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = str(function).split(".")[1]
        assert name not in self.forbidden, name
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.rotation_degrees=10", "model.losses.edges.weight=0.1"],
        ["train.micro_batch=2", "model.variance.name=learned"],
        ["model.prior.name=gaussian", "model.conditioner.name=embedding", "model.encoder.name=residual"],
        ATTENTION,
    ],
)
def test_the_arithmetic_never_asks_the_host(tiny, overrides):
    trainer = tiny(*overrides)
    trainer.train_step(trainer.prepare(0))  # the first step sets up the optimizer's state
    batch, controls = list(trainer.prepare(1)[1:]), torch.tensor([0.5, 1e-3, 0.1, 0.0], dtype=torch.float64)
    with OnlyOnTheDevice():
        numbers = trainer.arithmetic(batch, controls)
    assert numbers.isfinite().all()


def test_a_gradient_that_is_never_finite_is_counted_once_the_scale_is_of_no_use(tiny, monkeypatch):
    """With fp16 the scaler halves its scale for ever, and the loss stays finite."""
    trainer = tiny()
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    gradients = trainer.arithmetic._gradients

    def overflowing(*inputs):
        found = gradients(*inputs)
        trainer.weights.vector.grad[:1].fill_(float("inf"))
        return found

    monkeypatch.setattr(trainer.arithmetic, "_gradients", overflowing)
    records = [trainer.train_step(trainer.prepare(step)) for step in range(5)]  # scales 4, 2, 1, 1/2, 1/4
    assert [record.numbers[record.names.index("bad")].item() for record in records] == [0, 0, 0, 1, 1]
    batch, controls = list(trainer.prepare(5)[1:]), torch.tensor([0.5, 1e-3, 0.1, 0.0], dtype=torch.float64)
    with OnlyOnTheDevice():
        trainer.arithmetic(batch, controls)


def capture_by_calling(step):
    """A capture for a CPU: the replay calls the step again, and writes into the same tensor."""
    numbers: list[Tensor] = []
    result = torch.zeros(20, dtype=torch.float64)

    def replay() -> None:
        numbers[:] = [step()]
        result[: len(numbers[0])] = numbers[0]

    return replay, result


def graphed(trainer: Trainer, capture, may_stay_eager: bool = False) -> Trainer:
    """Let the steps of `trainer` run as those of a graph do."""
    cpu = torch.device("cpu")
    trainer.run_step = modes.GraphedStep(trainer.arithmetic, cpu, capture, may_stay_eager, trainer.log)
    return trainer


def test_the_captured_step_follows_the_eager_one_bitwise(tiny):
    captured = []

    def capture(step):
        captured.append(step)
        return capture_by_calling(step)

    steps = modes.WARM_UP + 3
    numbers, *weights = follow(tiny("train.step=eager"), steps)
    same_numbers, *same_weights = follow_padded(graphed(tiny("train.step=eager"), capture), steps)
    assert len(captured) == 1
    assert torch.equal(numbers, same_numbers[:, : numbers.shape[1]])
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))


def test_a_capture_that_fails_leaves_auto_eager_and_stops_a_run_that_asked_for_it(tiny, caplog):
    def capture(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    steps = modes.WARM_UP + 2
    numbers, *_ = follow(tiny("train.step=eager"), steps)
    same, *_ = follow(graphed(tiny("train.step=eager"), capture, may_stay_eager=True), steps)
    assert torch.equal(numbers, same)
    assert caplog.text.count("could not be captured (operation not permitted") == 1
    with pytest.raises(ConfigError, match="could not be captured .operation not permitted.*train.step=eager"):
        follow(graphed(tiny("train.step=eager"), capture), steps)


def follow_padded(trainer: Trainer, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.zeros(steps, 20, dtype=torch.float64)
    for step in range(steps):
        own = trainer.train_step(trainer.prepare(step)).numbers
        numbers[step, : len(own)] = own
    return numbers, trainer.weights.vector.detach(), trainer.ema.averages.vector.detach()


@pytest.mark.slow  # half a minute
def test_the_compiled_step_follows_the_eager_one(tiny, monkeypatch):
    """Traced and differentiated by the compiler; its kernels are those of eager mode, for speed."""
    real = torch.compile
    monkeypatch.setattr(modes.torch, "compile", lambda f, **how: real(f, backend="aot_eager", **how))
    eager, compiled = tiny("train.precision=fp64"), tiny("train.precision=fp64", "train.step=compiled")
    for one, other in zip(follow(eager, 4), follow(compiled, 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_really_compiled_step_follows_the_eager_one(tiny):
    eager, compiled = tiny("train.precision=fp64"), tiny("train.precision=fp64", "train.step=compiled")
    for one, other in zip(follow(eager, 4), follow(compiled, 4), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_what_does_not_hold_is_refused_by_name_and_auto_says_why(tiny, monkeypatch, caplog):
    with pytest.raises(ConfigError, match="'train.step': graph is not possible: there is no GPU"):
        tiny("train.step=graph")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="compiled is not possible: torch.compile needs a C\\+\\+ compiler"):
        tiny("train.step=compiled")
    with caplog.at_level(logging.INFO, "test"):
        tiny()
    assert "steps run eager: " in caplog.text


def test_a_compiler_that_fails_is_told_and_leaves_no_trace(tiny, monkeypatch):
    def fails(function, **how):
        def run(*inputs):
            raise RuntimeError("no kernel")

        return run

    trainer = tiny("train.step=eager")
    monkeypatch.setattr(modes.torch, "compile", fails)
    blank = trainer.batches.blank()
    assert "no kernel" in modes.compile_objective(trainer.arithmetic, blank, torch.device("cpu"))
    assert trainer.train_step(trainer.prepare(0)).numbers.isfinite().all()


def test_a_graph_needs_a_capturable_optimizer_and_no_scaler(tiny, monkeypatch):
    trainer = tiny("train.step=eager")
    gpu = torch.device("cuda")
    assert modes.obstacle_to_graph(trainer.arithmetic, gpu) == ""
    assert modes.fastest(trainer.arithmetic, gpu)[0] == "graph"
    trainer.optimizer.param_groups[0]["capturable"] = False
    assert "capturable" in modes.obstacle_to_graph(trainer.arithmetic, gpu)
    monkeypatch.setattr(trainer.precision, "scaler", torch.amp.GradScaler("cpu"))
    assert "fp16" in modes.fastest(trainer.arithmetic, gpu)[1]


def test_flat_weights_are_the_models_and_keep_its_layout():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Conv2d(5, 2, 3))
    model = model.to(memory_format=torch.channels_last)
    model[1].bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = FlatWeights(model)
    assert list(weights.tensors) == ["0.weight", "0.bias", "1.weight"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.stride() == before[name].stride()
    weights.vector.data.fill_(2.0)
    assert (model[0].weight == 2).all() and torch.equal(model[1].bias, before["1.bias"])
    weights.gather_gradients()
    model(torch.ones(1, 3, 6, 6)).sum().backward()
    assert float(weights.vector.grad.norm()) == pytest.approx(
        float(torch.cat([t.grad.flatten() for t in weights.tensors.values()]).norm()), rel=1e-5
    )


def test_moments_have_the_names_and_shapes_that_each_tensor_had_alone():
    """Checkpoints were made of one state for each tensor, and still are."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    weights = FlatWeights(model)
    weights.gather_gradients()
    config = configuration.load([]).optim
    optimizer = OPTIMIZERS["adam"](weights.parameters(), config)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    moments = weights.moments(optimizer)
    assert {name: tuple(moment.shape) for name, moment in moments.items()} == {
        "weight.step": (), "bias.step": (),
        "weight.exp_avg": (2, 3), "bias.exp_avg": (2,),
        "weight.exp_avg_sq": (2, 3), "bias.exp_avg_sq": (2,),
    }  # fmt: skip
    saved = {name: moment.clone() for name, moment in moments.items()}
    optimizer.state.clear()
    weights.restore_moments(optimizer, saved)
    for name, moment in weights.moments(optimizer).items():
        assert torch.equal(moment, saved[name]), name
