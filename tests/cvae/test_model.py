"""Properties that hold for every combination in the registries."""

import copy
import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

from cvae.attributes import CONDITIONERS
from cvae.config import (
    ACTIVATION_NAMES,
    CONDITIONER_NAMES,
    DECODER_NAMES,
    ENCODER_NAMES,
    LOSS_TERM_NAMES,
    NORM_NAMES,
    PERCEPTUAL_PACKAGE,
    PRIOR_NAMES,
    TRAINED_PRIOR_NAMES,
    VARIANCE_NAMES,
    ConditionerConfig,
    DecoderConfig,
    EdgesConfig,
    EncoderConfig,
    FlowConfig,
    LossConfig,
    ModelConfig,
    NetConfig,
    PerceptualConfig,
    PriorConfig,
    ResidualConfig,
    VarianceConfig,
)
from cvae.losses import LOSS_TERMS, Frozen, LossTerm
from cvae.model import CVAE
from cvae.nets.decoder import DECODERS
from cvae.nets.encoder import ENCODERS
from cvae.nets.layers import ACTIVATIONS, norm
from cvae.nets.residual import without_checkerboard
from cvae.priors.prior import PRIORS
from cvae.variance import DECODER_VARIANCES
from pipeline.evaluation.importance import importance_weighted_bound

SIZE, A, D, B = 32, 6, 8, 5


