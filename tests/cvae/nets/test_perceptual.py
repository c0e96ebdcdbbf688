"""The perceptual term: our folded EfficientNet-Lite0 equals the published one."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from cvae.config import PERCEPTUAL_PACKAGE, LossConfig, PerceptualConfig
from cvae.losses import loss_terms
from cvae.nets.perceptual import (
    DEPTHS,
    load_features,
    relative_distance,
    style_distance,
    weights_file,
)

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PERCEPTUAL_PACKAGE) is None,
    reason=f"needs the package {PERCEPTUAL_PACKAGE} (extra: perceptual)",
)


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@needs_weights
def test_features_equal_the_published_network():
    published = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra judge")
    net = published.EfficientNet.from_name("efficientnet-lite0").eval()
    net.load_state_dict(torch.load(weights_file(""), weights_only=True))
    with torch.no_grad():
        x = F.interpolate(images(2), (64, 64), mode="bilinear", align_corners=False)
        x = net._swish(net._bn0(net._conv_stem(x)))
        expected = []
        for i, block in enumerate(net._blocks[: DEPTHS[-1] + 1]):
            x = block(x)
            if i in DEPTHS:
                expected.append(x)
        found = load_features("", 64)(images(2))
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))


@needs_weights
def test_term_is_0_for_equal_images_and_does_not_mix_a_batch():
    term = loss_terms(LossConfig(perceptual=PerceptualConfig(weight=1.0, size=32)))["perceptual"]
    x, other = images(3), images(3, seed=1)
    assert float(term(x, x, torch.zeros(3, 1)).abs().max()) == 0
    whole, first = term(x, other, torch.zeros(3, 1)), term(x[:1], other[:1], torch.zeros(1, 1))
    assert float(whole.min()) > 0
    assert torch.allclose(whole[:1], first, rtol=1e-5)
    assert not list(term.parameters()) and not term.state_dict()


def test_distance_is_relative_to_the_wanted_features():
    wanted, found = [torch.full((2, 1, 2, 2), 2.0)], [torch.full((2, 1, 2, 2), 3.0)]
    assert relative_distance(wanted, found).tolist() == [0.25, 0.25]


def test_style_is_the_kl_of_normal_distributions_whatever_the_positions():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 8, 8, generator=g), 0.6 * torch.randn(2, 3, 8, 8, generator=g) + 0.1
    found = style_distance([a], [b])
    for image in range(2):
        normal = [
            torch.distributions.Normal(x[image].mean((1, 2)), x[image].var((1, 2), correction=0).sqrt())
            for x in (a, b)
        ]
        wanted = torch.distributions.kl_divergence(*normal).mean()
        assert float(found[image]) == pytest.approx(float(wanted), rel=0.01)
    shuffled = a.flatten(2)[..., torch.randperm(64, generator=g)].view_as(a)
    assert float(style_distance([a], [shuffled]).abs().max()) < 1e-6
    blurred = torch.nn.functional.avg_pool2d(a, 3, 1, 1)
    assert (style_distance([a], [blurred]) > style_distance([a], [1.1 * a])).all()


def test_a_constant_image_has_a_finite_style():
    flat = torch.zeros(1, 2, 4, 4, requires_grad=True)
    for wanted, found in ((flat.detach(), flat), (torch.randn(1, 2, 4, 4), flat)):
        value = style_distance([wanted], [found])
        value.sum().backward()
        assert value.isfinite().all() and flat.grad.isfinite().all()


@needs_weights
def test_style_joins_the_term_by_its_weight():
    x, other, y = images(2), images(2, seed=1), torch.zeros(2, 1)
    plain, half, whole = (
        loss_terms(LossConfig(perceptual=PerceptualConfig(weight=1.0, style=style, size=32)))["perceptual"](
            x, other, y
        )
        for style in (0.0, 0.5, 1.0)
    )
    assert (whole > plain).all() and torch.allclose(2 * (half - plain), whole - plain, rtol=1e-4)


@needs_weights
def test_other_weights_of_the_package_are_refused(monkeypatch):
    monkeypatch.setattr("cvae.nets.perceptual.PACKAGE_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="another sha256 than the published one"):
        load_features("", 32)


def test_a_file_that_is_no_network_is_named(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="losses.perceptual.network: .*weights.pth"):
        load_features(str(tmp_path / "weights.pth"), 32)
