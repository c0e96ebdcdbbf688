"""Optimizers, schedules and the moving average, over their registries."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pipeline.config.schema import OPTIMIZER_NAMES, SCHEDULE_NAMES, OptimConfig
from pipeline.runtime.distributed import Ranks
from pipeline.training import optim
from pipeline.training.optim import (
    OPTIMIZERS,
    SCHEDULES,
    Ema,
    Precision,
    kl_weight,
    learning_rate,
    make_optimizer,
)
from pipeline.training.step.flat import FlatWeights
from tests.conftest import ROOT

CONFIG = OptimConfig(lr=0.1, warmup_images=100, final_lr_fraction=0.25)


def test_registries_are_what_the_configuration_names():
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES
    assert tuple(SCHEDULES) == SCHEDULE_NAMES


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
def test_a_schedule_falls_from_the_peak_to_the_final_fraction(name):
    config = replace(CONFIG, schedule=name)
    rates = [learning_rate(images, 1100, config) for images in range(0, 1101, 50)]
    assert rates[0] == pytest.approx(0.1 / 101) and rates[1] < 0.1
    assert rates[2] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[2:], rates[3:], strict=False))
    assert rates[-1] == pytest.approx(0.025)
    assert rates[12] == pytest.approx((0.1 + 0.025) / 2)  # halfway
    assert learning_rate(5000, 1100, config) == pytest.approx(0.025)


@pytest.mark.parametrize(
    "has, expected",
    [
        ({"avx2": True}, "fp32"),
        ({"avx512_f": True}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ],
)
def test_auto_precision_is_what_the_cpu_has(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert Precision("auto", Ranks()).name == expected


def test_one_rank_without_bf16_decides_for_all(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(Ranks, "reduce_sum", lambda self, x: x.double() + 1)  # a peer that lacks it
    assert Precision("auto", Ranks(0, 2)).name == "fp32"


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_emulated_bf16_is_told_once(monkeypatch, caplog, rank, lines):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert Precision("bf16", Ranks(rank)).half is torch.bfloat16
    assert [record.levelname for record in caplog.records] == ["WARNING"] * lines


def one_step(name: str, bad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of a linear map before and after one step on its squared output."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, replace(CONFIG, name=name))
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.found_inf = torch.tensor(float(bad))
    optimizer.step()
    return before, model.weight.detach()


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_an_optimizer_steps_and_skips_a_bad_step(name):
    before, after = one_step(name, bad=False)
    assert not torch.equal(before, after)
    before, after = one_step(name, bad=True)
    assert torch.equal(before, after)


def test_a_new_optimizer_is_one_line(monkeypatch):
    def sgd(parameters, config):
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.beta1, fused=True)

    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", sgd)
    test_an_optimizer_steps_and_skips_a_bad_step("sgd")


def test_the_kl_weight_rises_to_one():
    assert [kl_weight(images, 100) for images in (0, 25, 100, 900)] == [0.0, 0.25, 1.0, 1.0]
    assert kl_weight(0, 0) == 1.0


@pytest.mark.parametrize(
    "step,pace", [(10_000, 0.1), (0, 0.9)]
)  # the first average follows nearly all of the way
def test_the_average_follows_the_weights(step, pace):
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, FlatWeights(model), decay=0.9)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(torch.tensor(ema.pace(step)))
    torch.testing.assert_close(ema.model.weight, start + pace)
    torch.testing.assert_close(model.weight, start + 1)


ALONE = """
import sys, torch
from pipeline.config.schema import OptimConfig
from pipeline.training.optim import OPTIMIZERS, make_optimizer
for name in OPTIMIZERS:
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimConfig(name=name))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
sys.exit("torch._dynamo" in sys.modules)
"""


def test_an_optimizer_starts_without_the_compiler():
    """To import it takes seconds, at each start of each rank."""
    assert subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT).returncode == 0


def test_a_step_is_that_of_torchs_adamw():
    moved = []
    for kind in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        moved.append(model.weight)
    assert torch.equal(*moved) and not moved[0].grad_fn
