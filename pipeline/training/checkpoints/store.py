"""The checkpoints of a run: safetensors for the tensors, JSON for everything else.

A checkpoint is written under a temporary name, fsynced and renamed; its JSON is written last and
vouches for the tensors by their sha256. The newest checkpoint that verifies is the one to continue.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError, StorageError
from pipeline.rundir.files import give_usual_mode, intact, seal, sha256, sync_folder, write_json

FORMAT = 2
READABLE = (1, 2)  # format 1 had no digest of the JSON itself
META: dict[str, tuple[type, ...]] = {
    "images": (int,),
    "seconds": (int, float),
    "attributes": (list,),
    "size": (int,),
    "sections": (dict,),
    "scaler": (dict,),
    "validation": (dict, type(None)),
}
_NAME = re.compile(r"step_(\d{8,12})\.json")
log = logging.getLogger("cvae.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk: `file` holds the tensors, `meta` is its JSON."""

    file: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps before this checkpoint."""
        return int(self.meta["step"])

    @property
    def loss(self) -> float:
        """What the training minimises, of the averaged weights on val; infinite if it was not measured.

        `val_ema/loss` is the negative ELBO alone. Loss terms stand beside it and count with their weight.
        """
        validation = self.meta.get("validation") or {}
        loss = validation.get("val_ema/loss", math.inf)
        for name, term in self.meta["sections"].get("model", {}).get("losses", {}).items():
            loss += term["weight"] * validation.get(f"val_ema/{name}", 0.0)
        return loss if math.isfinite(loss) else math.inf

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with `prefix`, under the rest of their name.

        Raises CheckpointError if the file is not readable.
        """
        try:
            with safe_open(self.file, "pt") as opened:
                names = [name for name in opened.keys() if name.startswith(prefix)]
                return {name.removeprefix(prefix): opened.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file}: not readable as safetensors ({error})") from None


class Checkpoints:
    """The folder of a run's checkpoints. Only the owner's rank 0 writes; every rank may read.

    The `keep` newest checkpoints, the best one and those at multiples of `keep_every` steps are kept.
    """

    def __init__(self, folder: Path, keep: int = 2, keep_every: int = 0) -> None:
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every

    def steps(self) -> list[int]:
        """Return the steps of complete checkpoints, oldest first; a complete one has a JSON."""
        names = [_NAME.fullmatch(file.name) for file in self.folder.glob("step_*.json")]
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Return the tensors' file of `step`."""
        return self.folder / f"step_{step:08d}.safetensors"

    def description(self, step: int) -> Path:
        """Return the JSON file of `step`."""
        return self.path(step).with_suffix(".json")

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write one checkpoint durably, then delete old ones. Raises StorageError if the disk refuses."""
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
            sync_folder(self.folder)  # the tensors must be on disk before the JSON that vouches for them
            content = {"format": FORMAT, "step": step, **meta, "sha256": digest}
            write_json(self.description(step), seal(content))
            self._delete_old()
        except (OSError, SafetensorError) as error:
            _delete(temporary)
            if not self.description(step).exists():
                _delete(file)
            newest = max(self.steps(), default=0)
            raise StorageError(
                f"{file}: could not be written ({error}). The newest checkpoint is that of step {newest}. "
                "Free some space or make the folder writable; the same command then continues from there"
            ) from None

    def best(self) -> int | None:
        """Return the step of the checkpoint with the lowest validation loss of the averaged weights."""
        losses = {step: self._loss(step) for step in self.steps()}
        best = min(losses, key=lambda step: losses[step], default=None)
        if best is None or math.isinf(losses[best]):
            return None
        return best

    def _loss(self, step: int) -> float:
        try:
            return Checkpoint(self.path(step), self._meta(step)).loss
        except CheckpointError:
            return math.inf

    def _delete_old(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best()}
        for step in self.steps():
            at_multiple = self.keep_every > 0 and step % self.keep_every == 0
            if step in kept or at_multiple:
                continue
            self.description(step).unlink()
            self.path(step).unlink(missing_ok=True)

    def replace_all(self) -> None:
        """Put all checkpoints aside, under the next free name checkpoints.replaced<n> (one rank)."""
        number = len(list(self.folder.parent.glob(f"{self.folder.name}.replaced*"))) + 1
        self.folder.rename(self.folder.with_name(f"{self.folder.name}.replaced{number}"))

    def clear_unfinished(self) -> None:
        """Delete what a killed process left behind: temporary files, and tensors without a JSON."""
        for pattern in ("*.tmp", ".*.tmp", "step_*.safetensors"):
            for file in self.folder.glob(pattern):
                if not file.with_suffix(".json").exists():
                    _delete(file)

    def read(self, step: int) -> Checkpoint:
        """Return one checkpoint after its digests were verified. Raises CheckpointError with the file."""
        file = self.path(step)
        meta = self._meta(step)
        try:
            digest = sha256(file)
        except OSError as error:
            raise CheckpointError(f"{file}: not readable ({error})") from None
        if digest != meta.get("sha256"):
            raise CheckpointError(f"{file}: damaged: its sha256 is not the one in {file.stem}.json")
        return Checkpoint(file, meta)

    def _meta(self, step: int) -> dict[str, Any]:
        """Return the JSON of `step` after its digest, keys and types were checked."""
        file = self.description(step)
        try:
            meta = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: not readable ({error})") from None
        if not isinstance(meta, dict) or meta.get("format") not in READABLE or meta.get("step") != step:
            raise CheckpointError(f"{file}: expected a checkpoint of format {FORMAT} and step {step}")
        unsealed = meta["format"] > 1 and "digest" not in meta
        if unsealed or not intact(meta):
            raise CheckpointError(f"{file}: damaged: its content does not fit its digest")
        for key, kinds in META.items():
            if key not in meta or not isinstance(meta[key], kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise CheckpointError(
                    f"{file}: key '{key}': got {str(meta.get(key))[:80]!r}, expected {expected}"
                )
        for name, value in (meta["validation"] or {}).items():
            if not isinstance(value, (int, float)):
                raise CheckpointError(f"{file}: key 'validation.{name}': got {value!r}, expected a number")
        return meta

    def newest(self, set_aside: bool = False) -> Checkpoint | None:
        """Return the newest checkpoint that verifies; None if there has never been one.

        Each damaged newer one gets a warning and, if `set_aside` (rank 0 only), the suffix .damaged.
        Raises CheckpointError if there are checkpoints and none is intact: training never restarts
        from step 0 on its own.
        """
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CheckpointError as error:
                log.warning("%s; falling back to an older checkpoint", error)
                if set_aside:
                    self._set_aside(step)
        damaged = list(self.folder.glob("step_*.damaged"))
        if damaged or self.steps():
            raise CheckpointError(
                f"{self.folder}: none of its checkpoints is intact; "
                f"remove {self.folder} to begin again from the first step"
            )
        return None

    def _set_aside(self, step: int) -> None:
        for file in (self.path(step), self.description(step)):
            if not file.exists():
                continue
            try:
                file.rename(file.with_name(file.name + ".damaged"))
            except OSError as error:
                log.warning("%s: could not be renamed to *.damaged (%s)", file, error)


def _delete(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        pass  # the folder has become read-only; nobody reads a file without its JSON
