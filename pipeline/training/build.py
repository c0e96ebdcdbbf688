"""Build the model of a training and replicate it over the ranks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cvae.model import CVAE
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.runtime.distributed import Ranks
from pipeline.training.inputs import Inputs
from pipeline.training.objectives import Objective
from pipeline.training.optim import Precision


def build_model(config: RunConfig, inputs: Inputs, precision: Precision, device: torch.device) -> CVAE:
    """Return a model with random weights, which depend on the seed only (all ranks).

    Raises ConfigError if its parts do not fit together.
    """
    torch.manual_seed(config.seed)
    try:
        model = CVAE(config.model, inputs.shards.size, len(inputs.attributes))
    except ValueError as error:
        raise ConfigError(f"key 'model': {error}") from None
    model = model.to(device, precision.dtype)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def distribute(module: Objective, model: CVAE, precision: Precision, ranks: Ranks) -> nn.Module:
    """Wrap the objective in DDP and run one backward pass that does not count (all ranks).

    DDP rebuilds its buckets after its first backward pass. If that pass were a training step, a
    resumed run would sum gradients in another order than an uninterrupted one.
    """
    if ranks.world_size == 1:
        return module
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # Buffers change on every rank alike, so nobody has to send them around. torch 2.13 renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    quiet: dict[str, Any] = {switch: False}
    wrapped = DistributedDataParallel(module, device_ids=devices, **quiet)
    shapes = (3, model.image_size, model.image_size), (model.n_attributes,), (module.noise_width,)
    blank = [torch.zeros((1, *shape), device=ranks.device, dtype=precision.dtype) for shape in shapes]
    with precision.autocast():
        wrapped(*blank, 1.0, 1.0).objective.backward()
    model.zero_grad(set_to_none=False)  # the gradients are views of one vector
    return wrapped