def make(
    prior="flow",
    variance="optimal",
    conditioner="multi_hot",
    net="mlp",
    norm="group",
    size=SIZE,
    dtype=torch.float64,
    encoder="conv",
    decoder="conv",
    edges=0.0,
) -> CVAE:
    torch.manual_seed(0)
    config = ModelConfig(
        z_dim=D,
        net=NetConfig([8, 16, 16], norm=norm, activation="silu" if norm == "group" else "relu"),
        conditioner=ConditionerConfig(conditioner, 4),
        prior=PriorConfig(prior, net, 16, FlowConfig(layers=2, hidden=16)),
        variance=VarianceConfig(variance),
        encoder=EncoderConfig(encoder),
        decoder=DecoderConfig(decoder),
        losses=LossConfig(EdgesConfig(edges)),
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


EVERY = list(itertools.product(TRAINED_PRIOR_NAMES, VARIANCE_NAMES, CONDITIONER_NAMES))


def test_registries_are_what_the_configuration_names():
    assert tuple(ENCODERS) == ENCODER_NAMES
    assert tuple(DECODERS) == DECODER_NAMES
    assert tuple(PRIORS) == PRIOR_NAMES
    assert tuple(DECODER_VARIANCES) == VARIANCE_NAMES
    assert tuple(CONDITIONERS) == CONDITIONER_NAMES
    assert tuple(LOSS_TERMS) == LOSS_TERM_NAMES
    assert tuple(field.name for field in fields(LossConfig)) == LOSS_TERM_NAMES
    assert tuple(ACTIVATIONS) == ACTIVATION_NAMES
    for name in NORM_NAMES:
        assert norm(name, 12)(torch.randn(2, 12, 3, 3)).shape == (2, 12, 3, 3)


@pytest.mark.parametrize("encoder,decoder", list(itertools.product(ENCODER_NAMES, DECODER_NAMES)))
@pytest.mark.parametrize("size", [32, 43])
def test_encoders_and_decoders_keep_their_interface(encoder, decoder, size):
    """Shapes, value range, float32 under autocast, and a dependence on the attributes."""
    if size == 43 and "residual" in (encoder, decoder):
        with pytest.raises(ValueError, match="model.residual.channels"):
            make(encoder=encoder, decoder=decoder, size=size, dtype=torch.float32)
        return
    model = make(encoder=encoder, decoder=decoder, size=size, dtype=torch.float32)
    for p in model.parameters():  # layers that start at zero hide the attributes
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    x, y, noise = batch(size, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = model.encode(x, y)
        decoded = model.decode(q.sample(noise), y)
    assert q.mean.shape == q.log_std.shape == (B, D) and decoded.shape == x.shape
    assert q.mean.dtype == q.log_std.dtype == decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1 and (q.log_std >= -6).all()
    assert not torch.equal(model.encode(x, 1 - y).mean, model.encode(x, y).mean)
    assert not torch.equal(model.decode(noise, 1 - y), model.decode(noise, y))


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


@pytest.mark.parametrize("prior", TRAINED_PRIOR_NAMES)
def test_prior_density_integrates_to_one(prior):
    """The mean of p(z|y)/h(z) over samples of a wider Gaussian h is 1; `sample` follows `log_prob`."""
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


@pytest.mark.parametrize("prior", TRAINED_PRIOR_NAMES)
def test_kl_equals_monte_carlo(prior):
    model, (x, y, _) = shaken(make(prior)), batch(n=2)
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(20, 2_000, D, generator=g, dtype=torch.float64)
    with torch.no_grad():
        ours = torch.stack(
            [model.sums(x[i % 2][None], y[i % 2][None], n[None])["kl"] for i, n in enumerate(draws[0, :800])]
        ).view(-1, 2)
        many_x, many_y = x.repeat(1_000, 1, 1, 1), y.repeat(1_000, 1)
        q, p = model.encode(many_x, many_y), model.prior(many_y)
        samples = torch.cat([q.log_prob(z) - p.log_prob(z) for z in map(q.sample, draws)]).view(-1, 2)
    error = 4 * (samples.std(0) / math.sqrt(len(samples)) + ours.std(0) / math.sqrt(len(ours)))
    assert ((ours.mean(0) - samples.mean(0)).abs() < error + 1e-6).all()


@pytest.mark.parametrize("prior,variance", list(itertools.product(TRAINED_PRIOR_NAMES, VARIANCE_NAMES)))
def test_objective_is_that_of_the_equations(prior, variance):
    """The loss equals that of torch.distributions; the gradient equals that of the undetached loss."""
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
    torch.testing.assert_close(out.values["loss"], loss.detach())
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
    sse = torch.stack([s["sse"] for s in sums]).mean()
    p_log = -(sse / 0.6 + model.pixels / 2 * math.log(2 * math.pi * 0.3))
    z = [model.encode(x[:1], y[:1]).sample(n[:1]) for n in noise[:, :1]]
    kl = torch.stack(
        [model.encode(x[:1], y[:1]).log_prob(v) - model.prior(y[:1]).log_prob(v) for v in z]
    ).mean()
    torch.testing.assert_close(one[0], (p_log - kl).detach(), rtol=1e-9, atol=1e-6)


def shown_terms(name: str, images: torch.Tensor, decoded: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if name == "perceptual":
        pytest.importorskip(PERCEPTUAL_PACKAGE, reason="needs the extra perceptual")
    config = {"edges": EdgesConfig(1.0), "perceptual": PerceptualConfig(1.0, style=1.0, size=32)}[name]
    return LOSS_TERMS[name](config)(images, decoded, y)


@pytest.mark.parametrize("name", LOSS_TERM_NAMES)
def test_a_loss_term_is_one_number_per_image(name):
    x, y, _ = batch()
    decoded = (0.9 * x).requires_grad_(True)
    values = shown_terms(name, x, decoded, y)
    assert values.shape == (B,) and (values > 0).all()
    torch.testing.assert_close(shown_terms(name, x[:1], decoded[:1], y[:1]), values[:1])
    assert shown_terms(name, x, x, y).abs().max() == 0
    values.sum().backward()
    assert decoded.grad.isfinite().all() and decoded.grad.abs().max() > 0
    assert shown_terms(name, x.half(), x.half(), y).dtype == torch.float32


def test_edges_is_half_the_squared_laplacian():
    x, y, _ = batch(size=8)
    error = x - 0.5 * x
    laplacian = -4 * error[:, :, 1:-1, 1:-1]
    for across, down in ((0, 1), (2, 1), (1, 0), (1, 2)):
        laplacian = laplacian + error[:, :, down : down + 6, across : across + 6]
    wanted = 0.5 * laplacian.square().sum((1, 2, 3))
    torch.testing.assert_close(shown_terms("edges", x, 0.5 * x, y), wanted)


@pytest.mark.parametrize("prior", TRAINED_PRIOR_NAMES)
def test_terms_are_computed_once_and_summed(prior):
    model, (x, y, noise) = shaken(make(prior, edges=0.5)), batch()
    q, values = model.terms(x, y, noise)
    assert tuple(values) == model.term_names
    assert all(value.shape == (B,) for value in values.values())
    sums = model.sums(x, y, noise)
    assert sums["images"] == B
    for name, value in values.items():
        torch.testing.assert_close(sums[name], value.sum())
    torch.testing.assert_close(q.mean, model.encode(x, y).mean)


def test_a_further_term_adds_its_weight_to_the_objective_and_its_name_to_the_values():
    plain, more, (x, y, noise) = shaken(make()), make(edges=0.25), batch()
    more.load_state_dict(plain.state_dict())
    without, with_it = plain(x, y, noise, 0.7, 1 / B), more(x, y, noise, 0.7, 1 / B)
    assert set(with_it.values) - set(without.values) == {"edges"}
    edges = with_it.values["edges"]
    torch.testing.assert_close(with_it.values["loss"], without.values["loss"] + 0.25 * edges)
    added = (0.25 * edges / plain.pixels).detach()
    torch.testing.assert_close(with_it.objective.detach(), without.objective.detach() + added)


class FrozenNetTerm(LossTerm):
    """A perceptual distance: a frozen random network and one trained scale."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.features = Frozen(torch.nn.Conv2d(3, 4, 3))
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images, decoded, y):
        error = self.features(images) - self.features(decoded)
        return self.scale * error.square().flatten(1).sum(1)


def test_a_frozen_network_of_a_term_is_no_part_of_the_model(monkeypatch):
    monkeypatch.setitem(LOSS_TERMS, "edges", FrozenNetTerm)
    plain, model, (x, y, noise) = make(), make(edges=1.0), batch()
    assert model.state_dict().keys() - plain.state_dict().keys() == {"loss_terms.edges.scale"}
    frozen = model.loss_terms["edges"].features.network
    before = copy.deepcopy(frozen.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    out = model(x, y, noise, 1.0, 1 / B)  # float64: the network follows its input
    out.objective.backward()
    optimizer.step()
    assert out.values["edges"] > 0
    assert model.loss_terms["edges"].scale.grad.abs() > 0
    assert all(torch.equal(frozen.state_dict()[key].float(), value) for key, value in before.items())
    assert copy.deepcopy(model).loss_terms["edges"].features.network is frozen


def test_the_state_of_todays_model_keeps_its_names():
    names = set(make().state_dict())
    assert {"encoder.attribute_channel.weight", "encoder.convs.0.weight", "encoder.out.bias"} <= names
    assert {"decoder.linear.weight", "decoder.convs.6.bias", "conditioner.net.0.weight"} <= names
    assert {"conditional_prior.base.net.0.weight", "conditional_prior.flow.layers.1.net.4.bias"} <= names


def test_an_antialiased_decoder_cannot_draw_a_checkerboard():
    places = torch.arange(16)
    rows = (-1.0) ** places[:, None] * torch.ones(16)
    board = rows * rows.T
    smooth = torch.sin(places / 5)[:, None] + torch.cos(places / 4)
    images = torch.stack((board, rows, rows.T, smooth))[:, None]
    filtered = without_checkerboard(images)
    torch.testing.assert_close(filtered[0], torch.zeros(1, 16, 16))
    torch.testing.assert_close(filtered[1:3], images[1:3])
    torch.testing.assert_close(filtered[3], images[3], atol=1e-3, rtol=0)

    net = ResidualConfig(channels=[8, 8], encoder_blocks=[0, 0], decoder_blocks=[0, 0])
    parts = {"encoder": EncoderConfig("residual"), "decoder": DecoderConfig("residual")}
    drawn = []
    for antialias in (False, True):
        torch.manual_seed(0)
        model = CVAE(ModelConfig(z_dim=8, residual=replace(net, antialias=antialias), **parts), 16, 3)
        with torch.no_grad():
            model.decoder.last.bias.copy_(
                torch.tensor([0.3, -0.3, -0.3, 0.3]).repeat(3)
            )  # phases of 2x2 pixels
            drawn.append(model.decode(torch.zeros(1, 8), torch.zeros(1, 3)))
    amplitude = [(image * board).mean().abs().item() for image in drawn]
    assert amplitude[0] > 0.1 and amplitude[1] < 0.01
