"""report.html: one run on one page, from the files of its run directory."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.config.load import dump
from pipeline.config.schema import RunConfig
from pipeline.reporting.checks import Check, checks
from pipeline.reporting.page import (
    Cell,
    details,
    drawing,
    facts,
    gallery,
    heading,
    page,
    paragraph,
    picture,
    right_aligned,
    section,
    table,
)
from pipeline.reporting.plots import training_panels
from pipeline.reporting.text import duration, interval_text, number, protocol_line, with_arrow
from pipeline.rundir import layout, record
from pipeline.rundir.files import write_text
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import Evaluation
from pipeline.rundir.redact import redact
from pipeline.runtime.split import spread

TableRows = list[tuple[str, list[Cell]]]  # (CSS classes, cells)
GROWTH = 6  # pictures of samples over training
MAP = "of latent vectors, one map for both halves: if the prior fits, equal colours stand at equal places"
DRAWINGS = {
    "tsne": f"t-SNE {MAP}",
    "umap": f"UMAP {MAP}",
    "units": "what each latent unit tells about the image, and its KL (a flow has none for a single unit)",
}
LEGEND = (
    "↓ lower is better, ↑ higher is better. Floor: what a model without knowledge reaches. Ceiling: what"
    " real images or a perfect model reach. N: images or samples measured."
)
RARE_COLUMNS = {
    "annotated_count": "in annotations",
    "train_count": "in training",
    "held_out_count": "held out",
    "success": "success",
    "interval": "95 % interval",
    "real_success": "real images",
    "n": "N",
}
ATTRIBUTE_COLUMNS = {
    "accuracy": "samples",
    "real_accuracy": "real (ceiling)",
    "shuffled_accuracy": "shuffled (floor)",
    "balanced_accuracy": "samples, balanced",
    "real_balanced_accuracy": "real, balanced",
}


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from the files that are there, and return its path."""
    config = record.run_config(run_dir)
    evaluation = record.headline(record.evaluations(run_dir))
    records = read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
    panels = [drawing(svg, caption) for caption, svg in training_panels(records)]
    found = checks(config.model, records, evaluation)
    body = [_title(run_dir, config, evaluation)]
    if evaluation:
        body += [_headline(evaluation), _pictures(evaluation)]
    else:
        command = f"`python launch.py --run-dir {run_dir} --stages eval`"
        body.append(section("Evaluation", paragraph(f"None yet. {command} makes one.")))
    body += [section("Training", gallery(panels)), _growth(run_dir), _checks(found, evaluation)]
    if evaluation:
        body += [_rare(evaluation), _attributes(evaluation)]
    body.append(_making(run_dir, evaluation))
    body.append(section("Configuration", details("config.yaml", redact(dump(config)))))
    file = run_dir / "report.html"
    write_text(file, page(f"{config.name}, seed {config.seed}", body))
    return file


def _title(run_dir: Path, config: RunConfig, evaluation: Evaluation | None) -> str:
    done = record.trained(run_dir, config) or {}
    seen = evaluation.protocol if evaluation else done
    items: dict[str, Any] = {"seed": config.seed, "status": record.status(run_dir, config).lower()}
    if "step" in seen:
        items["checkpoint"] = f"step {seen['step']}"
    if "images" in seen:
        items["images seen"] = f"{seen['images']:,}"
    if "seconds" in done:
        items["training took"] = duration(done["seconds"])
    if evaluation:
        items["evaluation"] = evaluation.number
    return heading(config.name, items)


def _headline(evaluation: Evaluation) -> str:
    numbers = right_aligned(["value", "95 % interval", "floor", "ceiling", "N"])
    head: list[Cell] = ["metric", *numbers, "unit"]
    rows: TableRows = []
    for name in evaluation.headline_names:
        about = evaluation.about.get(name, {})
        title = with_arrow(name, about.get("direction", "none"))
        meaning = about.get("meaning", "")
        cells = [
            number(evaluation.metrics[name]),
            interval_text(evaluation.intervals.get(name)),
            number(evaluation.floors.get(name)),
            number(evaluation.ceilings.get(name)),
            number(about.get("n")),
        ]
        unit: Cell = (about.get("unit", ""), "soft")
        rows.append(("", [f"{title}\n{meaning}".rstrip(), *right_aligned(cells), unit]))
    return section(
        "Headline numbers",
        paragraph(protocol_line(evaluation.protocol) + "."),
        table(head, rows),
        paragraph(LEGEND, soft=True),
    )


def _pictures(evaluation: Evaluation) -> str:
    return section("Pictures", gallery(picture(file) for file in evaluation.pictures))


