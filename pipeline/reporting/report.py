"""report.html: one run on one page, from the files of its run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.load import dump
from pipeline.config.schema import RunConfig
from pipeline.reporting.checks import Check, checks
from pipeline.reporting.page import (
    Cell,
    TableRows,
    drawing,
    folded,
    gallery,
    heading,
    page,
    paragraph,
    preformatted,
    section,
    subheading,
    table,
)
from pipeline.reporting.plots import training_panels
from pipeline.reporting.sections import images, numbers
from pipeline.reporting.sections.making import making
from pipeline.reporting.text import duration
from pipeline.rundir import layout, record
from pipeline.rundir.files import write_text
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import Evaluation
from pipeline.rundir.redact import redact

PHASES = {
    "train": "Training",
    "tune": "Tuning the decoder",
    "refine": "Refining the prior",
    "steer": "Teaching the control",
}
MAP = "of latent vectors, one map for both halves: if the prior fits, equal colours stand at equal places"
DRAWINGS = {
    "tsne": f"t-SNE {MAP}",
    "umap": f"UMAP {MAP}",
    "units": "what each latent unit tells about the image, and its KL (a flow has none for a single unit)",
}


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the files that are there, and return its path.

    It shows the newest evaluation, whether complete or of a few metrics.
    """
    config = record.run_config(run_dir)
    found = record.evaluations(run_dir)
    evaluation = found[-1] if found else None
    records = read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
    body = [_title(run_dir, config, evaluation)]
    if evaluation:
        body += [numbers.verdict(evaluation, records, found), images.chosen(evaluation)]
    else:
        command = f"`python launch.py --run-dir {run_dir} --stages eval`"
        body.append(section("Evaluation", paragraph(f"None yet. {command} makes one.")))
    body.append(section("Curves", *_curves(run_dir), images.growth(run_dir)))
    body.append(section("Details", *_details(run_dir, config, found, records)))
    file = run_dir / "report.html"
    write_text(file, page(f"{config.name}, seed {config.seed}", body))
    return file


def _title(run_dir: Path, config: RunConfig, evaluation: Evaluation | None) -> str:
    done = record.trained(run_dir, config) or {}
    seen = evaluation.protocol if evaluation else done
    items: dict[str, Any] = {"seed": config.seed, "status": record.status(run_dir, config).lower()}
    if "step" in seen:
        items["checkpoint"] = f"step {seen['step']}"
    images, seconds = record.effort(run_dir, evaluation)
    if images:
        items["images seen"] = " + ".join(f"{n:,}" for n in images)
    if seconds is not None:
        items["training took"] = duration(seconds)
    if evaluation:
        items["evaluation"] = evaluation.number
    return heading(config.name, items)


def _curves(run_dir: Path) -> list[str]:
    """The curves of every phase that has begun; those of the later phases under a heading."""
    parts = []
    for phase, title in PHASES.items():
        records = read_metrics(layout.train_dir(run_dir, phase) / "metrics.jsonl")
        panels = [drawing(svg, caption) for caption, svg in training_panels(records, phase)]
        if panels:
            parts += [subheading(title), gallery(panels)]
    return parts


def _details(
    run_dir: Path, config: RunConfig, found: list[Evaluation], records: list[dict[str, Any]]
) -> list[str]:
    evaluation = found[-1] if found else None
    parts = [_checks(checks(config.model, records, evaluation), evaluation)]
    if evaluation:
        parts = [
            images.more(evaluation),
            numbers.every_number(evaluation),
            numbers.evaluations(found),
            *parts,
            numbers.rare(evaluation),
            numbers.attributes(evaluation),
        ]
    return [*parts, making(run_dir, evaluation), folded("Configuration", preformatted(redact(dump(config))))]


def _checks(found: list[Check], evaluation: Evaluation | None) -> str:
    """Questions with their verdicts, and the drawings of the latent space."""
    head: list[Cell] = ["question", "verdict", "found", "how that is decided"]
    rows: TableRows = [("", [c.question, c.verdict, c.found, (c.rule, "soft")]) for c in found]
    plots = evaluation.plots if evaluation else []
    drawings = [drawing(file.read_bytes(), DRAWINGS.get(file.stem, file.stem)) for file in plots]
    return folded("Checks of variance and prior", table(head, rows), gallery(drawings))
