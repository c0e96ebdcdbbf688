"""The trainings of one run: the whole model, then the decoder alone, then the prior alone.

    train     every weight, by the ELBO
    tune      the decoder; loss terms that are too dear for the whole training join (optional)
    refine    a new prior, on the codes of the frozen encoder (optional)

Each phase has a folder with checkpoints of its own, and every checkpoint holds a whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config.schema import OptimConfig, RunConfig
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """One training of a run."""

    name: str  # of the stage and of its folder
    config: RunConfig  # `model`, `optim` and `train` as this phase uses them
    fitted: tuple[str, ...] = ()  # modules of the model that are fitted; empty: all of them
    start: str = ""  # the phase whose averaged weights it starts from; empty: random weights
    attribute_dropout: float = 0.0  # share of requests whose attributes are hidden


def phase(name: str, config: RunConfig) -> Phase:
    """Return the phase `name` of a run. Raises ConfigError if the configuration leaves it out."""
    if name == "train":
        return Phase(name, config)
    if name == "tune" and config.tune.images:
        section = config.tune
        tuned = _with_length(config, section.images, section.batch_size, section.ema_decay, section.optim)
        return Phase(
            name, replace(tuned, model=replace(config.model, losses=section.losses)), ("decoder",), "train"
        )
    if name == "refine" and config.refine.images:
        part = config.refine
        refined = _with_length(config, part.images, part.batch_size, part.ema_decay, part.optim)
        model = replace(config.model, prior=part.prior)
        start = "tune" if config.tune.images else "train"
        dropout = part.attribute_dropout
        return Phase(name, replace(refined, model=model), ("conditional_prior",), start, dropout)
    raise ConfigError(
        f"key '{name}.images': is 0, so this run has no stage {name!r}; set its length in images"
    )


def last_phase(config: RunConfig) -> str:
    """Return the name of the phase whose weights are evaluated."""
    if config.refine.images:
        return "refine"
    return "tune" if config.tune.images else "train"


def _with_length(
    config: RunConfig, images: int, batch_size: int, ema_decay: float, optim: OptimConfig
) -> RunConfig:
    """Return the configuration with the length and the optimizer of a later phase."""
    train = replace(
        config.train,
        images=images,
        batch_size=batch_size,
        ema_decay=ema_decay,
        kl_warmup_images=0,
        init_from="",
    )
    return replace(config, train=train, optim=optim)
