"""A conditional prior learned by flow matching: a continuous flow with a free-form velocity.

A straight path joins noise and code: z_t = (1 - t) noise + t z, with t from 0 to 1. A network learns
the mean velocity v(z_t, t, e) = E[z - noise | z_t, e(y)] by least squares (arXiv 2210.02747). The
solution of dz/dt = v carries noise to codes. So sampling, its inverse and the density all come from
one ordinary differential equation.

Shapes: B codes, D latent dimensions, E size of e(y), W width of the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvae.config import FlowMatchingConfig
from cvae.distributions import Distribution
from cvae.nets.layers import norm, zeroed
from cvae.nets.shapes import velocity_channels

FREQUENCIES = 32


class Condition(nn.Module):
    """Time and e(y) -> one vector that modulates every block."""

    def __init__(self, n_condition: int, width: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.linspace(0, math.log(200.0), FREQUENCIES).exp())
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Linear(n_condition, width)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t: Tensor, e: Tensor) -> Tensor:
        """t [B] in [0, 1], e [B, E] -> [B, W]."""
        angles = t[:, None] * self.frequencies
        waves = torch.cat((angles.sin(), angles.cos()), dim=1)
        return self.mix(self.time(waves) + self.label(e))


class VectorBlock(nn.Module):
    """A residual MLP whose LayerNorm is scaled and shifted by the condition. It starts as the identity."""

    def __init__(self, width: int, n_condition: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(n_condition, 3 * width))
        self.net = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h [B, W], c [B, C] -> [B, W]."""
        scale, shift, gate = self.modulation(c).chunk(3, dim=1)
        return h + gate * self.net(self.norm(h) * (1 + scale) + shift)


class VectorVelocity(nn.Module):
    """Velocity of a code that is one vector: a residual MLP."""

    def __init__(self, z_dim: int, n_condition: int, config: FlowMatchingConfig) -> None:
        super().__init__()
        self.first = nn.Linear(z_dim, config.width)
        self.blocks = nn.ModuleList(VectorBlock(config.width, n_condition) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(n_condition, 2 * config.width))
        self.last = zeroed(nn.Linear(config.width, z_dim))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z [B, D], c [B, C] -> velocity [B, D]."""
        h = self.first(z)
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.modulation(c).chunk(2, dim=1)
        return self.last(self.norm(h) * (1 + scale) + shift)


class GridBlock(nn.Module):
    """Residual 3x3 convolutions with a modulated GroupNorm. It starts as the identity."""

    def __init__(self, channels: int, n_condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm("group", channels), norm("group", channels)
        self.modulation = zeroed(nn.Linear(n_condition, 2 * channels))
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, W, H, H], c [B, C] -> [B, W, H, H]."""
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))


