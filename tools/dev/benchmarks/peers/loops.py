"""Minimal training loops that stand for PyTorch-VAE and sigma-vae-pytorch, and pythae's own trainer.

The two repositories are not on PyPI, so their steps are typed again here: their loss, plain Adam,
float32 and the numbers that they read back in every step. All loops train the same plain network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], object]  # one optimizer step, or one pass of pythae's trainer
IMAGES = 162_770  # of CelebA's training split: the weight of PyTorch-VAE's KL


class Encoder(nn.Module):
    """Stride-2 convolutions with BatchNorm and LeakyReLU, as in PyTorch-VAE, and two heads."""

    def __init__(self, size: int, channels: list[int], z_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_in = 3
        for n_out in channels:
            layers += [nn.Conv2d(n_in, n_out, 4, 2, 1), nn.BatchNorm2d(n_out), nn.LeakyReLU()]
            n_in = n_out
        self.convs = nn.Sequential(*layers, nn.Flatten())
        width = channels[-1] * (size >> len(channels)) ** 2
        self.mean, self.log_var = nn.Linear(width, z_dim), nn.Linear(width, z_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 3, S, S] to mean and log-variance [B, D]."""
        features = self.convs(x)
        return self.mean(features), self.log_var(features)


class Decoder(nn.Module):
    """The mirror image of the encoder."""

    def __init__(self, size: int, channels: list[int], z_dim: int) -> None:
        super().__init__()
        side = size >> len(channels)
        layers: list[nn.Module] = [nn.Linear(z_dim, channels[-1] * side**2)]
        layers.append(nn.Unflatten(1, (channels[-1], side, side)))
        widths = [*reversed(channels), 3]
        for n_in, n_out in zip(widths, widths[1:], strict=False):
            layers.append(nn.ConvTranspose2d(n_in, n_out, 4, 2, 1))
            if n_out != 3:
                layers += [nn.BatchNorm2d(n_out), nn.LeakyReLU()]
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Map z [B, D] to images [B, 3, S, S]."""
        return self.layers(z)


class PlainVae(nn.Module):
    """A VAE without attributes, flow or conditions."""

    def __init__(self, size: int, channels: list[int], z_dim: int) -> None:
        super().__init__()
        self.encoder = Encoder(size, channels, z_dim)
        self.decoder = Decoder(size, channels, z_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstructions, means and log-variances of images [B, 3, S, S]."""
        mean, log_var = self.encoder(x)
        std = torch.exp(0.5 * log_var)
        return self.decoder(torch.randn_like(std) * std + mean), mean, log_var


def divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(q || N(0, I)) of each image [B]."""
    return -0.5 * torch.sum(1 + log_var - mean**2 - log_var.exp(), dim=1)


def pytorch_vae(model: PlainVae, x: Tensor) -> Step:
    """Return PyTorch-VAE's step: mean squared error and weighted KL, three numbers logged each time."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        decoded, mean, log_var = model(x)
        error, kl = F.mse_loss(decoded, x), divergence(mean, log_var).mean()
        loss = error + len(x) / IMAGES * kl
        loss.backward()
        optimizer.step()
        return {"loss": loss.item(), "error": error.item(), "kl": kl.item()}

    return step


def sigma_vae(model: PlainVae, x: Tensor) -> Step:
    """Return sigma-vae-pytorch's step: Gaussian likelihood with the batch's optimal sigma, summed KL."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> float:
        optimizer.zero_grad()
        decoded, mean, log_var = model(x)
        log_sigma = ((x - decoded) ** 2).mean([0, 1, 2, 3], keepdim=True).sqrt().log()
        log_sigma = -6 + F.softplus(log_sigma + 6)
        likelihood = 0.5 * ((x - decoded) / log_sigma.exp()) ** 2 + log_sigma + 0.5 * math.log(2 * math.pi)
        loss = likelihood.sum() + divergence(mean, log_var).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def pythae(model: PlainVae, x: Tensor, folder: Path, batches: int) -> Step:
    """Return one pass of pythae's BaseTrainer over `batches` batches that lie in memory."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    class TheirEncoder(BaseEncoder):
        def __init__(self) -> None:
            BaseEncoder.__init__(self)
            self.net = model.encoder

        def forward(self, x: Tensor) -> ModelOutput:
            mean, log_var = self.net(x)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class TheirDecoder(BaseDecoder):
        def __init__(self) -> None:
            BaseDecoder.__init__(self)
            self.net = model.decoder

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(z))

    config = VAEConfig(input_dim=tuple(x.shape[1:]), latent_dim=model.encoder.mean.out_features)
    images = x.cpu().repeat(batches, 1, 1, 1)
    training = BaseTrainerConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(x),
        num_epochs=1,
        train_dataloader_num_workers=0,
        no_cuda=x.device.type == "cpu",
    )
    vae = VAE(config, encoder=TheirEncoder(), decoder=TheirDecoder())
    trainer = BaseTrainer(vae, BaseDataset(images, torch.zeros(len(images))), training_config=training)
    trainer.prepare_training()
    return lambda: trainer.train_step(epoch=1)
