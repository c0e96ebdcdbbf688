"""The keys of a configuration that are in use: a tracker need not show those of other components."""

from __future__ import annotations

from typing import Any

from cvae.config import LOSS_TERM_NAMES
from pipeline.config.load import flatten
from pipeline.config.schema import LATER_PHASES, RunConfig

ABOUT_THE_PLACE = ("cluster.", "tracking.", "runs_dir")  # they decide nothing about the numbers
MADE_OF_LAYERS = {"model.net.": "conv", "model.residual.": "residual"}  # section -> network that reads it


def used(config: RunConfig) -> dict[str, Any]:
    """Return the keys in use, flat, with their values.

    Sections of components that were not chosen, of stages that are left out, and empty keys are missing.
    """
    values = flatten(config)
    unused = tuple(_unused(config, values))
    found = {}
    for key, value in values.items():
        if not key.startswith(unused) and value not in ("", None):
            found[key] = value
    return found


def _unused(config: RunConfig, values: dict[str, Any]) -> list[str]:
    """Beginnings of the keys that nothing reads."""
    prefixes = list(ABOUT_THE_PLACE)
    networks = {config.model.encoder.name, config.model.decoder.name}
    prefixes += [section for section, network in MADE_OF_LAYERS.items() if network not in networks]
    if config.model.conditioner.name != "attention":
        prefixes.append("model.conditioner.layers")
    for phase in LATER_PHASES:
        if not values[f"{phase}.images"]:
            prefixes.append(f"{phase}.")
    for prior in ("model.prior.", "refine.prior."):
        prefixes += _unused_of_prior(prior, values[f"{prior}name"])
    for losses in ("model.losses.", "tune.losses."):
        for term in LOSS_TERM_NAMES:
            if not values[f"{losses}{term}.weight"]:
                prefixes.append(f"{losses}{term}.")
    if not config.eval.network:
        prefixes.append("eval.network")
    if config.shard.source or config.data.shards:
        prefixes.append("toy.")
    if config.data.shards:
        prefixes.append("shard.")
    return prefixes


def _unused_of_prior(section: str, name: str) -> list[str]:
    parts = [f"{section}{kind}." for kind in ("flow", "flow_matching") if kind != name]
    if name not in ("gaussian", "flow"):
        parts += [f"{section}net", f"{section}hidden"]
    return parts
