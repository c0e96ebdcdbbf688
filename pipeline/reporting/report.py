"""report.html: one run on one page, from the files of its run directory."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.config.load import dump
from pipeline.config.schema import RunConfig
from pipeline.reporting.checks import Check, checks
from pipeline.reporting.headline import direction, duration, meaning, metric_names, number, sample_size
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
    section,
    table,
)
from pipeline.reporting.plots import training_panels
from pipeline.rundir import layout, record
from pipeline.rundir.files import write_text
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import Evaluation
from pipeline.rundir.redact import redact
from pipeline.runtime.split import spread

GROWTH = 6  # pictures of samples over training
MAP = "of latent vectors, one map for both halves: a prior that fits puts the same colours in the same places"
DRAWINGS = {
    "tsne": f"t-SNE {MAP}",
    "umap": f"UMAP {MAP}",
    "units": "what each latent unit tells about the image, and its KL (not defined for one unit under a flow)",
}


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from whatever is there, also without metrics or evaluation, and return its path."""
    config = record.run_config(run_dir)
    evaluation = record.headline(record.evaluations(run_dir))
    records = read_metrics(layout.train_dir(run_dir) / "metrics.jsonl")
    body = [_title(run_dir, config, evaluation)]
    if evaluation:
        body += [_headline(evaluation), _pictures(evaluation)]
    else:
        body.append(
            section(
                "Evaluation",
                paragraph(f"None yet. `python launch.py --run-dir {run_dir} --stages eval` makes one."),
            )
        )
    body.append(
        section("Training", gallery(drawing(svg, caption) for caption, svg in training_panels(records)))
    )
    body += [_growth(run_dir), _checks(checks(config.model, records, evaluation), evaluation)]
    if evaluation:
        body += [_rare(evaluation), _attributes(evaluation)]
    body += [
        _making(run_dir, evaluation),
        section("Configuration", details("config.yaml", redact(dump(config)))),
    ]
    write_text(run_dir / "report.html", page(f"{config.name}, seed {config.seed}", body))
    return run_dir / "report.html"


def _title(run_dir: Path, config: RunConfig, evaluation: Evaluation | None) -> str:
    done = record.trained(run_dir, config) or {}
    seen = evaluation.protocol if evaluation else done
    items: dict[str, Any] = {"seed": config.seed, "status": record.status(run_dir, config).lower()}
    if "step" in seen:
        items |= {"checkpoint": f"step {seen['step']}"}
    if "images" in seen:
        items |= {"images seen": f"{seen['images']:,}"}
    if "seconds" in done:
        items |= {"training took": duration(done["seconds"])}
    if evaluation:
        items |= {"evaluation": evaluation.number}
    return heading(config.name, items)


def protocol_line(protocol: dict[str, Any]) -> str:
    """The protocol of an evaluation in a few words."""
    text = "{split} split, {size} × {size} pixels (crop {crop}), {weights} weights"
    return text.format_map({key: protocol.get(key, "?") for key in ("split", "size", "crop", "weights")})


def _headline(evaluation: Evaluation) -> str:
    head: list[Cell] = [
        "metric",
        ("value", "n"),
        ("95 % interval", "n"),
        ("floor", "n"),
        ("ceiling", "n"),
        ("N", "n"),
        "protocol",
    ]
    rows: list[tuple[str, list[Cell]]] = []
    where = f"{evaluation.protocol.get('split', '?')}, {evaluation.protocol.get('weights', '?')}, {evaluation.protocol.get('size', '?')} px"
    for name in metric_names([evaluation]):
        value = evaluation.metrics[name]
        interval = " – ".join(number(end) for end in evaluation.intervals.get(name, [])) or "–"
        numbers = [
            number(value),
            interval,
            number(evaluation.floors.get(name)),
            number(evaluation.ceilings.get(name)),
        ]
        title = f"{name} {direction(name)}\n{meaning(name)}".strip()
        numbers.append(sample_size(name, evaluation.protocol))
        cells: list[Cell] = [title, *((text, "n") for text in numbers), where]
        rows.append(("", cells))
    legend = "↓ lower is better, ↑ higher is better. Floor: what knowing nothing reaches; ceiling: what real images or a perfect model reach."
    return section(
        "Headline numbers",
        paragraph(protocol_line(evaluation.protocol) + "."),
        table(head, rows),
        paragraph(legend, soft=True),
    )


def _pictures(evaluation: Evaluation) -> str:
    return section("Pictures", gallery(picture(file) for file in evaluation.pictures))


def _growth(run_dir: Path) -> str:
    """Samples of the same noise and requests at some validations."""
    drawn = layout.progress_pictures(run_dir)
    shown = [drawn[i] for i in spread(min(GROWTH, len(drawn)), len(drawn))[:-1]] + drawn[-1:] if drawn else []
    text = "The same noise and the same requested attributes, drawn with the averaged weights."
    return (
        section(
            "Samples over training",
            paragraph(text),
            gallery(picture(file, f"step {step:,}") for step, file in shown),
        )
        if shown
        else ""
    )


