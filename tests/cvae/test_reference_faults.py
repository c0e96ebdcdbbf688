"""Faults of the reference implementation of arXiv 2511.08946 must not come back here.

Most tests use the paper's own configuration. test_flow.py and test_model.py cover its fixed mask, its
inverse and its sampling without f^-1.
"""

import logging
from pathlib import Path

import pytest
import torch

from cvae.model import CVAE
from pipeline.config import load as configuration
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from pipeline.training.checkpoints.saver import Saver
from pipeline.training.phases import phase
from pipeline.training.trainer import Trainer

VARIANTS = sorted(Path("configs").glob("*.yaml"))


def build(file: Path) -> tuple[CVAE, int]:
    config = configuration.load([file])
    torch.manual_seed(0)
    return CVAE(config.model, config.shard.size, len(config.data.attributes) or 40), config.shard.size


def batch(model: CVAE, n: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, model.image_size, model.image_size, generator=g) * 2 - 1
    return (
        x,
        (torch.rand(n, model.n_attributes, generator=g) > 0.5).float(),
        torch.randn(n, model.z_dim, generator=g),
    )


@pytest.mark.parametrize("file", VARIANTS, ids=lambda p: p.stem)
def test_every_parameter_of_every_variant_learns(file):
    model, _ = build(file)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(model, 4, step), 1.0, 1 / 4).objective.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_paper_samples_come_from_the_prior_that_was_trained():
    """The paper's single coupling layer maps a sample back onto the noise that it was made of."""
    model = build(Path("configs/paper.yaml"))[0].double()
    torch.manual_seed(1)
    for p in model.conditional_prior.parameters():
        torch.nn.init.normal_(p, std=0.1)
    _, y, noise = (t.double() for t in batch(model, 8))
    p = model.prior(y)
    u, _ = p.flow(p.sample(noise), p.e)
    torch.testing.assert_close((u - p.base.mean) / p.base.log_std.exp(), noise, atol=1e-6, rtol=1e-6)


def test_no_batch_size_is_built_in():
    model, _ = build(Path("configs/paper.yaml"))
    x, y, noise = batch(model, 5)
    together = model.decode(model.encode(x, y).sample(noise), y)
    for n in (1, 3):
        part = model.decode(model.encode(x[:n], y[:n]).sample(noise[:n]), y[:n])
        torch.testing.assert_close(part, together[:n], atol=1e-5, rtol=1e-5)


def test_reconstruction_and_kl_are_both_sums_over_an_image():
    """Doubling the batch changes neither term: nothing is averaged over pixels while the other is summed."""
    model, _ = build(Path("configs/gaussian_cvae.yaml"))
    x, y, noise = batch(model, 4)
    once = model(x, y, noise, 1.0, 1 / 4)
    twice = model(x.repeat(2, 1, 1, 1), y.repeat(2, 1), noise.repeat(2, 1), 1.0, 1 / 8)
    torch.testing.assert_close(once.values["nll"], twice.values["nll"], rtol=1e-5, atol=0)
    torch.testing.assert_close(once.values["kl"], twice.values["kl"], rtol=1e-5, atol=0)
    assert (
        once.values["nll"] > 4 * once.values["mse"] * model.pixels / 2
    )  # SSE/2 and the constant, not a mean


@pytest.fixture
def trainer(tiny_overrides, tmp_path) -> Trainer:
    config = configuration.load([], tiny_overrides)
    return Trainer(phase("train", config), Context(tmp_path, Ranks(), StopFlag(), logging.getLogger("test")))


def test_validation_gives_the_model_back_in_training_mode_and_repeats_itself(trainer):
    first = trainer.validate()
    assert trainer.model.training
    assert trainer.validate() == first


def test_best_weights_are_a_copy_on_disk(trainer):
    trainer.train_step(trainer.prepare(0))
    saver = Saver(trainer.checkpoints)
    saver.save(trainer.step, trainer.state(), trainer.meta(trainer.validate()))
    saver.close()
    before = trainer.checkpoints.read(1).tensors("ema.")
    for step in range(1, 5):
        trainer.train_step(trainer.prepare(step))
    after = trainer.checkpoints.read(1).tensors("ema.")
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not all(torch.equal(after[n], p) for n, p in trainer.ema.model.state_dict().items())
