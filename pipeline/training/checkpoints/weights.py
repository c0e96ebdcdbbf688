"""Between a checkpoint and the objects of a training: weights, averaged weights, optimizer state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvae.model import CVAE
from pipeline.config import load as configuration
from pipeline.config.renamed import with_new_names
from pipeline.config.schema import RunConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.rundir import layout
from pipeline.training.checkpoints.store import Checkpoint, Checkpoints
from pipeline.training.phases import last_phase, phase
from pipeline.training.step.flat import FlatWeights


def state_tensors(
    model: nn.Module, ema: nn.Module, weights: FlatWeights, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Return every tensor of a training state: model.*, ema.* and optim.<parameter>.<moment>.

    Many are views of one vector, so a caller that writes them to a file copies them first.
    """
    named = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    named |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    moments = weights.moments(optimizer)
    return named | {f"optim.{name}": tensor for name, tensor in moments.items()}


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    ema: nn.Module,
    weights: FlatWeights,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put the tensors of `checkpoint` back where `state_tensors` took them (all ranks, the same file).

    Raises CheckpointError if names or shapes differ.
    """
    load_weights(checkpoint, model, "model.")
    load_weights(checkpoint, ema, "ema.")
    weights.restore_moments(optimizer, checkpoint.tensors("optim."))


def load_weights(checkpoint: Checkpoint, model: nn.Module, prefix: str) -> None:
    """Load the tensors under `prefix` into `model`; raises CheckpointError if names or shapes differ."""
    try:
        model.load_state_dict(checkpoint.tensors(prefix))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint.file}: its tensors do not fit this model: {reason}") from None


def require_same(then: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise CheckpointError with every key by which two sets of trained sections differ.

    A key that `then` lacks counts as its default: the checkpoint is older than the key.
    """
    defaults = configuration.leaves(layout.trained_sections(RunConfig()))
    old = configuration.leaves(with_new_names(then, str(where)))
    new = configuration.leaves(now)
    differing = []
    for key in sorted(old.keys() | new.keys()):
        before = old.get(key, defaults.get(key))
        after = new.get(key)
        is_section = isinstance(old.get(key, after), dict)
        if before != after and not is_section:
            differing.append(f"{key}: {before!r} then, {after!r} now")
    if differing:
        raise CheckpointError(
            f"{where}: trained with another configuration ({'; '.join(differing)}); "
            "use another run directory or train.init_from"
        )


@dataclass(frozen=True)
class CheckpointInfo:
    """Where evaluated weights come from."""

    step: int
    images: int
    s2: float  # the model's decoder variance on the [-1, 1] scale, for these weights
    s2_fit: float  # SSE / (N P) on the calibration images; equals s2 for the optimal variance
    attributes: list[str]  # names that the model reads, in order
    size: int  # side of the images, pixels
    validation: dict[str, float]  # what was measured on the val split, by metric
    file: Path
    digest: str  # sha256 of the file


def load_model(
    run_dir: Path, which: str, weights: str, device: torch.device, stage: str = ""
) -> tuple[CVAE, CheckpointInfo]:
    """Return the model of a run in eval mode. `which`: best | latest | a step; `weights`: ema | raw.

    `stage`: train | tune | refine | steer; empty: the last one that the configuration asks for.
    Raises ConfigError for another word. Raises CheckpointError if the checkpoint is missing or damaged,
    belongs to another model, or was saved without a validation.
    """
    config = configuration.load([run_dir / "config.yaml"])
    stage = stage or last_phase(config)
    config = phase(stage, config).config
    checkpoint = _choose(run_dir, which, stage)
    meta = checkpoint.meta
    validation = meta["validation"]
    if not validation:
        raise CheckpointError(
            f"{checkpoint.file}: saved after a stop signal, without its decoder variance; "
            "resume training, or set eval.checkpoint=best"
        )
    s2_name, s2_fit_name = f"val_{weights}/s2", f"val_{weights}/s2_fit"
    if s2_name not in validation or s2_fit_name not in validation:
        raise CheckpointError(
            f"{checkpoint.file}: its validation lacks the decoder variance; use another checkpoint"
        )

    trained_model = {"model": meta["sections"].get("model")}
    require_same(trained_model, {"model": configuration.to_dict(config.model)}, run_dir)
    model = CVAE(config.model, meta["size"], len(meta["attributes"]))
    load_weights(checkpoint, model, "ema." if weights == "ema" else "model.")
    info = CheckpointInfo(
        step=checkpoint.step,
        images=meta["images"],
        s2=validation[s2_name],
        s2_fit=validation[s2_fit_name],
        attributes=meta["attributes"],
        size=meta["size"],
        validation=validation,
        file=checkpoint.file,
        digest=meta["sha256"],
    )
    return model.to(device).eval(), info


def _choose(run_dir: Path, which: str, stage: str) -> Checkpoint:
    """Return the verified checkpoint best | latest | a step; `best` without a validation is the newest."""
    store = Checkpoints(layout.checkpoints_dir(run_dir, stage))
    if which.isdigit():
        return store.read(int(which))
    if which not in ("best", "latest"):
        kept = ", ".join(map(str, store.steps())) or "none"
        raise ConfigError(
            f"key 'eval.checkpoint': got {which!r}, expected best, latest, all or the step of a checkpoint "
            f"that is kept ({kept})"
        )
    best = store.best() if which == "best" else None
    checkpoint = store.newest() if best is None else store.read(best)
    if checkpoint is None:
        raise CheckpointError(
            f"{store.folder}: no checkpoint; run the stage {stage} first: "
            f"launch.py --stages {stage} --run-dir {run_dir}"
        )
    return checkpoint
