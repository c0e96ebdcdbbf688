"""Where everything lies on disk, and under which digest: the stages meet in these files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.load import digest, to_dict
from pipeline.config.schema import RunConfig

TOY_FORMAT = 1  # raise when the same seed draws other faces
SHARD_FORMAT = 1  # raise when the bytes of shards change for the same configuration
CLASSIFIER_FORMAT = 1  # raise when the classifier's architecture or training changes


def shared_dir(config: RunConfig) -> Path:
    """What is made once and used by every run."""
    return Path(config.runs_dir).absolute() / "_shared"


def toy_dir(config: RunConfig) -> Path:
    """Toy faces in CelebA's official layout."""
    return shared_dir(config) / "toy" / digest([TOY_FORMAT, to_dict(config.toy)])


def source_path(config: RunConfig) -> Path:
    """The CelebA folder that is sharded: the user's, or the toy faces."""
    return Path(config.shard.source).expanduser().absolute() if config.shard.source else toy_dir(config)


def shards_digest(config: RunConfig) -> str:
    """Digest of the sections that the shard stage reads."""
    source: Any = (
        {"path": str(source_path(config))} if config.shard.source else [TOY_FORMAT, to_dict(config.toy)]
    )
    return digest(["shard", SHARD_FORMAT, {**to_dict(config.shard), "source": source}])


def shards_dir(config: RunConfig) -> Path:
    """Tars and manifest.json of this configuration."""
    return shared_dir(config) / "shards" / shards_digest(config)


def classifier_digest(config: RunConfig) -> str:
    """Digest of the sections that the classifier stage reads, and of its input shards."""
    section = {k: v for k, v in to_dict(config.classifier).items() if k != "precision"}
    return digest(["classifier", CLASSIFIER_FORMAT, shards_digest(config), section])


def classifier_dir(config: RunConfig) -> Path:
    """model.safetensors, model.json and metrics.json (written last) of the attribute classifier."""
    return shared_dir(config) / "classifier" / classifier_digest(config)


def reference_dir(config: RunConfig) -> Path:
    """Feature statistics of real images, one folder per content digest."""
    return shared_dir(config) / "reference"


TRAIN_FREE = {  # may change on resume: length, intervals, logging, precision; everything else decides the weights
    "images", "micro_batch", "precision", "channels_last", "deterministic", "log_interval", "val_interval",
    "checkpoint_interval", "keep_checkpoints", "keep_every", "max_bad_steps", "profile", "threads", "timeout_s", "stall_s",
}  # fmt: skip


def trained_sections(config: RunConfig) -> dict[str, Any]:
    """What must stay the same for a checkpoint to be continued: model, data, seed, global batch, optimizer.

    The shards' content belongs to it too; the train stage adds its digest, for a path may move.
    """
    train = {k: v for k, v in to_dict(config.train).items() if k not in TRAIN_FREE}
    data = {k: v for k, v in to_dict(config.data).items() if k not in ("verify", "stage_to", "damaged")}
    return {
        "seed": config.seed,
        "data": data,
        "model": to_dict(config.model),
        "optim": to_dict(config.optim),
        "train": train,
    }


def train_dir(run_dir: Path) -> Path:
    """checkpoints/, metrics.jsonl, and done.json once the configured length is reached."""
    return run_dir / "train"


def checkpoints_dir(run_dir: Path) -> Path:
    """step_00001200.{safetensors,json}; damaged ones have .damaged behind their name."""
    return train_dir(run_dir) / "checkpoints"


def progress_picture(run_dir: Path, step: int) -> Path:
    """Samples of fixed noise at one validation."""
    return train_dir(run_dir) / "samples" / f"step_{step:08d}.png"


def progress_pictures(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, file) of all of them, in the order of the steps."""
    return [
        (int(file.stem[5:]), file) for file in sorted((train_dir(run_dir) / "samples").glob("step_*.png"))
    ]


def eval_dirs(run_dir: Path) -> list[Path]:
    """Evaluations of a run, oldest first; a complete one holds metrics.json."""
    numbered = [p for p in (run_dir / "eval").glob("*") if p.name.isdigit()]
    return sorted(numbered, key=lambda p: int(p.name))
