"""The layers that have a way of their own on a CPU compute what torch's layers compute."""

import copy

import pytest
import torch
from torch import nn

from cvae.nets.layers import GroupNorm, Linear

FAST = {
    "group_norm": (lambda: GroupNorm(2, 8), nn.GroupNorm, (8, 5, 6)),
    "linear": (lambda: Linear(200, 400), nn.Linear, (200,)),
}


def gradients(layer, plain, x):
    """Return the output of `plain.forward` and the gradients of the input and all weights."""
    x = x.clone().requires_grad_()
    out = plain.forward(layer, x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("images", [64, 1])
@pytest.mark.parametrize("name", FAST)
def test_a_fast_layer_equals_torchs(name, images, half):
    """In bf16 the truth is torch's layer in float64; torch's own layer sets the error that is allowed."""
    torch.manual_seed(0)
    make, plain, shape = FAST[name]
    layer = make()
    x = torch.randn(images, *shape)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)

    truth = gradients(copy.deepcopy(layer).double(), plain, x.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        fast, usual = gradients(layer, type(layer), x), gradients(layer, plain, x)
    for found, theirs, true in zip(fast, usual, truth, strict=True):
        assert found.shape == true.shape
        scale = true.abs().max()
        error, allowed = (found - true).abs().max() / scale, (theirs - true).abs().max() / scale
        assert error <= max(2 * allowed, 1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_the_fast_ways_are_taken():
    assert "_Linear" in Linear(200, 400)(torch.zeros(64, 200)).grad_fn.name()
    with torch.autocast("cpu", torch.bfloat16):
        assert GroupNorm(2, 8)(torch.zeros(2, 8, 4, 4).bfloat16()).dtype == torch.float32
