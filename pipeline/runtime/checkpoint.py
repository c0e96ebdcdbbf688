"""Checkpoints: safetensors + JSON, written to a temporary name, fsynced and renamed, the JSON last; the newest valid one wins."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cvae.model import CVAE
from pipeline import config as configuration
from pipeline import layout
from pipeline.errors import CheckpointError
from pipeline.runtime.files import sha256, write_json

FORMAT = 1
log = logging.getLogger("cvae.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk: `file` holds the tensors, `meta` is its JSON."""

    file: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return int(self.meta["step"])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, without it."""
        with safe_open(self.file, "pt") as opened:
            return {name[len(prefix) :]: opened.get_tensor(name) for name in opened.keys() if name.startswith(prefix)}


class Checkpoints:
    """The folder of a run's checkpoints. Only rank 0 saves; every rank may read."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps with a JSON (the JSON is written last), oldest first."""
        return sorted(int(p.stem.removeprefix("step_")) for p in self.folder.glob("step_*.json"))

    def path(self, step: int) -> Path:
        """The tensors' file of one step."""
        return self.folder / f"step_{step:08d}.safetensors"

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write one checkpoint durably, then forget old ones; best.json follows meta["validation"]["val_ema/loss"]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.path(step)
        temporary = file.with_suffix(".tmp")
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        digest = sha256(temporary)
        os.replace(temporary, file)
        write_json(file.with_suffix(".json"), {"format": FORMAT, "step": step, **meta, "sha256": digest})
        self._note_best(step, meta)
        self._forget()

    def _note_best(self, step: int, meta: dict[str, Any]) -> None:
        loss = (meta.get("validation") or {}).get("val_ema/loss")
        best = self.best()
        if loss is not None and math.isfinite(loss) and (best is None or loss < best["loss"]):
            write_json(self.folder / "best.json", {"step": step, "loss": loss})

    def best(self) -> dict[str, Any] | None:
        """{"step", "loss"} of the lowest validation loss of the averaged weights."""
        file = self.folder / "best.json"
        return json.loads(file.read_text()) if file.exists() else None

    def _forget(self) -> None:
        best = self.best()
        kept = {*self.steps()[-self.keep :], best["step"] if best else -1}
        for step in self.steps():
            if step not in kept:
                self.path(step).with_suffix(".json").unlink()
                self.path(step).unlink(missing_ok=True)

    def read(self, step: int) -> Checkpoint:
        """One checkpoint, its digest verified. Raises CheckpointError that names the file."""
        file = self.path(step)
        try:
            meta = json.loads(file.with_suffix(".json").read_text())
            digest = sha256(file)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not readable ({error})") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("step") != step:
            raise CheckpointError(f"{file.with_suffix('.json')}: not a description of format {FORMAT} and step {step}")
        if digest != meta.get("sha256"):
            raise CheckpointError(f"{file}: damaged: its sha256 differs from the one noted when it was written")
        return Checkpoint(file, meta)

    def newest(self, set_aside: bool = False) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged newer ones get a warning and, if `set_aside` (one rank), another name."""
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CheckpointError as error:
                log.warning("%s; falling back to an older one", error)
                if set_aside:
                    for file in (self.path(step), self.path(step).with_suffix(".json")):
                        if file.exists():
                            file.rename(file.with_name(file.name + ".damaged"))
        return None


def state_tensors(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything of a training state that is a tensor, under names: model.*, ema.*, optim.<parameter>.<moment>."""
    named = {f"model.{n}": t for n, t in model.state_dict().items()} | {f"ema.{n}": t for n, t in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        named |= {f"optim.{name}.{k}": v for k, v in optimizer.state[parameter].items()}
    return named


def restore(checkpoint: Checkpoint, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the tensors of `checkpoint` back where `state_tensors` took them (every rank, the same file)."""
    model.load_state_dict(checkpoint.tensors("model."))
    ema.load_state_dict(checkpoint.tensors("ema."))
    moments = checkpoint.tensors("optim.")
    for name, parameter in model.named_parameters():
        own = {k.removeprefix(f"{name}."): v for k, v in moments.items() if k.rpartition(".")[0] == name}
        # The fused kernel walks memory: moments must lie in memory as their parameter does (channels last, say).
        optimizer.state[parameter] = {
            k: torch.empty_like(parameter).copy_(v) if v.shape == parameter.shape else v.to(parameter.device) for k, v in own.items()
        }


def require_same(then: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError that names every key by which two sets of trained sections differ."""
    old, new = configuration.leaves(then), configuration.leaves(now)
    keys = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not isinstance(old.get(k, new.get(k)), dict)]
    if keys:
        listed = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in keys)
        raise CheckpointError(f"{where}: trained with another configuration ({listed}); use another run directory or train.init_from")


@dataclass(frozen=True)
class CheckpointInfo:
    """Where evaluated weights come from."""

    step: int
    images: int
    s2: float  # the model's decoder variance on the [-1, 1] scale, for these weights
    s2_fit: float  # SSE / (N P) on the calibration images; equals s2 for the optimal variance
    attributes: list[str]  # names read by the model, in order
    size: int
    file: Path
    digest: str  # sha256 of the file


def load_model(run_dir: Path, which: str, weights: str, device: torch.device) -> tuple[CVAE, CheckpointInfo]:
    """The model of a run in eval mode. `which`: best | latest | a step; `weights`: ema | raw.

    Raises CheckpointError where there is no such checkpoint, it is damaged, or it was saved without a validation.
    """
    store = Checkpoints(layout.checkpoints_dir(run_dir))
    best = store.best()
    if which == "best" and best:
        checkpoint: Checkpoint | None = store.read(best["step"])
    elif which.isdigit():
        checkpoint = store.read(int(which))
    else:
        checkpoint = store.newest()
    if checkpoint is None:
        raise CheckpointError(f"{store.folder}: no checkpoint; run the train stage first: launch.py --stages train --run-dir {run_dir}")
    meta = checkpoint.meta
    if not meta["validation"]:
        raise CheckpointError(f"{checkpoint.file}: saved on a stop signal, without its variance; resume training, or use 'best'")
    config = configuration.load([run_dir / "config.yaml"])
    require_same({"model": meta["sections"]["model"]}, {"model": configuration.to_dict(config.model)}, run_dir)
    model = CVAE(config.model, meta["size"], len(meta["attributes"]))
    model.load_state_dict(checkpoint.tensors("ema." if weights == "ema" else "model."))
    values = meta["validation"]
    info = CheckpointInfo(
        checkpoint.step,
        meta["images"],
        values[f"val_{weights}/s2"],
        values[f"val_{weights}/s2_fit"],
        meta["attributes"],
        meta["size"],
        checkpoint.file,
        meta["sha256"],
    )
    return model.to(device).eval(), info