def _growth(run_dir: Path) -> str:
    """Samples of the same noise and requests at some validations, the last one included."""
    drawn = layout.progress_pictures(run_dir)
    if not drawn:
        return ""
    chosen = [drawn[i] for i in spread(min(GROWTH, len(drawn)), len(drawn))]
    chosen[-1] = drawn[-1]
    text = "The same noise and the same requested attributes, drawn with the averaged weights."
    shown = [picture(file, f"step {step:,}") for step, file in chosen]
    return section("Samples over training", paragraph(text), gallery(shown))


def _checks(found: list[Check], evaluation: Evaluation | None) -> str:
    """Questions with their verdicts, and the drawings of the latent space."""
    head: list[Cell] = ["question", "verdict", "found", "how that is decided"]
    rows: TableRows = [("", [c.question, c.verdict, c.found, (c.rule, "soft")]) for c in found]
    plots = evaluation.plots if evaluation else []
    drawings = [drawing(file.read_bytes(), DRAWINGS.get(file.stem, file.stem)) for file in plots]
    return section("Checks of variance and prior", table(head, rows), gallery(drawings))


def _rare(evaluation: Evaluation) -> str:
    if not evaluation.rare:
        return ""
    rows: TableRows = []
    for row in evaluation.rare:
        cells = [number(row.get(column)) for column in RARE_COLUMNS if column != "interval"]
        interval = f"{number(row.get('low'))} – {number(row.get('high'))}"
        cells.insert(list(RARE_COLUMNS).index("interval"), interval)
        rows.append(("", [" + ".join(row["attributes"]), *right_aligned(cells)]))
    text = (
        "Attributes that rarely occur together, asked for together: how often the classifier finds all of"
        " them in a sample."
    )
    head: list[Cell] = ["asked for", *right_aligned(RARE_COLUMNS.values())]
    return section("Rare combinations", paragraph(text), table(head, rows))


def _attributes(evaluation: Evaluation) -> str:
    if not evaluation.per_attribute:
        return ""
    rows: TableRows = []
    for name, row in evaluation.per_attribute.items():
        read = row.get("read_by_model", True)
        title = name if read else f"{name} (not read by the model)"
        cells = [number(row.get(column)) for column in ATTRIBUTE_COLUMNS]
        rows.append(("" if read else "off", [title, *right_aligned(cells)]))
    text = "How often the classifier's decision on a sample is what was asked for."
    head: list[Cell] = ["attribute", *right_aligned(ATTRIBUTE_COLUMNS.values())]
    return section("Attributes", paragraph(text), table(head, rows))


def _making(run_dir: Path, evaluation: Evaluation | None) -> str:
    items: dict[str, Any] = {
        "commit": record.commit(run_dir) or "unknown",
        "run directory": run_dir.absolute(),
    }
    for key, value in (record.read_json(run_dir / "inputs.json") or {}).items():
        items[f"input: {key}"] = value
    if evaluation:
        for key, value in evaluation.protocol.items():
            items.setdefault(key, value)
        for name, seconds in evaluation.seconds.items():
            items[f"measuring {name}"] = duration(seconds)
    return section(
        "How it was made",
        table(["launched", "at step", "stages", "changed"], _change_rows(run_dir)),
        table(["stage", "job", "state", "hosts", "started", ("took", "n")], _job_rows(run_dir)),
        facts(items),
    )


def _change_rows(run_dir: Path) -> TableRows:
    """One row for each launch, with the settings that it changed."""
    rows: TableRows = []
    for line in record.history(run_dir):
        changes = []
        for key, value in line.get("changed", {}).items():
            shown = f"{value[0]} → {value[1]}" if isinstance(value, list) else str(value)
            changes.append(f"{key}: {shown}")
        step: Cell = (str(line.get("step", "")), "n")
        stages = " ".join(line.get("stages", []))
        rows.append(("", [str(line.get("time", "")), step, stages, redact(", ".join(changes)) or "–"]))
    return rows


def _job_rows(run_dir: Path) -> TableRows:
    """One row for each attempt of each job."""
    rows: TableRows = []
    for job in record.jobs(run_dir):
        for attempt in job.get("attempts") or [{}]:
            began, ended = attempt.get("started"), attempt.get("ended")
            when = datetime.fromtimestamp(began).isoformat(" ", "seconds") if began else "–"
            took = duration(ended - began) if began and ended else "–"
            state = str(attempt.get("state") or job.get("state", ""))
            hosts = ", ".join(attempt.get("hosts", []))
            stage, job_id = str(job.get("stage", "")), str(job.get("id", ""))
            rows.append(("", [stage, job_id, state, hosts, when, (took, "n")]))
    return rows
