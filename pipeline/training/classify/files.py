"""The files of a trained classifier: weights, and the names, size and digest that belong to them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from pipeline.errors import CheckpointError
from pipeline.rundir.files import write_bytes, write_json


def save(folder: Path, net: nn.Module, attributes: list[str], size: int) -> None:
    """Write model.safetensors, then model.json."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    meta = {"attributes": attributes, "size": size, "digest": hashlib.sha256(weights).hexdigest()}
    write_bytes(folder / "model.safetensors", weights)
    write_json(folder / "model.json", meta)


def read(folder: Path, stage: str) -> tuple[dict[str, Any], bytes]:
    """Return model.json and the bytes of the weights. `stage`: who writes them.

    Raises CheckpointError if a file is missing or the weights do not have the digest in model.json.
    """
    meta = json.loads(required(folder / "model.json", stage))
    weights = required(folder / "model.safetensors", stage)
    found = hashlib.sha256(weights).hexdigest()
    if found != meta["digest"]:
        raise CheckpointError(
            f"{folder / 'model.safetensors'}: damaged: sha256 {found[:12]}..., expected"
            f" {meta['digest'][:12]}...; delete {folder} and run the `{stage}` stage again"
        )
    return meta, weights


def required(file: Path, stage: str) -> bytes:
    """Return the content of a file that `stage` writes. Raises CheckpointError if it is missing."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: no such file; run the `{stage}` stage of this configuration first"
        ) from None
