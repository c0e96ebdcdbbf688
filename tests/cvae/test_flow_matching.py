"""The prior `flow_matching`: sampling and its inverse, the density, guidance, both kinds of network."""

import math

import pytest
import torch

from cvae.config import FlowMatchingConfig, ModelConfig, PriorConfig
from cvae.distributions import DiagonalGaussian
from cvae.priors.flow_matching import VELOCITIES, FlowMatchingDistribution
from cvae.priors.prior import FlowMatchingPrior

D, E, B = 16, 5, 4


def make_prior(net: str = "vector", steps: int = 40, weak: float = 0.0) -> FlowMatchingPrior:
    torch.manual_seed(0)
    sizes = {"width": 16, "blocks": 2, "condition": 8, "side": 2, "channels": 8}
    matching = FlowMatchingConfig(net=net, steps=steps, weak=weak, **sizes)
    config = ModelConfig(z_dim=D, prior=PriorConfig("flow_matching", flow_matching=matching))
    prior = FlowMatchingPrior(config, E).double()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    prior.standardise(torch.full((D,), 0.5), torch.full((D,), 2.0))
    return prior


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("net", VELOCITIES)
def test_to_noise_inverts_sample(net):
    p = make_prior(net)(noise(B, E))
    z = p.sample(noise(B, D))
    assert (z - noise(B, D)).abs().max() > 0.1
    assert torch.allclose(p.to_noise(z), noise(B, D), atol=1e-3)


def test_without_velocity_it_is_the_gaussian_of_the_codes():
    prior = make_prior()
    torch.nn.init.zeros_(prior.velocity.last.weight)
    torch.nn.init.zeros_(prior.velocity.last.bias)
    p, z = prior(noise(B, E)), 3 * noise(B, D)
    gaussian = DiagonalGaussian(torch.full((B, D), 0.5), torch.full((B, D), math.log(2.0)))
    assert torch.allclose(p.log_prob(z), gaussian.log_prob(z.double()))


def test_density_equals_the_jacobian_of_the_inverse(monkeypatch):
    """With scaled unit vectors as probes the estimate of the trace is exact."""
    unit_vectors = math.sqrt(D) * torch.eye(D, dtype=torch.float64)
    monkeypatch.setattr(FlowMatchingDistribution, "_probes", staticmethod(lambda z: unit_vectors))
    p = make_prior()(noise(1, E))
    z = p.sample(noise(1, D))
    jacobian = torch.autograd.functional.jacobian(lambda x: p.to_noise(x[None])[0], z[0])
    u = p.to_noise(z)
    exact = -0.5 * u.square().sum() - 0.5 * D * math.log(2 * math.pi) + torch.linalg.slogdet(jacobian)[1]
    assert p.log_prob(z).item() == pytest.approx(exact.item(), abs=1e-2)


def test_guidance_extrapolates_from_the_other_condition():
    prior = make_prior()
    e, free = noise(B, E), torch.zeros(B, E, dtype=torch.float64)
    plain, other = prior(e), prior(free)
    one, zero, two = (plain.guided(other, g).velocity(noise(B, D), 0.3) for g in (1.0, 0.0, 2.0))
    assert torch.equal(one, plain.velocity(noise(B, D), 0.3))
    assert torch.allclose(zero, other.velocity(noise(B, D), 0.3))
    assert torch.allclose(two, 2 * one - zero)


def test_guidance_leads_away_from_the_weak_copy():
    prior, e = make_prior(weak=0.1), noise(B, E)
    early = {name: value.clone() for name, value in prior.state_dict().items()}
    prior.keep_weak(prior)
    for parameter in prior.parameters():  # training goes on
        torch.nn.init.normal_(parameter, std=0.15)
    z, weak = noise(B, D), make_prior()
    weak.load_state_dict({name: early[name] for name in weak.state_dict()})
    one, other = prior(e), prior.to_leave(torch.zeros_like(e))
    assert torch.equal(other.velocity(z, 0.3), weak(torch.zeros_like(e)).velocity(z, 0.3))
    expected = other.velocity(z, 0.3) + 2 * (one.velocity(z, 0.3) - other.velocity(z, 0.3))
    assert torch.allclose(one.guided(other, 2.0).velocity(z, 0.3), expected)


def test_a_weak_copy_is_stored_but_not_trained_and_changes_no_other_weight():
    with_copy, without = make_prior(weak=0.1), make_prior()
    assert [name for name, _ in with_copy.named_parameters()] == [
        name for name, _ in without.named_parameters()
    ]
    stored = with_copy.state_dict()
    assert {name for name in stored if name.startswith("weak.")} == {
        f"weak.{name}" for name in without.state_dict()
    }
    assert all(torch.equal(stored[name], value) for name, value in without.state_dict().items())
    assert torch.equal(with_copy.weak.scale, with_copy.scale)


def test_other_priors_refuse_guidance():
    gaussian = DiagonalGaussian(torch.zeros(1, D), torch.zeros(1, D))
    with pytest.raises(ValueError, match="eval.guidance"):
        gaussian.guided(gaussian, 2.0)


def test_fitting_finds_a_known_law():
    """Codes N(3, 0.5^2) for every condition: samples have their mean and deviation."""
    torch.manual_seed(0)
    prior = make_prior(steps=12).float()
    prior.standardise(torch.full((D,), 2.0), torch.full((D,), 1.0))
    optimizer = torch.optim.Adam(prior.parameters(), 3e-3)
    for _ in range(300):
        z = 3 + 0.5 * torch.randn(64, D)
        loss = prior(torch.zeros(64, E)).fit_loss(z, torch.randn(64, prior.fit_noise)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        samples = prior(torch.zeros(500, E)).sample(torch.randn(500, D))
    assert float(samples.mean()) == pytest.approx(3, abs=0.15)
    assert float(samples.std()) == pytest.approx(0.5, abs=0.12)
