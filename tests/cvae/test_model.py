"""Properties that hold for every combination in the registries."""

import itertools
import math

import pytest
import torch

from cvae.attributes import CONDITIONERS
from cvae.config import (
    ACTIVATION_NAMES,
    CONDITIONER_NAMES,
    NORM_NAMES,
    PRIOR_NAMES,
    VARIANCE_NAMES,
    ConditionerConfig,
    FlowConfig,
    ModelConfig,
    NetConfig,
    PriorConfig,
    VarianceConfig,
)
from cvae.layers import ACTIVATIONS, NORMS
from cvae.losses import importance_weighted_bound
from cvae.model import CVAE
from cvae.prior import PRIORS
from cvae.variance import DECODER_VARIANCES

SIZE, A, D, B = 32, 6, 8, 5


def make(
    prior="flow",
    variance="optimal",
    conditioner="multi_hot",
    net="mlp",
    norm="group",
    size=SIZE,
    dtype=torch.float64,
) -> CVAE:
    torch.manual_seed(0)
    config = ModelConfig(
        z_dim=D,
        net=NetConfig([8, 16, 16], norm=norm, activation="silu" if norm == "group" else "relu"),
        conditioner=ConditionerConfig(conditioner, 4),
        prior=PriorConfig(prior, net, 16, FlowConfig(layers=2, hidden=16)),
        variance=VarianceConfig(variance),
    )
    return CVAE(config, size, A).to(dtype)


def batch(size=SIZE, n=B, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, size, size, generator=g, dtype=dtype) * 2 - 1
    y = (torch.rand(n, A, generator=g) > 0.5).to(dtype)
    return x, y, torch.randn(n, D, generator=g, dtype=dtype)


def shaken(model: CVAE) -> CVAE:
    """Weights away from their zero starts."""
    for p in model.parameters():
        with torch.no_grad():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype))
    return model


EVERY = list(itertools.product(PRIOR_NAMES, VARIANCE_NAMES, CONDITIONER_NAMES))


def test_registries_are_what_the_configuration_names():
    assert (
        tuple(PRIORS) == PRIOR_NAMES
        and tuple(DECODER_VARIANCES) == VARIANCE_NAMES
        and tuple(CONDITIONERS) == CONDITIONER_NAMES
    )
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES and NORMS == NORM_NAMES


@pytest.mark.parametrize("prior,variance,conditioner", EVERY)
def test_every_parameter_has_a_gradient_after_two_steps(prior, variance, conditioner):
    model = make(
        prior, variance, conditioner, "conv1d" if conditioner == "embedding" else "mlp", dtype=torch.float32
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        model(*batch(dtype=torch.float32, seed=step), 1.0, 1 / B).objective.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("prior,variance,conditioner", EVERY)
def test_no_image_influences_another(prior, variance, conditioner):
    model, (x, y, noise) = shaken(make(prior, variance, conditioner)), batch()
    alone = model.encode(x[:1], y[:1])
    together = model.encode(x, y)
    torch.testing.assert_close(alone.mean, together.mean[:1])
    z = together.sample(noise)
    torch.testing.assert_close(model.decode(z[:1], y[:1]), model.decode(z, y)[:1])
    torch.testing.assert_close(model.prior(y[:1]).log_prob(z[:1]), model.prior(y).log_prob(z)[:1])
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())


@pytest.mark.parametrize("prior", PRIOR_NAMES)
def test_prior_density_integrates_to_one(prior):
    """E over samples of a wider Gaussian h of p(z|y)/h(z) is 1, and log_prob and sample belong to one distribution."""
    torch.manual_seed(3)
    config = ModelConfig(
        z_dim=2,
        net=NetConfig([8, 8]),
        prior=PriorConfig(prior, hidden=8, flow=FlowConfig(layers=4, hidden=8)),
    )
    model = shaken(CVAE(config, 16, A)).double()
    y = torch.ones(1, A, dtype=torch.float64).expand(200_000, A)
    wide = 3 * torch.randn(200_000, 2, dtype=torch.float64)
    log_h = torch.distributions.Normal(0.0, 3.0).log_prob(wide).sum(1)
    with torch.no_grad():
        p = model.prior(y)
        assert (p.log_prob(wide) - log_h).exp().mean().item() == pytest.approx(1, abs=0.02)
        samples = p.sample(torch.randn(200_000, 2, dtype=torch.float64))
        weights = (p.log_prob(wide) - log_h).exp()
        torch.testing.assert_close(samples.mean(0), (weights[:, None] * wide).mean(0), atol=0.05, rtol=0)


def test_sampling_undoes_the_flow_unlike_in_the_reference():
    model, (_, y, noise) = shaken(make("flow")), batch()
    p = model.prior(y)
    z = p.sample(noise)
    u, _ = p.flow(z, p.e)
    torch.testing.assert_close(u, p.base.sample(noise))
    assert (
        z - p.base.sample(noise)
    ).abs().max() > 1e-3  # u alone, which the reference feeds to its decoder, is another point


