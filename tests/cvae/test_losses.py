import math

import pytest
import torch

from cvae.losses import active_units, bits_per_dim, squared_error
from cvae.nets.layers import soft_floor


def test_a_uniform_density_over_256_levels_is_8_bits():
    """Density of v/127.5 - 1 where v is uniform on [0, 256): 1/256 per level of width 2/255."""
    nats = -12288 * math.log((1 / 256) * 127.5)
    assert bits_per_dim(nats, 12288) == pytest.approx(8)


def test_squared_errors_of_half_types_are_summed_in_float32():
    x = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float16)
    mean = torch.full((1, 3, 8, 8), 0.5 + 2**-11, dtype=torch.float32)
    assert squared_error(x, mean).item() == pytest.approx(192 * 2**-22, rel=1e-6)
    assert squared_error(x.double(), mean.double()).dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_active_units_do_not_depend_on_the_scale_of_z(scale):
    mean = torch.randn(1000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = mean * torch.tensor([1.0, 1.0, 0.01, 0.0]) * scale
    variance = torch.full((1000, 4), 0.5 * scale**2, dtype=torch.float64)
    assert active_units(1000, mean.sum(0), mean.square().sum(0), variance.sum(0)) == 2


def test_soft_floor_is_the_identity_far_above_and_a_bound_below():
    x = torch.tensor([-100.0, 10.0], requires_grad=True)
    y = soft_floor(x, -6.0)
    assert y[0] >= -6 and y[1].item() == pytest.approx(10, abs=1e-5)
