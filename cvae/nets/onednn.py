"""Linear layers in float32 on a CPU through oneDNN, which torch uses for convolutions anyway.

torch computes `F.linear` in float32 with its BLAS, which is MKL. On AMD processors MKL stays with AVX2,
and oneDNN's products take about half the time (docs/performance.md). The values differ in rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALL = 4_000_000  # multiplications; measured on one thread with 64 to 256 rows and columns


def serves(x: Tensor) -> bool:
    """Whether `linear` takes `x`: rows in float32 on a CPU, outside of autocast and torch.compile."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False  # first, since a question about the number of rows would fix it in an exported program
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 2 or not len(x):
        return False
    return torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor, slope: float = 1.0) -> Tensor:
    """Return LeakyReLU(x W^T + b) [B, O] for x [B, I], W [O, I], b [O]; slope 1 leaves out LeakyReLU."""
    if not torch.is_grad_enabled():
        return _product(x.contiguous(), weight, bias, slope)
    return _Linear.apply(x, weight, bias, slope)


class _Linear(torch.autograd.Function):
    """The products of a linear layer, forward and backward. It has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
        """Return the layer's output [B, O]."""
        x = x.contiguous()  # oneDNN is a hundred times slower at the columns of a wider matrix
        y = _product(x, weight, bias, slope)
        ctx.save_for_backward(x, weight, y)
        ctx.slope = slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of x, weight and bias."""
        x, weight, y = ctx.saved_tensors
        if ctx.slope != 1.0:
            # The output has the sign of the input, so it tells the slope as well.
            grad = torch.ops.aten.leaky_relu_backward(grad, y, ctx.slope, True)
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            _times(grad, weight) if of_x else None,
            _times(grad.transpose(0, 1), x) if of_weight else None,
            grad.sum(0) if of_bias else None,
            None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
    if _is_small(x, weight):
        y = torch.addmm(bias, x, weight.transpose(0, 1))
        return y if slope == 1.0 else torch.ops.aten.leaky_relu_(y, slope)
    name, scalars = ("none", []) if slope == 1.0 else ("leaky_relu", [slope])
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, scalars, "")


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return a b [M, N] for a [M, K], b [K, N]."""
    if _is_small(a, b):
        return a.mm(b)
    return torch.ops.mkldnn._linear_pointwise(a, b.transpose(0, 1), None, "none", [], "")


def _is_small(a: Tensor, b: Tensor) -> bool:
    """Whether preparing a product in oneDNN takes longer than it saves."""
    return a.shape[0] * b.numel() < SMALL
