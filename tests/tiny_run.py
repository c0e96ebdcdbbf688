"""A run directory with shards, classifier and checkpoint of tiny images, made without training."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch

from cvae.model import CVAE
from pipeline.config.load import dump, load
from pipeline.config.schema import RunConfig
from pipeline.data.loader import to_float
from pipeline.data.manifest import content_digest
from pipeline.data.records import TAIL, RecordFormat
from pipeline.data.shards import Shards
from pipeline.evaluation import classifier
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.runtime.context import Context
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag
from pipeline.training.checkpoints.store import Checkpoints
from pipeline.training.classify import files

SIZE, ATTRIBUTES = 32, ["Bald", "Eyeglasses", "Heavy_Makeup", "Male", "Smiling", "Young"]
SMALL = (
    "model.z_dim=8",
    "model.net.channels=[32,32]",
    "model.prior.flow.layers=2",
    "model.prior.flow.hidden=8",
    "train.precision=fp32",
    "classifier.precision=fp32",
    "classifier.epochs=1",
    "classifier.batch_size=12",
    "eval.n=40",
    "eval.judge=false",
    "eval.flip_images=4",
    "eval.block=8",
    "eval.iw_images=6",
    "eval.iw_samples=3",
    "eval.rare_samples=10",
    "tracking.enabled=false",
)
# Residual nets with attention of every kind, for images of 16 or 32 pixels.
ATTENTION = [
    "model.encoder.name=residual",
    "model.decoder.name=residual",
    "model.residual.channels=[8,16]",
    "model.residual.encoder_blocks=[0,1]",
    "model.residual.decoder_blocks=[0,1]",
    "model.residual.cross_attention=[8]",
    "model.residual.self_attention=[8]",
    "model.conditioner.name=attention",
]


def tiny_config(runs_dir: Path, *overrides: str) -> RunConfig:
    """A configuration for these images; every size is small."""
    return load([], [f"runs_dir={runs_dir}", f"shard.size={SIZE}", *SMALL, *overrides])


def tiny_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise in which attribute k brightens the k-th of six cells: uint8 [n, 32, 32, 3] and [n, 6]."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 6)) < 0.4).astype(np.uint8)
    cells = labels.reshape(n, 2, 3).repeat(16, 1).repeat(11, 2)[:, :, :SIZE, None]
    return (rng.integers(0, 120, (n, SIZE, SIZE, 3)) + 120 * cells).astype(np.uint8), labels


def make_shards(config: RunConfig, train: int = 60, val: int = 40, test: int = 45, shift: int = 0) -> None:
    """Write tars and a manifest; `shift` changes the pixels."""
    folder, form = layout.shards_dir(config), RecordFormat(SIZE, len(ATTRIBUTES))
    folder.mkdir(parents=True)
    splits = {}
    for seed, (split, n) in enumerate({"train": train, "val": val, "test": test}.items()):
        images, labels = tiny_images(n, seed)
        content = form.pack([f"{i:06d}" for i in range(n)], labels, images + np.uint8(shift)).tobytes() + TAIL
        (folder / f"{split}-00000.tar").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        splits[split] = {
            "shards": [{"file": f"{split}-00000.tar", "samples": n, "bytes": len(content), "sha256": digest}]
        }
    shards = [entry for split in splits.values() for entry in split["shards"]]
    manifest = {
        "format": layout.SHARD_FORMAT,
        "content_digest": content_digest(shards),
        "size": SIZE,
        "attributes": ATTRIBUTES,
    }
    write_json(folder / "manifest.json", manifest | {"splits": splits})


def make_classifier(config: RunConfig) -> None:
    """An untrained classifier whose thresholds split its scores in half."""
    torch.manual_seed(1)
    folder = layout.classifier_dir(config)
    val = Shards(layout.shards_dir(config), "val")
    names = val.attribute_names
    net = classifier.AttributeNet(len(names)).eval()
    images, labels = val.gather(np.arange(len(val)))
    with torch.no_grad():
        logits = net(to_float(torch.from_numpy(images))).numpy()
    files.save(folder, net, names, val.size)
    scores = classifier.scores(logits, labels, np.median(logits, 0), names)
    write_json(folder / "metrics.json", {"val": scores})


def make_checkpoint(
    run_dir: Path, config: RunConfig, attributes: list[str], step: int = 10, loss: float = 1.0
) -> CVAE:
    """config.yaml and a checkpoint of an untrained model that reads `attributes`, with this val loss."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(dump(config))
    torch.manual_seed(2)
    model = CVAE(config.model, SIZE, len(attributes)).eval()
    tensors, validation = {}, {}
    for name, tensor in model.state_dict().items():
        tensors |= {f"model.{name}": tensor.clone(), f"ema.{name}": tensor.clone()}
    for weights in ("ema", "raw"):
        numbers = {"loss": loss, "s2": 0.2, "s2_fit": 0.2}
        validation |= {f"val_{weights}/{name}": value for name, value in numbers.items()}
    meta = {
        "images": 120,
        "size": SIZE,
        "attributes": attributes,
        "sections": layout.trained_sections(config),
        "validation": validation,
        "seconds": 1.0,
        "scaler": {},
    }
    Checkpoints(layout.checkpoints_dir(run_dir)).save(step, tensors, meta)
    return model


def context(run_dir: Path, ranks: Ranks | None = None) -> Context:
    """The context of a stage that runs alone."""
    return Context(run_dir, ranks or Ranks(), StopFlag(), logging.getLogger("cvae.test"))