@pytest.mark.parametrize("prior", PRIOR_NAMES)
def test_kl_equals_monte_carlo(prior):
    model, (x, y, _) = shaken(make(prior)), batch(n=2)
    q, p = model.encode(x, y), model.prior(y)
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(20_000, 2, D, generator=g, dtype=torch.float64)
    with torch.no_grad():
        ours = torch.stack(
            [model.sums(x[i : i + 1], y[i : i + 1], n[i : i + 1]).kl for n in draws[:400] for i in range(2)]
        ).view(-1, 2)
        samples = torch.stack([q.log_prob(z) - p.log_prob(z) for z in map(q.sample, draws)])
    error = 4 * (samples.std(0) / math.sqrt(len(samples)) + ours.std(0) / math.sqrt(len(ours)))
    assert ((ours.mean(0) - samples.mean(0)).abs() < error + 1e-6).all()


@pytest.mark.parametrize("prior,variance", list(itertools.product(PRIOR_NAMES, VARIANCE_NAMES)))
def test_objective_is_that_of_the_equations(prior, variance):
    """The returned loss against log-densities of torch.distributions, and the gradient against the undetached loss."""
    model, (x, y, noise) = shaken(make(prior, variance)), batch()
    beta = 0.7
    out = model(x, y, noise, beta, 1 / B)
    q = model.encode(x, y)
    z = q.sample(noise)
    mean, pixels = model.decode(z, y), model.pixels
    mse = (x - mean).square().mean()
    s2 = {"unit": torch.ones(()).double(), "optimal": mse, "learned": model.variance(mse)}[variance]
    nll = -torch.distributions.Normal(mean, s2.sqrt()).log_prob(x).flatten(1).sum(1).mean()
    p = model.prior(y)
    if prior == "flow":
        kl = (-q.entropy() - p.log_prob(z)).mean()
    else:
        qd, pd = (torch.distributions.Normal(d.mean, d.log_std.exp()) for d in (q, p))
        kl = torch.distributions.kl_divergence(qd, pd).sum(1).mean()
    loss = nll + beta * kl  # s2 NOT detached here: it is a stationary point
    torch.testing.assert_close(out.loss, loss.detach())
    wanted = torch.autograd.grad(loss / pixels, list(model.parameters()), allow_unused=True)
    ours = torch.autograd.grad(out.objective, list(model.parameters()), allow_unused=True)
    for w, o in zip(wanted, ours, strict=True):
        assert (w is None) == (o is None)
        if w is not None:
            torch.testing.assert_close(o, w, rtol=1e-8, atol=1e-12)


def test_variance_floor_is_exact_on_both_sides():
    config = VarianceConfig("optimal", floor=0.01)
    variance = DECODER_VARIANCES["optimal"](config)
    assert variance(torch.tensor(0.5)).item() == pytest.approx(0.5)
    assert variance(torch.tensor(0.001)).item() == pytest.approx(0.01)


def test_an_empty_share_contributes_nothing_but_takes_part():
    model = make()
    out = model(*(t[:0] for t in batch()), 1.0, 1 / B, lambda local: local + 1)
    out.objective.backward()
    assert out.objective == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("size", [32, 43, 86, 96])
def test_any_image_size_comes_back(size):
    model = make(size=size, dtype=torch.float32)
    x, y, noise = batch(size, 2, torch.float32)
    assert model.decode(model.encode(x, y).sample(noise), y).shape == x.shape


def test_too_many_halvings_are_refused():
    with pytest.raises(ValueError, match="halvings of a 16 pixel image"):
        CVAE(ModelConfig(net=NetConfig([8] * 4)), 16, A)


def test_importance_weighted_bound_grows_with_k_and_contains_the_elbo():
    model, (x, y, _) = shaken(make()), batch()
    noise = torch.randn(64, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one = torch.stack([importance_weighted_bound(model, x, y, n[None], 0.3) for n in noise]).mean(0)
    many = importance_weighted_bound(model, x, y, noise, 0.3)
    assert (many >= one).all()
    sums = [model.sums(x[:1], y[:1], n[:1]) for n in noise[:, :1]]
    sse = torch.stack([s.sse for s in sums]).mean()
    p_log = -(sse / 0.6 + model.pixels / 2 * math.log(2 * math.pi * 0.3))
    z = [model.encode(x[:1], y[:1]).sample(n[:1]) for n in noise[:, :1]]
    kl = torch.stack(
        [model.encode(x[:1], y[:1]).log_prob(v) - model.prior(y[:1]).log_prob(v) for v in z]
    ).mean()
    torch.testing.assert_close(one[0], (p_log - kl).detach(), rtol=1e-9, atol=1e-6)
