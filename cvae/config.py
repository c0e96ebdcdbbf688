"""Configuration of the model: plain frozen dataclasses, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

CONDITIONER_NAMES = ("multi_hot", "embedding")
PRIOR_NAMES = ("standard", "gaussian", "flow")
PRIOR_NET_NAMES = ("mlp", "conv1d")
VARIANCE_NAMES = ("unit", "learned", "optimal")
NORM_NAMES = ("group", "none")
ACTIVATION_NAMES = ("silu", "relu")


@dataclass(frozen=True)
class ConditionerConfig:
    """How the 0/1 attributes become a vector e(y)."""

    name: str = "multi_hot"  # multi_hot | embedding (nn.Embedding(2, width) shared by all attributes, as in the paper)
    width: int = 64  # multi_hot: size of e(y); embedding: size per attribute


@dataclass(frozen=True)
class NetConfig:
    """Encoder and decoder: one stride-2 convolution per entry of `channels`, mirrored in the decoder."""

    channels: list[int] = field(default_factory=lambda: [32, 64, 128, 256])
    norm: str = "group"  # group | none
    activation: str = "silu"  # silu | relu


@dataclass(frozen=True)
class FlowConfig:
    """Stack of affine coupling layers of the `flow` prior."""

    layers: int = 8
    hidden: int = 128
    depth: int = 2  # hidden layers of each coupling network
    bound: float = 2.0  # |log-scale| of one layer stays below this (tanh)
    conditional: bool = True  # coupling networks also see e(y)
    alternate: bool = True  # alternate the halves; false: one fixed mask (half of z is never transformed)


@dataclass(frozen=True)
class PriorConfig:
    """Conditional prior p(z|y)."""

    name: str = "flow"  # standard | gaussian | flow
    net: str = (
        "mlp"  # network of mu_p(y), sigma_p(y): mlp | conv1d (over attribute embeddings, as in the paper)
    )
    hidden: int = 128
    flow: FlowConfig = field(default_factory=FlowConfig)


@dataclass(frozen=True)
class VarianceConfig:
    """Decoder variance sigma^2 on the [-1, 1] image scale."""

    name: str = "optimal"  # unit | learned | optimal
    floor: float = 1e-5  # smallest variance


@dataclass(frozen=True)
class ModelConfig:
    """A conditional VAE; image size and number of attributes come from the data."""

    z_dim: int = 128
    log_sigma_min: float = -6.0  # soft lower bound of ln sigma_q and ln sigma_p
    net: NetConfig = field(default_factory=NetConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    variance: VarianceConfig = field(default_factory=VarianceConfig)