class GridVelocity(nn.Module):
    """Velocity of a code that is a grid: a small U-net, with an MLP over the whole image at its bottom."""

    def __init__(self, z_dim: int, n_condition: int, config: FlowMatchingConfig) -> None:
        super().__init__()
        self.side = config.side
        channels = velocity_channels(z_dim, config.side)
        narrow, wide = config.channels, 2 * config.channels
        # Where images are aligned, a learned position tells a cell what usually lies there.
        self.position = nn.Parameter(0.02 * torch.randn(1, narrow, config.side, config.side))
        self.first = nn.Conv2d(channels, narrow, 3, padding=1)
        self.enter = GridBlock(narrow, n_condition)
        self.down = nn.Conv2d(narrow, wide, 4, 2, 1)
        self.low = nn.ModuleList(GridBlock(wide, n_condition) for _ in range(2))
        self.whole = VectorVelocity(wide * (config.side // 2) ** 2, n_condition, config)
        self.up = nn.Conv2d(wide, narrow, 3, padding=1)
        self.leave = nn.ModuleList(GridBlock(narrow, n_condition) for _ in range(2))
        self.norm = norm("group", narrow)
        self.last = nn.Conv2d(narrow, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z [B, D], c [B, C] -> velocity [B, D]."""
        x = self.first(z.unflatten(1, (-1, self.side, self.side))) + self.position
        x = self.enter(x, c)
        h = self.low[0](self.down(x), c)
        h = h + self.whole(h.flatten(1), c).view(h.shape)
        h = self.low[1](h, c)
        x = x + self.up(F.interpolate(h, scale_factor=2, mode="nearest"))
        for block in self.leave:
            x = block(x, c)
        return self.last(F.silu(self.norm(x))).flatten(1)


VELOCITIES: dict[str, type[VectorVelocity] | type[GridVelocity]] = {
    "vector": VectorVelocity,
    "grid": GridVelocity,
}


@dataclass(frozen=True)
class FlowMatchingDistribution(Distribution):
    """p(z|y) as the law of z_1, where dz_t/dt = v(z_t, t, e) starts at z_0 ~ N(0, I).

    Codes are standardised first: (z - shift) / scale. With guidance g the velocity is w + g (v(y) - w),
    where w is that of `away`, which knows less than y: arXiv 2207.12598, 2406.02507.
    """

    prior: Any  # cvae.priors.prior.FlowMatchingPrior
    e: Tensor  # [B, E]
    away: FlowMatchingDistribution | None = None  # only with guidance
    guidance: float = 1.0

    def guided(self, unconditional: Distribution, strength: float) -> Distribution:
        """Return this distribution with guidance `strength`; 1 changes nothing."""
        assert isinstance(unconditional, FlowMatchingDistribution)
        return replace(self, away=unconditional, guidance=strength)

    def velocity(self, z: Tensor, t: float) -> Tensor:
        """Return the velocity [B, D] of standardised codes z [B, D] at time t."""
        wanted = self._velocity(z, z.new_full(z.shape[:1], t), self.e)
        if self.away is None or self.guidance == 1.0:
            return wanted
        free = self.away.velocity(z, t)
        return free + self.guidance * (wanted - free)

    def _velocity(self, z: Tensor, t: Tensor, e: Tensor) -> Tensor:
        return self.prior.velocity(z, self.prior.condition(t, e))

    def _integrate(self, z: Tensor, start: float, end: float) -> Tensor:
        """Solve the equation from time `start` to `end` by Heun's method, z [B, D] -> [B, D]."""
        steps = self.prior.steps
        dt = (end - start) / steps
        for i in range(steps):
            t = start + i * dt
            v = self.velocity(z, t)
            v_next = self.velocity(z + dt * v, t + dt)
            z = z + 0.5 * dt * (v + v_next)
        return z

    def sample(self, noise: Tensor) -> Tensor:
        """Carry noise [B, D] along the velocity to codes z [B, D]."""
        return self.prior.shift + self.prior.scale * self._integrate(noise, 0.0, 1.0)

    def to_noise(self, z: Tensor) -> Tensor:
        """Carry codes z [B, D] back to the noise that they come from, up to the solver's error."""
        return self._integrate((z - self.prior.shift) / self.prior.scale, 1.0, 0.0)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log p(z) [B], nats, through the change of variables d log p / dt = -div v.

        Two fixed probes of signs estimate the divergence (Hutchinson): the same for every image and
        every call. The equation is solved backwards with the steps of `sample`.
        """
        x = (z - self.prior.shift) / self.prior.scale
        probes = self._probes(x)
        dt = 1.0 / self.prior.steps
        gained = x.new_zeros(len(x))
        for i in range(self.prior.steps):
            t = 1.0 - i * dt
            v, divergence = self._divergence(x, t, probes)
            v_next, divergence_next = self._divergence(x - dt * v, t - dt, probes)
            x = x - 0.5 * dt * (v + v_next)
            gained = gained + 0.5 * dt * (divergence + divergence_next)
        base = -0.5 * x.square().sum(-1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)
        return base - gained - self.prior.scale.log().sum()

    @staticmethod
    def _probes(z: Tensor) -> Tensor:
        """Return two rows of signs [2, D]; their mean quadratic form estimates a trace."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (2, z.shape[-1]), generator=generator) * 2 - 1
        return signs.to(z)

    def _divergence(self, z: Tensor, t: float, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity [B, D] and the estimate of its divergence [B]."""
        estimates = []
        with torch.enable_grad():
            moving = z.detach().requires_grad_(True)
            v = self.velocity(moving, t)
            for probe in probes:
                (slope,) = torch.autograd.grad(v, moving, probe.expand_as(v), retain_graph=True)
                estimates.append((slope * probe).sum(-1))
        return v.detach(), torch.stack(estimates).mean(0)

    def fit_loss(self, z: Tensor, noise: Tensor) -> Tensor:
        """Return the squared error of the velocity, summed over dimensions and averaged over draws [B].

        Each code is used with several times and noises, since the encoder costs more than the
        velocity. noise [B, draws * (D + 1)]; times are logit-normal, which favours the middle.
        """
        x = (z - self.prior.shift) / self.prior.scale
        draws = noise.unflatten(1, (-1, z.shape[-1] + 1))
        n_draws = draws.shape[1]
        x = x.repeat_interleave(n_draws, 0)
        e = self.e.repeat_interleave(n_draws, 0)
        flat = draws.flatten(0, 1)
        t, start = torch.sigmoid(flat[:, 0]), flat[:, 1:]
        moving = torch.lerp(start, x, t[:, None])
        error = self._velocity(moving, t, e) - (x - start)
        return error.square().sum(-1).view(-1, n_draws).mean(1)
