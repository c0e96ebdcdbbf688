"""Attributes as tokens, attention among them, and positions of a feature map that look at them."""

import itertools
import math

import pytest
import torch

from cvae.attributes import CONDITIONERS, AttributeTokens
from cvae.config import (
    ConditionerConfig,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    PriorConfig,
    ResidualConfig,
)
from cvae.model import CVAE
from cvae.nets.attention import Attention, PositionAttention

SIZE, A, D, B, WIDTH = 16, 5, 8, 3, 4
LEVELS = {"channels": [8, 16], "encoder_blocks": [0, 1], "decoder_blocks": [0, 1]}  # sides 8 and 4
NETS = {
    "cross": {"cross_attention": [4, 8]},
    "cross alone": {"cross_attention": [4, 8], "modulated": False},
    "self": {"self_attention": [4]},
    "both": {"cross_attention": [4], "self_attention": [4, 8]},
}


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Weights away from their zero starts."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return module


def make(conditioner: str = "tokens", dtype=torch.float64, **residual) -> CVAE:
    torch.manual_seed(0)
    config = ModelConfig(
        z_dim=D,
        encoder=EncoderConfig("residual"),
        decoder=DecoderConfig("residual"),
        residual=ResidualConfig(**LEVELS, **residual),
        conditioner=ConditionerConfig(conditioner, WIDTH),
        prior=PriorConfig("gaussian", hidden=16),
    )
    return CVAE(config, SIZE, A).to(dtype)


def batch(dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(B, 3, SIZE, SIZE, generator=g, dtype=dtype) * 2 - 1
    y = (torch.rand(B, A, generator=g) > 0.5).to(dtype)
    return x, y, torch.randn(B, D, generator=g, dtype=dtype)


def conditioner(name: str) -> AttributeTokens:
    torch.manual_seed(0)
    return CONDITIONERS[name](ConditionerConfig(name, WIDTH), A).double()


def test_attention_is_the_softmax_of_products():
    torch.manual_seed(0)
    attention = shaken(Attention(8, 6)).double()
    x, seen = torch.randn(B, 5, 8).double(), torch.randn(B, 3, 6).double()
    query, (key, value) = attention.query(x), attention.seen(seen).chunk(2, 2)
    heads = []
    for part in range(4):
        q, k, v = (rows[..., 2 * part : 2 * part + 2] for rows in (query, key, value))
        heads.append((q @ k.mT / math.sqrt(2)).softmax(2) @ v)
    torch.testing.assert_close(attention(x, seen), attention.out(torch.cat(heads, 2)))


def test_absent_unknown_and_present_have_vectors_of_their_own():
    tokens = shaken(conditioner("tokens"))
    for state, value in enumerate((0.0, 0.5, 1.0)):
        e = tokens(torch.full((1, A), value).double())
        torch.testing.assert_close(e.view(A, WIDTH), tokens.tokens[:, state])
    between = tokens(torch.full((1, A), 0.75).double()).view(A, WIDTH)
    torch.testing.assert_close(between, tokens.tokens[:, 1:].mean(1))


@pytest.mark.parametrize("name", ["tokens", "attention"])
def test_nothing_is_known_of_unknown_attributes(name):
    unknown = conditioner(name)(torch.full((1, A), 0.5).double())
    assert unknown.abs().max() == 0


def test_attributes_look_at_each_other_after_a_start_at_their_own_tokens():
    alone, together = conditioner("tokens"), conditioner("attention")
    y = batch()[1]
    torch.testing.assert_close(together(y), alone(y))
    other = y.clone()
    other[:, 0] = 1 - other[:, 0]
    for net, changes in ((shaken(alone), False), (shaken(together), True)):
        before, after = (net(rows).view(B, A, WIDTH)[:, 1:] for rows in (y, other))
        assert torch.equal(before, after) != changes


@pytest.mark.parametrize("token_width", [0, WIDTH])
def test_positions_start_as_they_are_and_then_see_attributes_or_each_other(token_width):
    torch.manual_seed(0)
    net = PositionAttention(8, 4, token_width).double()
    x, e = torch.randn(B, 8, 4, 4).double(), torch.randn(B, A * WIDTH).double()
    assert torch.equal(net(x, e), x)
    shaken(net)
    assert torch.equal(net(x, e), net(x, e + 1)) == (token_width == 0)
    moved = x.flip(3)  # the same values elsewhere: the normalisation sees no difference
    assert not torch.allclose(net(moved, e).flip(3), net(x, e))  # a position knows where it is


@pytest.mark.parametrize("net,name", list(itertools.product(NETS, ["tokens", "attention"])))
def test_no_image_influences_another_and_the_attributes_arrive(net, name):
    model, (x, y, noise) = shaken(make(name, **NETS[net])), batch()
    q, alone = model.encode(x, y), model.encode(x[:1], y[:1])
    torch.testing.assert_close(alone.mean, q.mean[:1])
    torch.testing.assert_close(model.decode(noise[:1], y[:1]), model.decode(noise, y)[:1])
    assert not torch.allclose(model.encode(x, 1 - y).mean, q.mean)
    assert not torch.allclose(model.decode(noise, 1 - y), model.decode(noise, y))


@pytest.mark.parametrize("net", NETS)
def test_every_parameter_has_a_gradient_after_two_steps_in_half_precision(net):
    model = make("attention", torch.float32, **NETS[net])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model(*batch(torch.float32, step), 1.0, 1 / B)
        losses.objective.backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def test_a_model_without_attention_keeps_its_parameters():
    names = set(make("multi_hot").state_dict())
    assert {"encoder.levels.1.blocks.0.norm1.modulation.weight", "decoder.norm.modulation.bias"} <= names
    assert not [name for name in names if "attention" in name or "position" in name]


@pytest.mark.parametrize(
    "name,residual,message",
    [
        ("multi_hot", {"cross_attention": [4]}, "conditioner.name=multi_hot; set it to tokens or attention"),
        ("tokens", {"cross_attention": [4, 16]}, "cross_attention: no level has the side 16.*8, 4"),
        ("tokens", {"self_attention": [3]}, "self_attention: no level has the side 3"),
        ("tokens", {"modulated": False}, "modulated=false.*name levels in model.residual.cross_attention"),
    ],
)
def test_attention_that_does_not_fit_is_refused(name, residual, message):
    with pytest.raises(ValueError, match=message):
        make(name, **residual)
