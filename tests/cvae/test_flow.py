"""The flow: inverse, Jacobian against autograd, an established library, and the reference's faults."""

import pytest
import torch
from torch.autograd.functional import jacobian

from cvae.config import FlowConfig
from cvae.nets import onednn
from cvae.priors.flow import Flow

DIM, CONDITION = 7, 5


def make_flow(seed: int = 0, **changes) -> Flow:
    """A flow whose weights are far from the identity."""
    torch.manual_seed(seed)
    flow = Flow(DIM, CONDITION, FlowConfig(**{"layers": 4, "hidden": 16, **changes})).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return flow


@pytest.mark.parametrize(
    "changes", [{}, {"conditional": False}, {"layers": 1, "alternate": False}, {"layers": 3, "depth": 1}]
)
def test_inverse_undoes_forward(changes):
    flow = make_flow(**changes)
    z, e = torch.randn(32, DIM, dtype=torch.float64), torch.randn(32, CONDITION, dtype=torch.float64)
    u, _ = flow(z, e)
    assert (u - z).abs().max() > 0.1
    torch.testing.assert_close(flow.inverse(u, e), z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"conditional": False}, {"layers": 1, "alternate": False}])
def test_log_det_equals_autograd(changes):
    flow = make_flow(**changes)
    z, e = torch.randn(4, DIM, dtype=torch.float64), torch.randn(4, CONDITION, dtype=torch.float64)
    _, log_det = flow(z, e)
    for i in range(4):
        full = jacobian(lambda v, i=i: flow(v[None], e[i : i + 1])[0][0], z[i])
        torch.testing.assert_close(torch.linalg.slogdet(full)[1], log_det[i], rtol=1e-9, atol=1e-9)


def test_agrees_with_zuko():
    """The same coupling in zuko's transforms: value and log-determinant."""
    transforms = pytest.importorskip("zuko.transforms", reason="zuko is not installed (extra 'test')")
    flow = make_flow(layers=2)
    z, e = torch.randn(16, DIM, dtype=torch.float64), torch.randn(16, CONDITION, dtype=torch.float64)
    u, log_det, ours = z, 0.0, flow(z, e)
    for layer in flow.layers:
        mask = torch.arange(DIM) < DIM // 2
        mask = mask if layer.keep_first else ~mask
        meta = lambda kept, layer=layer: affine(transforms, *layer.scale_shift(kept, e))  # noqa: E731
        u, more = transforms.CouplingTransform(meta, mask).call_and_ladj(u)
        log_det = log_det + more
    torch.testing.assert_close(ours[0], u)
    torch.testing.assert_close(ours[1], log_det)


def affine(transforms, log_scale, shift):
    """exp(s) x + t from torch's own transforms, which share nothing with ours."""
    import torch.distributions as d

    return d.transforms.IndependentTransform(d.AffineTransform(shift, log_scale.exp()), 1)


def test_starts_at_the_identity():
    flow = Flow(DIM, CONDITION, FlowConfig())
    z = torch.randn(8, DIM)
    u, log_det = flow(z, torch.randn(8, CONDITION))
    torch.testing.assert_close(u, z)
    assert log_det.abs().max() == 0


def test_log_scale_is_bounded_however_large_the_input():
    flow = make_flow(bound=1.5, layers=3)
    _, log_det = flow(
        1e6 * torch.randn(8, DIM, dtype=torch.float64), torch.randn(8, CONDITION, dtype=torch.float64)
    )
    assert log_det.isfinite().all() and log_det.abs().max() <= 3 * 1.5 * 4


@pytest.mark.parametrize("n", [1, 37])
def test_onednn_and_the_blas_agree(n, monkeypatch):
    """Values, gradients and inverse in float32, through oneDNN and through `F.linear`."""
    flow = make_flow().float()
    for p in flow.parameters():
        p.data.mul_(0.3)  # far from the identity, yet rounding grows little
    z, e = torch.randn(n, DIM), torch.randn(n, CONDITION)

    def results():
        flow.zero_grad()
        leaf = z.clone().requires_grad_()
        u, log_det = flow(leaf, e)
        (u.square().sum() + log_det.sum()).backward()
        return [u, log_det, flow.inverse(z, e), leaf.grad, *(p.grad.clone() for p in flow.parameters())]

    monkeypatch.setattr(onednn, "SMALL", 0)  # products this small would go to the BLAS
    served = []
    monkeypatch.setattr(onednn, "linear", lambda *a, kept=onednn.linear: served.append(1) or kept(*a))
    fast = results()
    assert bool(served) == onednn.serves(z)
    monkeypatch.setattr(onednn, "serves", lambda x: False)
    for one, other in zip(fast, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.detach().abs().max()))


def transformed_dimensions(flow: Flow) -> torch.Tensor:
    z, e = torch.randn(64, DIM, dtype=torch.float64), torch.randn(64, CONDITION, dtype=torch.float64)
    return ((flow(z, e)[0] - z).abs() > 1e-12).all(0)


def test_every_dimension_is_transformed_unlike_in_the_reference():
    assert transformed_dimensions(make_flow(layers=2)).all()
    fixed = transformed_dimensions(make_flow(layers=2, alternate=False))  # the reference's single mask
    assert fixed.sum() == DIM - DIM // 2
