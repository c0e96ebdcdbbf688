"""The model's configuration: frozen dataclasses that need no torch.

Each tuple of names lists the keys of a registry; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ENCODER_NAMES = ("conv",)
DECODER_NAMES = ("conv",)
CONDITIONER_NAMES = ("multi_hot", "embedding")
PRIOR_NAMES = ("standard", "gaussian", "flow")
PRIOR_NET_NAMES = ("mlp", "conv1d")
VARIANCE_NAMES = ("unit", "learned", "optimal")
LOSS_TERM_NAMES = ("edges",)
NORM_NAMES = ("group", "none")
ACTIVATION_NAMES = ("silu", "relu")


@dataclass(frozen=True)
class ConditionerConfig:
    """How the 0/1 attributes become a vector e(y)."""

    name: str = "multi_hot"  # multi_hot | embedding (one nn.Embedding(2, width) for all)
    width: int = 64  # multi_hot: size of e(y); embedding: size per attribute


@dataclass(frozen=True)
class EncoderConfig:
    """The network of q(z|x,y)."""

    name: str = "conv"  # conv (stride-2 convolutions, see NetConfig)


@dataclass(frozen=True)
class DecoderConfig:
    """The network of the mean image of p(x|z,y)."""

    name: str = "conv"  # conv (mirrors the encoder `conv`, see NetConfig)


@dataclass(frozen=True)
class NetConfig:
    """Sizes of the convolutional encoder and decoder; the decoder mirrors the encoder."""

    channels: list[int] = field(default_factory=lambda: [32, 64, 128, 256])  # a stride-2 layer each
    norm: str = "group"  # group | none
    activation: str = "silu"  # silu | relu


@dataclass(frozen=True)
class FlowConfig:
    """The affine coupling layers of the prior `flow`."""

    layers: int = 8  # number of coupling layers
    hidden: int = 128  # units of a hidden layer
    depth: int = 2  # hidden layers of each coupling network
    bound: float = 2.0  # |log-scale| of one layer stays below this (tanh)
    conditional: bool = True  # coupling networks also see e(y)
    alternate: bool = True  # layers transform the halves of z in turn; false: always the same half


@dataclass(frozen=True)
class PriorConfig:
    """The conditional prior p(z|y)."""

    name: str = "flow"  # standard | gaussian | flow
    net: str = "mlp"  # of mu_p(y) and sigma_p(y): mlp | conv1d (along attribute embeddings)
    hidden: int = 128  # hidden units of that network
    flow: FlowConfig = field(default_factory=FlowConfig)


@dataclass(frozen=True)
class VarianceConfig:
    """The decoder variance sigma^2 on the [-1, 1] image scale."""

    name: str = "optimal"  # unit | learned | optimal
    floor: float = 1e-5  # smallest variance


@dataclass(frozen=True)
class EdgesConfig:
    """The loss term `edges`: the squared error of the images' Laplacians."""

    weight: float = 0.0  # factor of the term in the objective; 0: the term is left out


@dataclass(frozen=True)
class LossConfig:
    """Loss terms added to the negative ELBO: one section each, with the name of the term."""

    edges: EdgesConfig = field(default_factory=EdgesConfig)


@dataclass(frozen=True)
class ModelConfig:
    """A conditional VAE; image size and number of attributes come from the data."""

    z_dim: int = 128  # latent dimensions
    log_sigma_min: float = -6.0  # soft lower bound of ln sigma_q and ln sigma_p
    net: NetConfig = field(default_factory=NetConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    variance: VarianceConfig = field(default_factory=VarianceConfig)
    losses: LossConfig = field(default_factory=LossConfig)
