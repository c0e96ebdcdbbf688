"""Checkpoints: safetensors + JSON, written to a temporary name, fsynced and renamed, the JSON last; the newest valid one wins."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cvae.model import CVAE
from pipeline.config import load as configuration
from pipeline.config.renamed import with_new_names
from pipeline.errors import CheckpointError, ConfigError, StorageError
from pipeline.rundir import layout
from pipeline.rundir.files import give_usual_mode, intact, seal, sha256, sync_folder, write_json

FORMAT = 2
READABLE = (1, 2)  # 1: the JSON had no digest of its own
META: dict[str, tuple[type, ...]] = {
    "images": (int,), "seconds": (int, float), "attributes": (list,), "size": (int,), "sections": (dict,), "scaler": (dict,),
    "validation": (dict, type(None)),
}  # fmt: skip
_NAME = re.compile(r"step_(\d{8,12})\.json")
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

    @property
    def loss(self) -> float:
        """Validation loss of the averaged weights; infinite where none was measured."""
        loss = (self.meta.get("validation") or {}).get("val_ema/loss", math.inf)
        return loss if math.isfinite(loss) else math.inf

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix`, without it. Raises CheckpointError."""
        try:
            with safe_open(self.file, "pt") as opened:
                return {
                    name[len(prefix) :]: opened.get_tensor(name)
                    for name in opened.keys()
                    if name.startswith(prefix)
                }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: not readable as safetensors ({error})") from None


