"""Guides: small classifiers of four kinds that teach the attribute control what decoded codes show.

None of them judges. The classifier of the evaluation has another architecture. The errors of the kinds
differ, so their mean is nearer to what another classifier sees than each of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from cvae.model import CVAE
from pipeline.config.schema import RunConfig
from pipeline.data.loader import to_float
from pipeline.data.staging import open_shards, staged
from pipeline.rundir import layout
from pipeline.runtime.blocks import map_blocks
from pipeline.runtime.context import Context, alone
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.keyed import generator
from pipeline.training.classify import files, supervised
from pipeline.training.classify.nets import NETS
from pipeline.training.validation import BLOCK, HeldOut

LR = 2e-3
WEIGHT_DECAY = 0.05
SHIFT = 3  # pixels that a step's images are moved by at most


class Guides(nn.Module):
    """Trained guides and, for their logits of the model's attributes, thresholds and deviations [G, A]."""

    def __init__(self, nets: list[nn.Module], columns: list[int], digests: list[str]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.columns = columns
        self.digests = digests
        self.thresholds: Tensor
        self.deviations: Tensor
        self.register_buffer("thresholds", torch.zeros(len(nets), len(columns)), persistent=False)
        self.register_buffer("deviations", torch.ones(len(nets), len(columns)), persistent=False)
        self.requires_grad_(False).eval()

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [B, G, A] of images [B, 3, S, S] in [-1, 1]."""
        return torch.stack([net(x)[:, self.columns] for net in self.nets], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean score [B, A]: 0 where the guides are undecided, in deviations of their logits."""
        return ((self.logits(x).to(self.thresholds) - self.thresholds) / self.deviations).mean(1)

    def calibrate(self, logits: Tensor, labels: Tensor) -> None:
        """Fix thresholds: as many of these images [N, G, A] are above one as `labels` [N, A] have it."""
        share = labels.double().mean(0)
        ordered = logits.double().sort(0).values
        last = len(ordered) - 1
        above = ((1 - share) * last).round().long()
        for column, place in enumerate(above.tolist()):
            self.thresholds[:, column] = ordered[place, :, column]
        self.deviations.copy_(logits.double().std(0).clamp_min(1e-6))


def train_guides(config: RunConfig, context: Context) -> None:
    """Train the guides that are not there yet (all ranks). Raises Stopped; a finished one stays."""
    shards = staged(layout.shards_dir(config), config.data.stage_to, context.log, config.data.damaged)
    for name in NETS:
        folder = layout.guide_dir(config, name)
        if _is_there(folder, context.ranks):  # no lock: this user may not be able to write beside it
            continue
        with alone(folder.with_suffix(".lock"), context):
            if not _is_there(folder, context.ranks):  # another launch may have made it meanwhile
                _train_guide(name, folder, shards, config, context)


def _is_there(folder: Path, ranks: Ranks) -> bool:
    """Return whether a guide is complete: one answer for all ranks."""
    return bool(ranks.text_from_main("there" if (folder / "model.json").exists() else ""))


def _train_guide(name: str, folder: Path, shards: Path, config: RunConfig, context: Context) -> None:
    """Train one guide and write its files (all ranks)."""
    number = list(NETS).index(name) + 1
    context.log.info("training the guide `%s`, %d of %d", name, number, len(NETS))
    train, val = (open_shards(shards, split, config.data) for split in ("train", "val"))
    settings = replace(
        config.classifier,
        epochs=config.steer.guide_epochs,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        seed=config.classifier.seed + number,
    )
    torch.manual_seed(settings.seed)
    net = NETS[name](len(train.attribute_names)).to(context.ranks.device)
    supervised.fit(net, settings, train, val, context, _shifted)
    if context.ranks.is_main:
        files.save(folder, net, train.attribute_names, train.size)
    context.ranks.barrier()  # no rank goes on before the files are there


def load_guides(config: RunConfig, model: CVAE, part: HeldOut, ranks: Ranks) -> Guides:
    """Return the guides, calibrated on decoded codes of `part` (all ranks). Raises CheckpointError."""
    nets, digests = [], []
    for name, make in NETS.items():
        meta, weights = files.read(layout.guide_dir(config, name), "steer")
        net = make(len(meta["attributes"]))
        net.load_state_dict(safetensors.torch.load(weights))
        nets.append(net)
        digests.append(meta["digest"])
    dtype = next(model.parameters()).dtype
    guides = Guides(nets, part.columns, digests).to(ranks.device, dtype)

    def seen(positions: np.ndarray) -> dict[str, Tensor]:
        images, attributes = part.shards.gather(part.indices[positions])
        x = to_float(torch.from_numpy(images).to(ranks.device), dtype)
        y = torch.from_numpy(attributes[:, part.columns]).to(ranks.device, dtype)
        decoded = model.decode(model.encode(x, y).mean, y)
        return {"logits": guides.logits(decoded), "labels": y}

    rows = map_blocks(seen, len(part.indices), BLOCK, ranks)
    logits, labels = (torch.from_numpy(rows[name]).to(ranks.device) for name in ("logits", "labels"))
    guides.calibrate(logits, labels)
    return guides


def _shifted(x: Tensor, step: int) -> Tensor:
    """Move the images of a step by the same few pixels, around the edges (all ranks alike)."""
    down, right = generator(0, "guides", step).integers(-SHIFT, SHIFT + 1, 2).tolist()
    return x.roll((down, right), (2, 3))
