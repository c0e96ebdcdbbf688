"""Optimizers, schedules, precision, and the moving average of the weights.

Schedules count images, never steps of a rank, so they do not depend on the number of ranks.
A new optimizer or schedule needs its function, its line in `OPTIMIZERS` or `SCHEDULES`, and its name
in pipeline/config/schema.py.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.schema import OptimConfig
from pipeline.errors import ConfigError
from pipeline.runtime.distributed import Ranks
from pipeline.training.step.flat import FlatWeights

log = logging.getLogger("cvae.precision")


class Precision:
    """The precision of a training by its name: dtypes, autocast and gradient scaler. All ranks agree."""

    def __init__(self, name: str, ranks: Ranks) -> None:
        kind = ranks.device.type
        lacking = ranks.reduce_sum(torch.tensor(not _computes_bf16(kind), device=ranks.device))
        if name == "auto":
            name = "bf16" if not lacking else "fp16" if kind == "cuda" else "fp32"
        if name == "fp16" and kind != "cuda":
            raise ConfigError("precision: fp16 needs a GPU; set train.precision or classifier.precision=auto")
        if name == "bf16" and lacking and ranks.is_main:
            log.warning(
                "precision bf16: %d of %d ranks run on a device that only emulates it, 15 times slower;"
                " precision=auto chooses what all devices have",
                int(lacking),
                ranks.world_size,
            )
        self.name = name
        self.device_type = kind
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
        self.dtype = torch.float64 if name == "fp64" else torch.float32  # of parameters
        self.scaler = torch.amp.GradScaler(kind, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Return the context in which forward passes run."""
        half = self.half or torch.bfloat16
        return torch.autocast(self.device_type, dtype=half, enabled=self.half is not None)


def _computes_bf16(device_type: str) -> bool:
    """Whether this rank's device has instructions for bf16."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


class AdamW(torch.optim.AdamW):
    """AdamW that starts without torch's compiler.

    Torch's optimizers import it, which takes seconds in every process, only to tell it to leave some of their
    methods alone. Nothing here compiles an optimizer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for method in vars(torch.optim.Optimizer).values():
            as_written = getattr(method, "__wrapped__", None)
            if as_written is not None and not hasattr(as_written, "__dynamo_disable"):
                setattr(as_written, "__dynamo_disable", as_written)  # torch keeps its answer there
        super().__init__(*args, **kwargs)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters as torch's AdamW does."""
        return _ADAMW_STEP(self, closure)


_ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)


def adam(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay; Adam if weight_decay is 0."""
    return AdamW(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
        capturable=True,
    )


# Each must be fused: the trainer skips a bad step on the device through the attribute `found_inf`.
# Each must treat every number alone: the trainer hands over all weights as one vector. One that is not
# `capturable` keeps the step out of a CUDA graph.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], OptimConfig], torch.optim.Optimizer]] = {"adam": adam}


def make_optimizer(model: nn.Module | FlatWeights, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer `config.name`. The caller sets the learning rate before every step."""
    return OPTIMIZERS[config.name](model.parameters(), config)


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """A straight line from 1 to 0."""
    return 1 - progress


# Each maps the progress after the warm-up, 0 to 1, to a height that falls from 1 to 0.
SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "linear": linear}


def learning_rate(images: int, total: int, config: OptimConfig) -> float:
    """Return the learning rate after `images` of `total` images.

    It rises linearly over `warmup_images`, then falls to `final_lr_fraction` along the schedule.
    """
    if images < config.warmup_images:
        return config.lr * (images + 1) / (config.warmup_images + 1)
    progress = min(1.0, (images - config.warmup_images) / max(1, total - config.warmup_images))
    low = config.final_lr_fraction
    return config.lr * (low + (1 - low) * SCHEDULES[config.schedule](progress))


def kl_weight(images: int, warmup_images: int) -> float:
    """Return beta: it rises linearly from 0 to 1 over `warmup_images`."""
    if not warmup_images:
        return 1.0
    return min(1.0, images / warmup_images)


class Ema:
    """An exponential moving average of the weights, held in a second model.

    Every rank computes the same average without communication.
    """

    def __init__(self, model: nn.Module, weights: FlatWeights, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.weights = weights
        self.averages = FlatWeights(self.model, weights.tensors)
        self.decay = decay

    def pace(self, step: int) -> float:
        """Return 1 - decay for this step; the decay is smaller during the first steps."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, pace: Tensor) -> None:
        """Add pace * (weights - average); `pace` is a tensor []."""
        average = self.averages.vector
        average.lerp_(self.weights.vector, pace.to(average.dtype))
