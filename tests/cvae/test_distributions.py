"""Every kind of distribution: KL against Monte Carlo, and what the base class gives to a new kind."""

import math

import pytest
import torch
from torch import Tensor

from cvae.config import PRIOR_NAMES, FlowConfig, FlowMatchingConfig, ModelConfig, NetConfig, PriorConfig
from cvae.distributions import DiagonalGaussian, Distribution
from cvae.priors.prior import PRIORS

D, E, B = 6, 5, 3


class Laplace(Distribution):
    """A kind that only knows its density and its samples."""

    def log_prob(self, z: Tensor) -> Tensor:
        return (-z.abs() - math.log(2)).sum(-1)

    def sample(self, noise: Tensor) -> Tensor:
        uniform = torch.special.ndtr(noise) - 0.5
        return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def make_prior(name: str, n: int = B) -> Distribution:
    """The same distribution for `n` images."""
    torch.manual_seed(0)
    flow = FlowConfig(layers=3, hidden=8)
    matching = FlowMatchingConfig(width=8, blocks=1, condition=8, steps=3)
    prior = PriorConfig(name, hidden=8, flow=flow, flow_matching=matching)
    config = ModelConfig(z_dim=D, net=NetConfig([8]), prior=prior)
    net = PRIORS[name](config, E).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net(torch.randn(1, E, dtype=torch.float64).expand(n, E))


def make_posterior(n: int = B) -> DiagonalGaussian:
    g = torch.Generator().manual_seed(1)
    mean = torch.randn(1, D, generator=g, dtype=torch.float64)
    log_std = 0.3 * torch.randn(1, D, generator=g, dtype=torch.float64) - 0.5
    return DiagonalGaussian(mean.expand(n, D), log_std.expand(n, D))


@pytest.mark.parametrize("name", [*PRIOR_NAMES, "laplace"])
def test_kl_from_equals_monte_carlo(name):
    n = 20_000
    p = Laplace() if name == "laplace" else make_prior(name, n)
    q = make_posterior(n)
    g = torch.Generator().manual_seed(2)
    z, other = (q.sample(torch.randn(n, D, generator=g, dtype=torch.float64)) for _ in range(2))
    with torch.no_grad():
        ours = p.kl_from(q, z).kl
        direct = q.log_prob(other) - p.log_prob(other)
    error = 4 * float(ours.std() + direct.std()) / math.sqrt(n)
    assert error < 0.3 < float(direct.mean())
    assert float(ours.mean()) == pytest.approx(float(direct.mean()), abs=error)


@pytest.mark.parametrize("name", PRIOR_NAMES)
def test_log_det_of_the_kl_is_that_of_the_density(name):
    p, q = make_prior(name), make_posterior()
    z = q.sample(torch.ones(B, D, dtype=torch.float64))
    found = p.kl_from(q, z)
    assert torch.equal(found.log_det, p.log_det(z))
    assert (found.log_det != 0).all() == (name == "flow")


def test_a_flow_runs_once_for_kl_and_log_det():
    p, q = make_prior("flow"), make_posterior()
    calls = []
    p.flow.register_forward_hook(lambda *_: calls.append(1))
    z = q.sample(torch.ones(B, D, dtype=torch.float64))
    found = p.kl_from(q, z)
    assert len(calls) == 1
    default = Distribution.kl_from(p, q, z)
    torch.testing.assert_close(found, default, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PRIOR_NAMES)
def test_units_have_a_kl_only_if_they_are_independent(name):
    p, q = make_prior(name), make_posterior()
    per_unit = p.kl_per_unit(q)
    if not isinstance(p, DiagonalGaussian):
        assert per_unit is None
        return
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(
        normal(q.mean, q.log_std.exp()), normal(p.mean, p.log_std.exp())
    )
    torch.testing.assert_close(per_unit, wanted)
    torch.testing.assert_close(p.kl_from(q, q.mean).kl, wanted.sum(1))


def test_kl_per_unit_is_computed_in_the_type_of_q():
    single = DiagonalGaussian(torch.full((B, D), 0.1), torch.full((B, D), -0.2))
    double = DiagonalGaussian(single.mean.double(), single.log_std.double())
    q = make_posterior()
    assert torch.equal(single.kl_per_unit(q), double.kl_per_unit(q))
