"""The trainings of one run: the whole model, then the decoder alone, then the prior alone.

    train     every weight, by the ELBO
    tune      the decoder; loss terms that are too dear for the whole training join (optional)
    refine    a new prior, on the codes of the frozen encoder (optional)
    steer     the attribute control, on what classifiers see in decoded codes (optional)

Each phase has a folder with checkpoints of its own, and every checkpoint holds a whole model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.schema import OptimConfig, RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir import layout


@dataclass(frozen=True)
class Phase:
    """One training of a run."""

    name: str  # of the stage and of its folder
    config: RunConfig  # `model`, `optim` and `train` as this phase uses them
    fitted: tuple[str, ...] = ()  # modules of the model that are fitted; empty: all of them
    start: str = ""  # the phase whose averaged weights it starts from; empty: random weights
    attribute_dropout: float = 0.0  # share of requests whose attributes are hidden
    start_from: str = "best"  # which of its checkpoints: best | latest
    code_noise: float = 0.0  # noise on codes for the decoder, in deviations of the codes
    weak: float = 0.0  # share of the training after which a weak copy of the prior is kept; 0: never


def phase(name: str, config: RunConfig) -> Phase:
    """Return the phase `name` of a run. Raises ConfigError if the configuration leaves it out."""
    if name == "train":
        return Phase(name, config)
    if name == "tune" and config.tune.images:
        section = config.tune
        tuned = _with_length(config, section.images, section.batch_size, section.ema_decay, section.optim)
        model = replace(config.model, losses=section.losses)
        fitted, start = ("decoder",), start_of(name, config)
        return Phase(name, replace(tuned, model=model), fitted, start, code_noise=section.code_noise)
    if name == "refine" and config.refine.images:
        part = config.refine
        refined = _with_length(config, part.images, part.batch_size, part.ema_decay, part.optim)
        model = replace(config.model, prior=part.prior)
        fitted = ("conditional_prior",)
        return Phase(
            name,
            replace(refined, model=model),
            fitted,
            start_of(name, config),
            attribute_dropout=part.attribute_dropout,
            weak=part.prior.flow_matching.weak,
        )
    if name == "steer" and config.steer.images:
        steer = config.steer
        steered = _with_length(config, steer.images, steer.batch_size, steer.ema_decay, steer.optim)
        prior = replace(config.refine.prior, reader=steer.width)
        model = replace(config.model, prior=prior)
        # It leaves the prior alone. The latest one draws the better samples, the best has the lower loss.
        start = start_of(name, config)
        return Phase(name, replace(steered, model=model), ("control",), start, start_from="latest")
    raise ConfigError(
        f"key '{name}.images': is 0, so this run has no stage {name!r}; set its length in images"
    )


def start_of(name: str, config: RunConfig) -> str:
    """Return the phase from whose weights `name` starts; "" for the first one."""
    if name == "train":
        return ""
    if name == "steer":
        return "refine"
    return "tune" if name == "refine" and config.tune.images else "train"


def finished(name: str, run_dir: Path) -> str:
    """Describe a finished phase, "tune 400 after train 4000" (steps); "" if it is not finished.

    A later phase is only as good as its start: it begins again if this description has changed.
    """
    file = layout.train_dir(run_dir, name) / "done.json"
    if not file.exists():
        return ""
    done = json.loads(file.read_text())
    start = done.get("start", "")
    return f"{name} {done['step']}" + (f" after {start}" if start else "")


def last_phase(config: RunConfig) -> str:
    """Return the name of the last phase that the configuration asks for."""
    if config.steer.images:
        return "steer"
    if config.refine.images:
        return "refine"
    return "tune" if config.tune.images else "train"


def evaluated_phase(config: RunConfig) -> str:
    """Return the name of the phase whose weights are evaluated: `eval.stage`, or the last one."""
    return config.eval.stage or last_phase(config)


def require_sampling(config: RunConfig) -> None:
    """Raise ConfigError unless the prior of the evaluated phase can do what `eval` asks of it."""
    name = evaluated_phase(config)
    prior = phase(name, config).config.model.prior
    guided, steered = prior.name == "flow_matching", prior.control
    settings = config.eval
    for key, value, neutral, can, needs in (
        ("guidance", settings.guidance, 1.0, guided, "refine.prior.name=flow_matching"),
        ("margin", settings.margin, 0.0, steered, "refine.prior.control=true"),
        ("tries", settings.tries, 1, prior.anomaly, "refine.prior.anomaly=true"),
        ("edit_strength", settings.edit_strength, 1.0, guided or steered, "refine.prior.control=true"),
    ):
        if value != neutral and not can:
            raise ConfigError(
                f"key 'eval.{key}': got {value}, expected {neutral:g}, because the prior {prior.name!r} of"
                f" the stage {name} cannot do it; set eval.{key}={neutral:g}, or refine the run with {needs}"
            )


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
