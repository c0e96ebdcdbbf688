"""Networks for larger images: their parameters do not grow with the area."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cvae.config import EncoderConfig, ModelConfig, ResidualConfig
from cvae.model import CVAE
from cvae.nets.shapes import require_fit
from pipeline.config.load import load

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MOST_OUTPUTS = 65_536


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["sigma_cvae_nf_128", "sigma_cvae_nf_256"])
def test_large_images_need_few_parameters(name):
    config = load([CONFIGS / f"{name}.yaml"])
    with torch.device("meta"):
        model = CVAE(config.model, config.shard.size, 40)
        small = CVAE(load([CONFIGS / "sharp.yaml"]).model, 64, 40)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert max(layer.out_features for layer in linear) <= MOST_OUTPUTS
    nets = [parameters(model.encoder) + parameters(model.decoder)]
    nets.append(parameters(small.encoder) + parameters(small.decoder))
    assert nets[0] < 2 * nets[1]


@pytest.mark.parametrize("name", ["sigma_cvae_nf_128", "sigma_cvae_nf_256"])
def test_an_image_travels_through_the_nets(name):
    config = load([CONFIGS / f"{name}.yaml"])
    size = config.shard.size
    model = CVAE(config.model, size, 40)
    y = torch.zeros(1, 40)
    q = model.encode(torch.zeros(1, 3, size, size), y)
    assert q.mean.shape == (1, config.model.z_dim)
    assert model.decode(q.mean, y).shape == (1, 3, size, size)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"channels": [12, 12], "decoder_blocks": [1, 1]}, "model.residual.encoder_blocks: .*has 3 entries"),
        ({"channels": [12, 12], "encoder_blocks": [0, 1]}, "model.residual.decoder_blocks: .*has 3 entries"),
        ({"channels": [], "grid": True}, "model.residual.channels: is empty"),
    ],
)
def test_levels_that_differ_are_named_before_a_net_is_built(changed, said):
    config = ModelConfig(encoder=EncoderConfig("residual"), residual=ResidualConfig(**changed))
    with pytest.raises(ValueError, match=said):
        require_fit(config, 64)


def test_the_old_nets_are_as_they_were():
    model = CVAE(ModelConfig(), 64, 40)
    assert model.encoder.attribute_channel.out_features == 64 * 64  # old checkpoints hold this layer
