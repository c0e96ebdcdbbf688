"""The place of every file, and its digest. Stages never import each other: they meet in these files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.config.load import digest, to_dict
from pipeline.config.paths import is_remote
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError

TOY_FORMAT = 1  # raise it when the same seed draws other faces
SHARD_FORMAT = 1  # raise it when the bytes of shards change for the same configuration
MANIFEST = "manifest.json"  # of shards; written last
PICTURES = "pictures.json"  # of an evaluation: what its pictures show
REFERENCE = "features.safetensors"  # of real images
ONCE_USUAL_CROP = 148  # stands for shard.crop=0 in digests: it was the default for every data set
CLASSIFIER_FORMAT = 1  # raise it when the classifier's architecture or training changes
GUIDE_FORMAT = 1  # raise it when a guide's architecture or training changes

# Keys that may change when a run continues: they decide nothing about the weights.
TRAIN_FREE = {
    "images",
    "micro_batch",
    "precision",
    "step",
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
DATA_FREE = {"verify", "stage_to", "damaged", "shards", "tars", "cache_dir", "cache_gb"}  # where data lie


def shared_dir(config: RunConfig) -> Path:
    """Return the folder of everything that is made once and used by every run."""
    return shared_dir_of(Path(config.runs_dir).absolute())


def shared_dir_of(runs_dir: Path) -> Path:
    """Return the shared folder in a folder of runs."""
    return runs_dir / "_shared"


def own_dir(config: RunConfig) -> Path:
    """Return the folder that takes what is new if the shared folder is read-only."""
    return Path(config.runs_dir).absolute() / "_own"


def shared_output(config: RunConfig, kind: str, name: str, last: str) -> Path:
    """Return the folder of one output that runs share. The output is complete once it holds `last`.

    A group may give its members a shared folder (or parts of it) to read only. What is complete there
    is used. What is new then lies in `own_dir`, which all runs of this runs folder share.
    """
    shared = shared_dir(config) / kind / name
    own = own_dir(config) / kind / name
    if (own / last).exists():
        return own
    if (shared / last).exists() or _writable(shared):
        return shared
    return own


def _writable(folder: Path) -> bool:
    """Return whether files can be made in `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def toy_dir(config: RunConfig) -> Path:
    """Return the folder of the toy faces, in CelebA's official layout."""
    name = digest([TOY_FORMAT, to_dict(config.toy)])
    return shared_output(config, "toy", name, "list_attr_celeba.txt")


def code_dir(config: RunConfig, name: str) -> Path:
    """Return the folder of one copy of the code, which jobs on a cluster run."""
    return shared_output(config, "code", name, "launch.py")


def source_path(config: RunConfig) -> Path:
    """Return the folder of the data set that is sharded: the user's, or the toy faces."""
    if config.shard.source:
        return Path(config.shard.source).expanduser().absolute()
    return toy_dir(config)


def source_place(config: RunConfig) -> str:
    """Return the absolute path, or the URLs, of the data set that is sharded."""
    if is_remote(config.shard.source):
        return config.shard.source
    return str(source_path(config))


def shards_digest(config: RunConfig) -> str:
    """Return the digest of the sections that the shard stage reads, or of the shards in `data.shards`."""
    if config.data.shards:
        return _given_shards_digest(config.data.shards)
    section = to_dict(config.shard)
    for permission in ("allow_upsampling", "allow_pipe"):
        del section[permission]  # it changes no byte
    for key, usual in (("source_kind", ""), ("background", "keep")):
        if section[key] == usual:
            del section[key]  # there was no such key once; digests stay as they were
    section["crop"] = section["crop"] or ONCE_USUAL_CROP
    if section["format"] != "in_place":
        section["format"] = config.shard.stored_as
    if section["format"] == "strided":
        del section["format"]  # the only format once; digests stay as they were
    if config.shard.source:
        section["source"] = {"path": source_place(config)}
    else:
        section["source"] = [TOY_FORMAT, to_dict(config.toy)]
    return digest(["shard", SHARD_FORMAT, section])


def shards_dir(config: RunConfig) -> Path:
    """Return the folder of this configuration's tars and manifest.json.

    Raises ConfigError if `data.shards` names a folder without a manifest.
    """
    name = shards_digest(config)
    if config.data.shards:
        return Path(config.data.shards).expanduser().absolute()
    return shared_output(config, "shards", name, MANIFEST)


def _given_shards_digest(folder: str) -> str:
    """Return the digest of the content of existing shards, from their manifest. Raises ConfigError."""
    file = Path(folder).expanduser().absolute() / MANIFEST
    try:
        content = json.loads(file.read_bytes())["content_digest"]
    except OSError as error:
        raise ConfigError(
            f"key 'data.shards': {folder}: its {MANIFEST} cannot be read ({error.strerror}); name a folder "
            "of finished shards, as in _shared/shards/DIGEST, or leave the key empty to make shards"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f"key 'data.shards': {folder}: its {MANIFEST} is damaged; copy the shards again"
        ) from None
    return digest(["given shards", SHARD_FORMAT, content])


def classifier_digest(config: RunConfig) -> str:
    """Return the digest of the sections that the classifier stage reads, and of its input shards."""
    section = to_dict(config.classifier)
    del section["precision"]
    return digest(["classifier", CLASSIFIER_FORMAT, shards_digest(config), section])


def classifier_dir(config: RunConfig) -> Path:
    """Return the folder of the attribute classifier.

    It holds model.safetensors, model.json and metrics.json, which is written last.
    """
    return shared_output(config, "classifier", classifier_digest(config), "metrics.json")


def guide_dir(config: RunConfig, name: str) -> Path:
    """Return the folder of one guide of the stage `steer`.

    It holds model.safetensors and model.json, which is written last.
    """
    parts = ["guide", GUIDE_FORMAT, shards_digest(config), name, config.steer.guide_epochs]
    settings = [config.classifier.batch_size, config.classifier.precision, config.classifier.seed]
    return shared_output(config, "guides", digest(parts + settings), "model.json")


def reference_dir(config: RunConfig, name: str) -> Path:
    """Return the folder of the features of real images; `name` is the digest of what they depend on."""
    return shared_output(config, "reference", name, REFERENCE)


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


def nodes_dir(run_dir: Path) -> Path:
    """Return the folder of HOST.jsonl: how busy each node was while it trained."""
    return run_dir / "nodes"


def model_dir(run_dir: Path) -> Path:
    """Return the folder of the exported model, which `cvae.load` finds in a run directory."""
    return run_dir / "model"


def eval_dirs(run_dir: Path) -> list[Path]:
    """Return the folders of a run's evaluations, oldest first; a complete one holds metrics.json."""
    numbered = [folder for folder in (run_dir / "eval").glob("*") if folder.name.isdigit()]
    return sorted(numbered, key=lambda folder: int(folder.name))