def _checks(found: list[Check], evaluation: Evaluation | None) -> str:
    """Questions with their verdicts, and the drawings of the latent space."""
    head: list[Cell] = ["question", "verdict", "found", "how that is decided"]
    rows: list[tuple[str, list[Cell]]] = [
        ("", [c.question, c.verdict, c.found, (c.rule, "soft")]) for c in found
    ]
    drawings = (
        gallery(drawing(file.read_bytes(), DRAWINGS.get(file.stem, file.stem)) for file in evaluation.plots)
        if evaluation
        else ""
    )
    return section("Checks of variance and prior", table(head, rows), drawings)


def _rare(evaluation: Evaluation) -> str:
    head: list[Cell] = [
        "asked for",
        *(
            (t, "n")
            for t in (
                "in CelebA's training",
                "in training",
                "held out",
                "success",
                "95 % interval",
                "real images",
                "N",
            )
        ),
    ]
    rows: list[tuple[str, list[Cell]]] = []
    for row in evaluation.rare:
        counts = [number(row.get(kind)) for kind in ("annotated_count", "train_count", "held_out_count")]
        success = [
            number(row.get("success")),
            f"{number(row.get('low'))} – {number(row.get('high'))}",
            number(row.get("real_success")),
        ]
        rows.append(
            (
                "",
                [
                    " + ".join(row["attributes"]),
                    *((text, "n") for text in [*counts, *success, number(row.get("n"))]),
                ],
            )
        )
    text = "Attributes that hardly ever meet, asked for together: how often the classifier finds all of them in a sample."
    return section("Rare combinations", paragraph(text), table(head, rows)) if rows else ""


def _attributes(evaluation: Evaluation) -> str:
    kinds = ("accuracy", "real_accuracy", "shuffled_accuracy", "balanced_accuracy", "real_balanced_accuracy")
    head: list[Cell] = [
        "attribute",
        *(
            (t, "n")
            for t in ("samples", "real (ceiling)", "shuffled (floor)", "samples, balanced", "real, balanced")
        ),
    ]
    rows: list[tuple[str, list[Cell]]] = []
    for name, row in evaluation.per_attribute.items():
        read = row.get("read_by_model", True)
        cells: list[Cell] = [
            name if read else f"{name} (not read by the model)",
            *((number(row.get(kind)), "n") for kind in kinds),
        ]
        rows.append(("" if read else "off", cells))
    text = "How often the classifier's decision on a sample is what was asked for."
    return section("Attributes", paragraph(text), table(head, rows)) if rows else ""


def _making(run_dir: Path, evaluation: Evaluation | None) -> str:
    items: dict[str, Any] = {
        "commit": record.commit(run_dir) or "unknown",
        "run directory": run_dir.absolute(),
    }
    for key, value in (record.read_json(run_dir / "inputs.json") or {}).items():
        items[f"input: {key}"] = value
    if evaluation:
        items |= {key: value for key, value in evaluation.protocol.items() if key not in items}
        items |= {f"measuring {name}": duration(value) for name, value in evaluation.seconds.items()}
    changes: list[tuple[str, list[Cell]]] = [
        (
            "",
            [
                str(line.get("time", "")),
                (str(line.get("step", "")), "n"),
                " ".join(line.get("stages", [])),
                _changed(line.get("changed", {})),
            ],
        )
        for line in record.history(run_dir)
    ]
    return section(
        "How it was made",
        table(["launched", "at step", "stages", "changed"], changes),
        table(["stage", "job", "state", "hosts", "started", ("took", "n")], _job_rows(run_dir)),
        facts(items),
    )


def _changed(changed: dict[str, Any]) -> str:
    pairs = [
        f"{key}: {value[0]} → {value[1]}" if isinstance(value, list) else f"{key}: {value}"
        for key, value in changed.items()
    ]
    return redact(", ".join(pairs)) or "–"


def _job_rows(run_dir: Path) -> list[tuple[str, list[Cell]]]:
    rows: list[tuple[str, list[Cell]]] = []
    for job in record.jobs(run_dir):
        for attempt in job.get("attempts") or [{}]:
            began, ended = attempt.get("started"), attempt.get("ended")
            when = datetime.fromtimestamp(began).isoformat(" ", "seconds") if began else "–"
            took = duration(ended - began) if began and ended else "–"
            state = str(attempt.get("state") or job.get("state", ""))
            rows.append(
                (
                    "",
                    [
                        str(job.get("stage", "")),
                        str(job.get("id", "")),
                        state,
                        ", ".join(attempt.get("hosts", [])),
                        when,
                        (took, "n"),
                    ],
                )
            )
    return rows