class Checkpoints:
    """The folder of a run's checkpoints. Only the owner's rank 0 writes; every rank may read."""

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every

    def steps(self) -> list[int]:
        """Steps with a JSON (the JSON is written last), oldest first."""
        return sorted(
            int(name[1]) for file in self.folder.glob("step_*.json") if (name := _NAME.fullmatch(file.name))
        )

    def path(self, step: int) -> Path:
        """The tensors' file of one step."""
        return self.folder / f"step_{step:08d}.safetensors"

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write one checkpoint durably, then forget old ones. Raises StorageError where the disk refuses."""
        file = self.path(step)
        temporary = file.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.detach().contiguous() for name, t in tensors.items()}, temporary)
            give_usual_mode(temporary)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            digest = sha256(temporary)
            os.replace(temporary, file)
            sync_folder(self.folder)  # the tensors' name is on the disk before the JSON that vouches for it
            write_json(
                file.with_suffix(".json"), seal({"format": FORMAT, "step": step, **meta, "sha256": digest})
            )
            self._forget()
        except (OSError, SafetensorError) as error:
            for half in (temporary, file) if not file.with_suffix(".json").exists() else (temporary,):
                _unlink(half)
            raise StorageError(
                f"{file}: could not be written ({error}); the checkpoint of step {max(self.steps(), default=0)} is the newest; "
                "make room or give the right to write, then the same command continues from there"
            ) from None

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss of the averaged weights."""
        losses = {step: self._loss(step) for step in self.steps()}
        best = min(losses, key=lambda step: losses[step], default=None)
        return best if best is not None and losses[best] < math.inf else None

    def _loss(self, step: int) -> float:
        try:
            return Checkpoint(self.path(step), self._meta(step)).loss
        except CheckpointError:
            return math.inf

    def _forget(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self.steps():
            if step not in kept and not (self.keep_every and step % self.keep_every == 0):
                self.path(step).with_suffix(".json").unlink()
                self.path(step).unlink(missing_ok=True)

    def clear_unfinished(self) -> None:
        """Remove what an earlier owner that died while writing or forgetting left: temporary files, tensors without JSON."""
        for file in [
            *self.folder.glob("*.tmp"),
            *self.folder.glob(".*.tmp"),
            *self.folder.glob("step_*.safetensors"),
        ]:
            if not file.with_suffix(".json").exists():
                _unlink(file)

    def _meta(self, step: int) -> dict[str, Any]:
        file = self.path(step).with_suffix(".json")
        try:
            meta = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not readable ({error})") from None
        if not isinstance(meta, dict) or meta.get("format") not in READABLE or meta.get("step") != step:
            raise CheckpointError(f"{file}: not a description of format {FORMAT} and step {step}")
        if (meta["format"] > 1 and "digest" not in meta) or not intact(meta):
            raise CheckpointError(
                f"{file}: damaged: its digest differs from the one noted when it was written"
            )
        for key, kind in META.items():
            if key not in meta or not isinstance(meta[key], kind):
                raise CheckpointError(
                    f"{file}: key '{key}': got {str(meta.get(key))[:80]!r}, expected another type"
                )
        if not all(isinstance(v, (int, float)) for v in (meta["validation"] or {}).values()):
            raise CheckpointError(f"{file}: key 'validation': expected numbers")
        return meta

    def read(self, step: int) -> Checkpoint:
        """One checkpoint, its digests verified. Raises CheckpointError that names the file."""
        file, meta = self.path(step), self._meta(step)
        try:
            digest = sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file}: not readable ({error})") from None
        if digest != meta.get("sha256"):
            raise CheckpointError(
                f"{file}: damaged: its sha256 differs from the one noted when it was written"
            )
        return Checkpoint(file, meta)

    def newest(self, set_aside: bool = False) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged newer ones get a warning and, if `set_aside` (one rank), another name.

        Raises CheckpointError where there are some but none verifies: beginning again must be somebody's wish.
        """
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CheckpointError as error:
                log.warning("%s; falling back to an older one", error)
                if set_aside:
                    self._set_aside(step)
        damaged = sorted(self.folder.glob("step_*.damaged"))
        if damaged or self.steps():
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints is intact; remove {self.folder} to begin again from the first step"
            )
        return None

    def _set_aside(self, step: int) -> None:
        for file in (self.path(step), self.path(step).with_suffix(".json")):
            if file.exists():
                try:
                    file.rename(file.with_name(file.name + ".damaged"))
                except OSError as error:
                    log.warning("%s: could not be set aside (%s)", file, error)


def _unlink(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        pass  # a folder that has become read-only: an unfinished file never has a JSON, so nobody reads it


def state_tensors(model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything of a training state that is a tensor, under names: model.*, ema.*, optim.<parameter>.<moment>."""
    named = {f"model.{n}": t for n, t in model.state_dict().items()} | {
        f"ema.{n}": t for n, t in ema.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        named |= {f"optim.{name}.{k}": v for k, v in optimizer.state[parameter].items()}
    return named


def restore(
    checkpoint: Checkpoint, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put the tensors of `checkpoint` back where `state_tensors` took them (every rank, the same file). Raises CheckpointError."""
    load_weights(checkpoint, model, "model.")
    load_weights(checkpoint, ema, "ema.")
    moments = checkpoint.tensors("optim.")
    for name, parameter in model.named_parameters():
        own = {k.removeprefix(f"{name}."): v for k, v in moments.items() if k.rpartition(".")[0] == name}
        # The fused kernel walks memory: moments must lie in memory as their parameter does (channels last, say).
        optimizer.state[parameter] = {
            k: torch.empty_like(parameter).copy_(v) if v.shape == parameter.shape else v.to(parameter.device)
            for k, v in own.items()
        }


def load_weights(checkpoint: Checkpoint, model: nn.Module, prefix: str) -> None:
    """Load the tensors under `prefix` into `model`; raises CheckpointError where names or shapes differ."""
    try:
        model.load_state_dict(checkpoint.tensors(prefix))
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint.file}: its tensors are not those of this model: {' '.join(str(error).split())[:300]}"
        ) from None


def require_same(then: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError that names every key by which two sets of trained sections differ."""
    old = configuration.leaves(with_new_names(then, str(where)))
    new = configuration.leaves(now)
    keys = [
        k
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k) and not isinstance(old.get(k, new.get(k)), dict)
    ]
    if keys:
        listed = "; ".join(f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in keys)
        raise CheckpointError(
            f"{where}: trained with another configuration ({listed}); use another run directory or train.init_from"
        )


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

    Raises CheckpointError where there is no such checkpoint, it is damaged, or it was saved without a validation, ConfigError for
    another word.
    """
    store = Checkpoints(layout.checkpoints_dir(run_dir))
    if which not in ("best", "latest") and not which.isdigit():
        kept = ", ".join(map(str, store.steps())) or "none"
        raise ConfigError(
            f"key 'eval.checkpoint': {which!r}, expected best, latest, all or a step that is kept ({kept})"
        )
    best = store.best()
    if which == "best" and best is not None:
        checkpoint: Checkpoint | None = store.read(best)
    elif which.isdigit():
        checkpoint = store.read(int(which))
    else:
        checkpoint = store.newest()
    if checkpoint is None:
        raise CheckpointError(
            f"{store.folder}: no checkpoint; run the train stage first: launch.py --stages train --run-dir {run_dir}"
        )
    meta, values = checkpoint.meta, checkpoint.meta["validation"]
    if not values:
        raise CheckpointError(
            f"{checkpoint.file}: saved on a stop signal, without its variance; resume training, or use 'best'"
        )
    config = configuration.load([run_dir / "config.yaml"])
    require_same(
        {"model": meta["sections"].get("model")}, {"model": configuration.to_dict(config.model)}, run_dir
    )
    model = CVAE(config.model, meta["size"], len(meta["attributes"]))
    load_weights(checkpoint, model, "ema." if weights == "ema" else "model.")
    if not {f"val_{weights}/s2", f"val_{weights}/s2_fit"} <= values.keys():
        raise CheckpointError(
            f"{checkpoint.file}: its validation lacks the decoder variance; use another checkpoint"
        )
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
