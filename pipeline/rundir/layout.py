"""Where every file lies, and under which digest. Stages never import each other: they meet in these files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.load import digest, to_dict
from pipeline.config.schema import RunConfig

TOY_FORMAT = 1  # raise it when the same seed draws other faces
SHARD_FORMAT = 1  # raise it when the bytes of shards change for the same configuration
CLASSIFIER_FORMAT = 1  # raise it when the classifier's architecture or training changes

# Keys that may change when a run continues: they decide nothing about the weights.
TRAIN_FREE = {
    "images",
    "micro_batch",
    "precision",
    "channels_last",
    "deterministic",
    "log_interval",
    "val_interval",
    "max_lost_steps",
    "keep_checkpoints",
    "keep_every",
    "max_bad_steps",
    "profile",
    "threads",
    "timeout_s",
    "stall_s",
}
DATA_FREE = {"verify", "stage_to", "damaged"}


def shared_dir(config: RunConfig) -> Path:
    """Return the folder of everything that is made once and used by every run."""
    return shared_dir_of(Path(config.runs_dir).absolute())


def shared_dir_of(runs_dir: Path) -> Path:
    """Return the shared folder in a folder of runs."""
    return runs_dir / "_shared"


def toy_dir(config: RunConfig) -> Path:
    """Return the folder of the toy faces, in CelebA's official layout."""
    return shared_dir(config) / "toy" / digest([TOY_FORMAT, to_dict(config.toy)])


def source_path(config: RunConfig) -> Path:
    """Return the folder of the data set that is sharded: the user's, or the toy faces."""
    if config.shard.source:
        return Path(config.shard.source).expanduser().absolute()
    return toy_dir(config)


def shards_digest(config: RunConfig) -> str:
    """Return the digest of the sections that the shard stage reads."""
    section = to_dict(config.shard)
    del section["allow_upsampling"]  # it permits a size, but changes no byte
    if config.shard.source:
        section["source"] = {"path": str(source_path(config))}
    else:
        section["source"] = [TOY_FORMAT, to_dict(config.toy)]
    return digest(["shard", SHARD_FORMAT, section])


def shards_dir(config: RunConfig) -> Path:
    """Return the folder of this configuration's tars and manifest.json."""
    return shared_dir(config) / "shards" / shards_digest(config)


def classifier_digest(config: RunConfig) -> str:
    """Return the digest of the sections that the classifier stage reads, and of its input shards."""
    section = to_dict(config.classifier)
    del section["precision"]
    return digest(["classifier", CLASSIFIER_FORMAT, shards_digest(config), section])


def classifier_dir(config: RunConfig) -> Path:
    """Return the folder of the attribute classifier.

    It holds model.safetensors, model.json and metrics.json, which is written last.
    """
    return shared_dir(config) / "classifier" / classifier_digest(config)


def reference_dir(config: RunConfig) -> Path:
    """Return the folder of the feature statistics of real images, one subfolder per content digest."""
    return shared_dir(config) / "reference"


def trained_sections(config: RunConfig) -> dict[str, Any]:
    """Return what must stay the same while a run continues: model, data, seed, global batch, optimizer.

    The content of the shards must stay the same too. The train stage adds its digest, since a path may move.
    """
    train = to_dict(config.train)
    data = to_dict(config.data)
    return {
        "seed": config.seed,
        "data": {key: value for key, value in data.items() if key not in DATA_FREE},
        "model": to_dict(config.model),
        "optim": to_dict(config.optim),
        "train": {key: value for key, value in train.items() if key not in TRAIN_FREE},
    }


def train_dir(run_dir: Path, phase: str = "train") -> Path:
    """Return the folder of checkpoints/, metrics.jsonl and, once the phase is complete, done.json."""
    return run_dir / phase


def checkpoints_dir(run_dir: Path, phase: str = "train") -> Path:
    """Return the folder of step_00001200.{safetensors,json}; damaged ones end in .damaged."""
    return train_dir(run_dir, phase) / "checkpoints"


def progress_picture(run_dir: Path, step: int, phase: str = "train") -> Path:
    """Return the file of the samples drawn from fixed noise at one validation."""
    return train_dir(run_dir, phase) / "samples" / f"step_{step:08d}.png"


def progress_pictures(run_dir: Path) -> list[tuple[int, Path]]:
    """Return (step, file) of all progress pictures, in the order of the steps."""
    files = sorted((train_dir(run_dir) / "samples").glob("step_*.png"))
    return [(int(file.stem.removeprefix("step_")), file) for file in files]


def eval_dirs(run_dir: Path) -> list[Path]:
    """Return the folders of a run's evaluations, oldest first; a complete one holds metrics.json."""
    numbered = [folder for folder in (run_dir / "eval").glob("*") if folder.name.isdigit()]
    return sorted(numbered, key=lambda folder: int(folder.name))
