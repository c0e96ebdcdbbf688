"""Which values a key accepts. Keys that are not listed here accept every value of their type."""

from __future__ import annotations

from typing import Any

from cvae import config as names
from pipeline.config.schema import (
    EXECUTOR_NAMES,
    LATER_PHASES,
    OPTIMIZER_NAMES,
    PHASES,
    SCHEDULE_NAMES,
    SOURCE_NAMES,
)
from pipeline.config.suggest import suggest
from pipeline.errors import ConfigError

OPTIMIZERS = ("optim", *(f"{phase}.optim" for phase in LATER_PHASES))
PRIORS = ("model.prior", "refine.prior")
LOSSES = ("model.losses", "tune.losses")
FLOW_MATCHING_SIZES = ("width", "condition", "side", "channels", "steps", "draws")

# The words that a key accepts. A test compares the names of components with their registries.
CHOICES: dict[str, tuple[str, ...]] = {
    "model.encoder.name": names.ENCODER_NAMES,
    "model.decoder.name": names.DECODER_NAMES,
    "model.conditioner.name": names.CONDITIONER_NAMES,
    "model.prior.name": names.TRAINED_PRIOR_NAMES,
    "model.prior.net": names.PRIOR_NET_NAMES,
    "model.prior.flow_matching.net": names.VELOCITY_NAMES,
    "refine.prior.name": names.PRIOR_NAMES,
    "refine.prior.net": names.PRIOR_NET_NAMES,
    "refine.prior.flow_matching.net": names.VELOCITY_NAMES,
    "model.variance.name": names.VARIANCE_NAMES,
    "model.net.norm": names.NORM_NAMES,
    "model.net.activation": names.ACTIVATION_NAMES,
    "shard.source_kind": ("", *SOURCE_NAMES),
    "shard.background": ("keep", "green"),
    "shard.format": ("auto", "strided", "encoded", "in_place"),
    "data.verify": ("once", "always"),
    "data.damaged": ("stop", "exclude"),
    "optim.name": OPTIMIZER_NAMES,
    "optim.schedule": SCHEDULE_NAMES,
    "tune.optim.name": OPTIMIZER_NAMES,
    "tune.optim.schedule": SCHEDULE_NAMES,
    "refine.optim.name": OPTIMIZER_NAMES,
    "refine.optim.schedule": SCHEDULE_NAMES,
    "steer.optim.name": OPTIMIZER_NAMES,
    "steer.optim.schedule": SCHEDULE_NAMES,
    "train.precision": ("auto", "fp32", "bf16", "fp16", "fp64"),
    "train.step": ("auto", "eager", "compiled", "graph"),
    "classifier.precision": ("auto", "fp32", "bf16", "fp16"),
    "eval.split": ("val", "test"),
    "eval.weights": ("ema", "raw"),
    "eval.stage": ("", *PHASES),
    "eval.projection": ("tsne", "umap"),
    "tracking.name": ("mlflow",),
    "cluster.executor": EXECUTOR_NAMES,
}

# Keys whose value must be at least 1.
AT_LEAST_ONE = (
    "toy.n",
    "shard.size",
    "shard.samples_per_shard",
    "data.shards_at_once",
    "model.z_dim",
    "train.images",
    *(f"{phase}.batch_size" for phase in PHASES),
    "train.log_interval",
    "train.val_interval",
    "train.max_lost_steps",
    "train.keep_checkpoints",
    "classifier.epochs",
    "classifier.batch_size",
    "steer.width",
    "steer.guide_epochs",
    *(f"{prior}.flow.{key}" for prior in PRIORS for key in ("layers", "hidden")),
    *(f"{prior}.flow_matching.{key}" for prior in PRIORS for key in FLOW_MATCHING_SIZES),
    *(f"{losses}.perceptual.size" for losses in LOSSES),
    "eval.n",
    "eval.block",
    "eval.tries",
    "eval.iw_samples",
    "eval.neighbour_images",
    "eval.kid_subsets",
    "eval.kid_subset_size",
    "eval.network_size",
    "cluster.nodes",
    "cluster.tasks_per_node",
    "cluster.jobs",
    "cluster.signal_delay_s",
)

# Keys whose value must be at least 0. A negative weight would reward what a loss term measures.
AT_LEAST_ZERO = (
    "shard.crop",
    *(f"{phase}.images" for phase in LATER_PHASES),
    "train.micro_batch",
    "train.kl_warmup_images",
    "train.keep_every",
    "train.max_bad_steps",
    "train.profile",
    "train.threads",
    "train.timeout_s",
    "train.stall_s",
    "tune.code_noise",
    *(f"{losses}.{term}.weight" for losses in LOSSES for term in names.LOSS_TERM_NAMES),
    *(f"{losses}.perceptual.style" for losses in LOSSES),
    *(f"{optim}.{key}" for optim in OPTIMIZERS for key in ("weight_decay", "warmup_images", "clip_norm")),
    "classifier.weight_decay",
    "eval.rare_samples",
    "eval.flip_images",
    "eval.iw_images",
)

# Keys whose value must be above 0.
ABOVE_ZERO = (
    *(f"{optim}.lr" for optim in OPTIMIZERS),
    "classifier.lr",
    *(f"{prior}.flow.bound" for prior in PRIORS),
)

# Keys whose value is a share, from 0 to 1. A decay of 1 would keep the first value for ever.
SHARES = (
    "data.random_crop",
    "refine.attribute_dropout",
    *(f"{prior}.flow_matching.weak" for prior in PRIORS),
    *(f"{optim}.final_lr_fraction" for optim in OPTIMIZERS),
)
DECAYS = (
    *(f"{phase}.ema_decay" for phase in PHASES),
    *(f"{optim}.{key}" for optim in OPTIMIZERS for key in ("beta1", "beta2")),
)


def require_in_range(values: dict[str, Any]) -> None:
    """Raise ConfigError for the first value {"train.batch_size": 64, ...} that is out of range."""
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            hint = suggest(str(values[key]), choices)
            raise ConfigError(f"key '{key}': got {values[key]!r}, expected one of {', '.join(choices)}{hint}")
    for keys, fits, expected in (
        (AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
        (AT_LEAST_ZERO, lambda value: value >= 0, "at least 0"),
        (ABOVE_ZERO, lambda value: value > 0, "more than 0"),
        (SHARES, lambda value: 0 <= value <= 1, "0 to 1"),
        (DECAYS, lambda value: 0 <= value < 1, "0 to less than 1"),
    ):
        for key in keys:
            if not fits(values[key]):  # NaN fits nowhere
                raise ConfigError(f"key '{key}': got {values[key]}, expected {expected}")
