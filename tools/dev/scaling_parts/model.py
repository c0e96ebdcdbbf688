"""A cost model of one training step: seconds against ranks, images per rank and image size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

REFERENCE_SIZE = 64  # pixels
SUMS_BYTES = 64  # of the all-reduce that sigma* needs


@dataclass(frozen=True)
class Network:
    """How long an all-reduce takes: latency(ranks) + 2 (n - 1) / n * bytes / bandwidth.

    The latencies are those of NCCL's own tuning model for trees (src/graph/tuning.cc, commit 01afd20a):
    base + 2 ((ranks of a node - 1) * inside + log2(nodes) * between). `slack` multiplies them.
    """

    per_node: int = 8  # ranks
    base_us: float = 4.4
    inside_us: tuple[float, float] = (0.52, 1.2)  # NVLink: protocol LL for few bytes, LL128 for more
    between_us: tuple[float, float] = (5.0, 8.5)  # network
    inside_gbs: float = 370.0  # bus bandwidth, GB/s
    between_gbs: float = 342.0
    slack: float = 2.6
    few_bytes: int = 65536  # up to here protocol LL

    def all_reduce(self, ranks: int, size: float) -> float:
        """Return the seconds of an all-reduce of `size` bytes."""
        if ranks == 1:
            return 0.0
        kind = 0 if size <= self.few_bytes else 1
        inside = min(ranks, self.per_node) - 1
        nodes = math.ceil(ranks / self.per_node)
        latency = self.base_us + 2 * (
            inside * self.inside_us[kind] + math.log2(nodes) * self.between_us[kind]
        )
        bandwidth = self.inside_gbs if nodes == 1 else self.between_gbs
        return 1e-6 * self.slack * latency + 2 * (ranks - 1) / ranks * size / (1e9 * bandwidth)


@dataclass(frozen=True)
class Costs:
    """What one rank pays, seconds. Costs of an image are for 64 pixels and grow with the pixels."""

    launches: float  # the host's time to launch a step; the device computes meanwhile
    fixed: float  # of a step on the device whatever its images: short kernels, optimizer, EMA
    image: float  # forward and backward
    load: float  # order, gathering, noise, in the prefetch thread
    gradient_bytes: float
    checkpoint: float  # how long a checkpoint stops the step
    checkpoint_every: int  # steps
    validation: float  # on one rank; ranks share it
    validation_every: int  # steps


@dataclass(frozen=True)
class Step:
    """The parts of one step, seconds."""

    compute: float
    gradients: float  # all-reduce; counted in full, though a part hides behind the backward pass
    sums: float  # all-reduce of the sums for sigma*; every rank waits for it in the forward pass
    loading: float  # what the prefetch thread needs beyond the step itself
    checkpoint: float
    validation: float

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        parts = (self.compute, self.gradients, self.sums, self.loading, self.checkpoint, self.validation)
        return sum(parts)


def step(costs: Costs, network: Network, ranks: int, share: float, size: int = REFERENCE_SIZE) -> Step:
    """Return the parts of a step of `ranks` ranks with `share` images of `size` pixels each."""
    pixels = (size / REFERENCE_SIZE) ** 2
    compute = max(costs.launches, costs.fixed + share * costs.image * pixels)
    made = Step(
        compute=compute,
        gradients=network.all_reduce(ranks, costs.gradient_bytes),
        sums=network.all_reduce(ranks, SUMS_BYTES),
        loading=0.0,
        checkpoint=costs.checkpoint / costs.checkpoint_every,
        validation=costs.validation / ranks / costs.validation_every,
    )
    return replace(made, loading=max(0.0, share * costs.load * pixels - made.total))


def busy(costs: Costs, network: Network, ranks: int, share: float, size: int = REFERENCE_SIZE) -> float:
    """Return the share of a step in which a rank computes."""
    made = step(costs, network, ranks, share, size)
    return made.compute / made.total


def rate(costs: Costs, network: Network, ranks: int, batch: float, size: int = REFERENCE_SIZE) -> float:
    """Return images per second of all ranks for a global batch of `batch` images."""
    return batch / step(costs, network, ranks, batch / ranks, size).total
