"""Coupling flows: this project's against nflows, zuko and normflows, with nets of the same sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cvae.config import FlowConfig
from cvae.distributions import DiagonalGaussian, FlowDistribution
from cvae.priors.flow import Flow
from tools.dev.benchmarks.harness import Bench, Contenders, Result, endless_rate, measure

BATCH, DIM, LAYERS, HIDDEN = 256, 128, 8, 256
OURS = "this flow"
PEERS = ("nflows", "zuko", "normflows")
TRAINING, INVERSE = 1.5, 2.5  # targets
Density = Callable[[Tensor], Tensor]  # codes [B, D] -> log-density [B]
Inverse = Callable[[Tensor], Any]  # noise [B, D] -> codes [B, D], perhaps with a log-determinant


def net(*_: int) -> nn.Sequential:
    """Return the coupling network of all contenders: one half of the codes -> scale and shift."""
    half = DIM // 2
    layers = [nn.Linear(half, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, 2 * half))


class NetWithContext(nn.Module):
    """The coupling network as nflows calls it: with a context, which is None here."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.net = net(*sizes)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """Map a half [B, D/2] to [B, D]."""
        return self.net(x)


def ours(device: torch.device) -> tuple[nn.Module, Density, Inverse]:
    """Return the flow of this project, its density and its inverse."""
    flow = Flow(DIM, 0, FlowConfig(layers=LAYERS, hidden=HIDDEN, depth=2, conditional=False)).to(device)
    zeros = torch.zeros(BATCH, DIM, device=device)
    empty = torch.zeros(BATCH, 0, device=device)
    distribution = FlowDistribution(DiagonalGaussian(zeros, zeros), flow, empty)
    return flow, distribution.log_prob, lambda u: flow.inverse(u, empty)


def nflows(device: torch.device) -> tuple[nn.Module, Density, Inverse]:
    """Return the same flow made of nflows' AffineCouplingTransform."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow as Stack
    from nflows.transforms.base import CompositeTransform
    from nflows.transforms.coupling import AffineCouplingTransform
    from nflows.utils import torchutils

    layers = []
    for i in range(LAYERS):
        mask = torchutils.create_alternating_binary_mask(DIM, even=i % 2 == 0)
        layers.append(AffineCouplingTransform(mask, NetWithContext))
    transform = CompositeTransform(layers)
    flow = Stack(transform, StandardNormal([DIM])).to(device)
    return flow, flow.log_prob, transform.inverse


def zuko(device: torch.device) -> tuple[nn.Module, Density, Inverse]:
    """Return the same flow as zuko's NICE, whose coupling layers scale and shift."""
    from zuko.flows import NICE

    flow = NICE(DIM, transforms=LAYERS, hidden_features=(HIDDEN, HIDDEN), activation=nn.LeakyReLU).to(device)
    return flow, lambda z: flow().log_prob(z), lambda u: flow().transform.inv(u)


def normflows(device: torch.device) -> tuple[nn.Module, Density, Inverse]:
    """Return the same flow made of normflows' AffineCouplingBlock."""
    import normflows as nf

    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nf.flows.AffineCouplingBlock(net(), scale_map="exp"), nf.flows.Permute(DIM, mode="swap")]
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(DIM, trainable=False), layers).to(device)
    return flow, flow.log_prob, flow.forward


BUILDERS = {OURS: ours, "nflows": nflows, "zuko": zuko, "normflows": normflows}


def flows(bench: Bench) -> dict[str, Result]:
    """Measure density with gradients, and the inverse, of every flow."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    z = torch.randn(BATCH, DIM, device=device)
    training: Contenders = {}
    inverses: Contenders = {}
    for name, build in BUILDERS.items():
        flow, density, inverse = build(device)
        training[name] = partial(endless_rate, partial(train, flow, density, z), bench.seconds / 3, BATCH)
        inverses[name] = partial(endless_rate, partial(sample, inverse, z), bench.seconds / 3, BATCH)
    what = (
        f"Batch {BATCH}, {DIM} dimensions, {LAYERS} coupling layers, each with a network of two hidden "
        f"layers of {HIDDEN} units, fp32, {torch.get_num_threads()} threads, device {device}. "
    )
    results = {}
    for key, title, contenders, target, how in (
        ("flow_training", "Coupling flow, density and gradients", training, TRAINING, "Forward, backward."),
        ("flow_inverse", "Coupling flow, inverse", inverses, INVERSE, "Noise to codes without gradients."),
    ):
        targets = {(OURS, peer): target for peer in PEERS}
        measured = measure(contenders, bench.repeats, targets, warm_up=True)
        results[key] = {"title": title, "unit": "codes/s", "protocol": what + how, **measured}
    return results


def train(flow: nn.Module, density: Density, z: Tensor) -> None:
    """Compute the negative mean log-density of `z` and the gradients of the parameters."""
    flow.zero_grad(set_to_none=True)
    (-density(z).mean()).backward()


@torch.no_grad()
def sample(inverse: Inverse, u: Tensor) -> None:
    """Map noise to codes."""
    inverse(u)
