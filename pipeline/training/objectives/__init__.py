"""What each phase minimises.

`train`: the whole model; `tune`: the decoder; `refine`: the prior; `steer`: the reader of the control.
"""

from __future__ import annotations

from cvae.model import CVAE
from pipeline.errors import ConfigError
from pipeline.runtime.distributed import Ranks
from pipeline.training.classify.guides import load_guides
from pipeline.training.objectives.decoder import DecoderFit
from pipeline.training.objectives.moments import code_spread
from pipeline.training.objectives.prior import PriorFit
from pipeline.training.objectives.steer import SteerFit
from pipeline.training.phases import Phase
from pipeline.training.validation import HeldOut

Objective = CVAE | DecoderFit | PriorFit | SteerFit


def objective_of(phase: Phase, model: CVAE, part: HeldOut, ranks: Ranks) -> Objective:
    """Return what a phase trains, with the weights frozen that it does not fit (all ranks).

    `part`: training images whose codes tell how wide the codes are spread.
    """
    if phase.fitted:
        model.requires_grad_(False)
    for name in phase.fitted:
        getattr(model, name).requires_grad_(True)
    if phase.code_noise:
        _, deviation = code_spread(model, part, ranks)
        return DecoderFit(model, phase.code_noise * deviation)
    if phase.name == "steer":
        return SteerFit(model, load_guides(phase.config, model, part, ranks))
    if phase.name != "refine":
        return model
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"key 'refine.prior.name': the prior {phase.config.model.prior.name!r} has nothing to fit;"
            " use gaussian, flow or flow_matching"
        )
    return PriorFit(model, phase.attribute_dropout)
