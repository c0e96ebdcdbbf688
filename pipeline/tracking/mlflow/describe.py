"""What MLflow shows of a run in words: its description, and the data set that it was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import LATER_PHASES, RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir import layout
from pipeline.rundir.headline import HEADLINES, standing_for
from pipeline.rundir.record import Evaluation, read_json

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

PRIORS = {
    "standard": "N(0, I)",
    "gaussian": "N(μ(y), σ(y)²)",
    "flow": "a conditional flow",
    "flow_matching": "flow matching",
}
LONGEST_DIGEST = 36  # characters that MLflow takes


def run_note(config: RunConfig, run_dir: Path, place: str, others: str, headline: Evaluation | None) -> str:
    """Describe a run in Markdown.

    `place` is the address of its files in MLflow's pages, `others` that of the view of all runs.
    """
    prior = config.refine.prior if config.refine.images else config.model.prior
    phases = [name for name in LATER_PHASES if getattr(config, name).images]
    lines = [
        f"**{config.name}**, seed {config.seed}: {config.model.variance.name} decoder variance,"
        f" prior {PRIORS.get(prior.name, prior.name)}, {config.model.decoder.name} decoder,"
        f" {config.train.images:,} images"
        + "".join(f", then {phase}" for phase in phases)
        + f". [All runs at a glance]({others}).",
        "",
    ]
    if headline:
        lines += [*_six(headline), "", f"[Report with pictures]({place}/report.html)."]
    lines += ["", f"[Logs]({place}/logs) of the stages, also in `{run_dir / 'logs'}`."]
    lines += [f"Run directory: `{run_dir}`."]
    return "\n".join(lines)


def evaluation_note(evaluation: Evaluation) -> str:
    """Describe an evaluation in Markdown."""
    protocol = evaluation.protocol
    keys = ("split", "n", "weights", "step")
    measured = ", ".join(f"{key} {protocol[key]}" for key in keys if key in protocol)
    return "\n".join([f"Evaluation {evaluation.number}: {measured}.", "", *_six(evaluation)])


def _six(evaluation: Evaluation) -> list[str]:
    """The headline numbers as a table in Markdown."""
    rows = ["| number | value | bad reference | good reference |", "|---|---|---|---|"]
    for headline in HEADLINES:
        name = standing_for(headline, [evaluation])
        if name:
            bounds = [evaluation.floors.get(name), evaluation.ceilings.get(name)]
            shown = ["–" if bound is None else f"{bound:.4g}" for bound in bounds]
            value = f"{evaluation.metrics[name]:.4g}"
            rows.append(f"| {headline.label} (`{headline.key}`) | {value} | {shown[0]} | {shown[1]} |")
    return rows


def dataset_input(config: RunConfig) -> DatasetInput | None:
    """Return the shards as MLflow describes a data set; None while there are none."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    try:
        folder = layout.shards_dir(config)
    except ConfigError:
        return None
    manifest = read_json(folder / layout.MANIFEST)
    if not manifest:
        return None
    counts = {}
    for split, part in manifest["splits"].items():
        counts[split] = sum(shard["samples"] for shard in part["shards"])
    source: dict[str, Any] = {"uri": folder.as_uri(), "made_from": str(layout.source_path(config))}
    profile = {"images": counts, "size": manifest["size"], "attributes": len(manifest["attributes"])}
    kind = "celeba" if config.shard.source else "toy_faces"
    dataset = Dataset(
        name=f"{kind}_{manifest['size']}px",
        digest=str(manifest["content_digest"])[:LONGEST_DIGEST],
        source_type="local",
        source=json.dumps(source),
        profile=json.dumps(profile),
        schema=json.dumps({"attributes": manifest["attributes"]}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
