"""Precision, optimizer, schedules and the moving average of the weights; time is counted in images, never in ranks."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pipeline.config.schema import OptimConfig
from pipeline.errors import ConfigError


class Precision:
    """What `auto | fp32 | bf16 | fp16 | fp64` means on a device: autocast type, parameter type, gradient scaler."""

    def __init__(self, name: str, device: torch.device) -> None:
        cuda = device.type == "cuda"
        if name == "auto":
            name = "fp32" if not cuda else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        if name == "fp16" and not cuda:
            raise ConfigError("key 'train.precision': fp16 needs a GPU; use bf16 or fp32 on a CPU")
        self.name, self.device_type = name, device.type
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
        self.dtype = torch.float64 if name == "fp64" else torch.float32
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Forward passes run in this."""
        return torch.autocast(
            self.device_type, dtype=self.half or torch.bfloat16, enabled=self.half is not None
        )


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (Adam where weight_decay is 0); the learning rate is a tensor's worth set at every step."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(images: int, total: int, config: OptimConfig) -> float:
    """Linear warm-up over `warmup_images`, then a cosine down to `final_lr_fraction` at `total` images."""
    if images < config.warmup_images:
        return config.lr * (images + 1) / (config.warmup_images + 1)
    progress = min(1.0, (images - config.warmup_images) / max(1, total - config.warmup_images))
    low = config.final_lr_fraction
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def kl_weight(images: int, warmup_images: int) -> float:
    """beta: linear from 0 to 1 over `warmup_images`."""
    return min(1.0, images / warmup_images) if warmup_images else 1.0


class Ema:
    """Exponential moving average of the weights, in a model of its own; the same on every rank without talking."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """average += (1 - decay) (weights - average); young averages follow faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        theirs: list[Tensor] = [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(list(self.model.parameters()), theirs, 1 - decay)
