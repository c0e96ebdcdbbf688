"""What a launch tells a person: first data, place and plan; at its end six numbers, files, next commands."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.reporting.text import duration, number, protocol_line, text_table, with_arrow
from pipeline.rundir import layout
from pipeline.rundir.headline import HEADLINES, standing_for
from pipeline.rundir.record import Evaluation, evaluations, read_json, run_config
from slurm.chain import Chain, Run

REFERENCES = {"floors": "knowing nothing", "ceilings": "real images"}


# ---- at the beginning


def data_line(config: RunConfig) -> str:
    """Say which images a run uses, and the key that decides it."""
    size = f"{config.shard.size} pixels"
    if config.data.shards:
        return f"data: the shards in {shown(Path(config.data.shards))} (data.shards)"
    if config.shard.source:
        return f"data: the images in {shown(layout.source_path(config))} (shard.source), {size}"
    toy = config.toy
    return f"data: {toy.n:,} faces drawn by this project (shard.source is empty), seed {toy.seed}, {size}"


def opening(runs: list[Run], chain: Chain, place: str) -> list[str]:
    """Return the first lines of a launch: data, place, runs and jobs."""
    lines = list(dict.fromkeys(data_line(run.config) for run in runs))
    lines.append(place)
    for run in runs:
        lines.append(f"run: {run.config.name}, seed {run.config.seed}, in {shown(run.run_dir)}")
    lines += chain.notes
    stages: dict[str, int] = {}
    for step in chain.steps:
        stages[step.stage] = stages.get(step.stage, 0) + 1
    listed = ", ".join(f"{stage} x{n}" if n > 1 else stage for stage, n in stages.items())
    lines.append(f"jobs: {listed}" if listed else "jobs: none, everything that was asked for is complete")
    return lines


# ---- at the end


def closing(run_dirs: list[Path], pages: list[Path], viewer: str) -> str:
    """Return the six headline numbers of each run's newest evaluation, then files and next commands.

    `pages`: comparison and tables of the launch. `viewer`: the command or address that shows MLflow.
    """
    newest: dict[Path, Evaluation] = {}
    lines = []
    for run_dir in run_dirs:
        found = evaluations(run_dir)
        if found:
            newest[run_dir] = found[-1]
        else:
            lines.append(f"{run_dir.name}: no complete evaluation")
    if newest:
        lines += [headline_table(newest), "", *_files(newest, pages, viewer), "", *_next(list(newest))]
    return "\n".join(lines)


def headline_table(newest: dict[Path, Evaluation]) -> str:
    """Return one row for each run, then the values that the numbers lie between."""
    found = list(newest.values())
    names = [standing_for(headline, found) for headline in HEADLINES]
    head = ["run", "evaluation", "training"]
    for headline, name in zip(HEADLINES, names, strict=True):
        head.append(with_arrow(headline.label, found[0].about.get(name, {}).get("direction", "none")))
    rows = []
    for run_dir, evaluation in newest.items():
        seconds = (read_json(layout.train_dir(run_dir) / "done.json") or {}).get("seconds")
        cells = [_value(evaluation, name) for name in names]
        rows.append([run_dir.name[-28:], str(evaluation.number), duration(seconds), *cells])
    for kind, label in REFERENCES.items():
        bounds = [number(getattr(found[0], kind).get(name)) for name in names]
        rows.append([label, "", "", *bounds])
    return text_table(head, rows) + f"\n{protocol_line(found[0].protocol)}; ± half of the 95 % interval"


def _value(evaluation: Evaluation, name: str) -> str:
    text = number(evaluation.metrics.get(name))
    low, high = evaluation.intervals.get(name) or (None, None)
    if low is not None and high is not None:
        text += f" ±{(high - low) / 2:.2g}"
    return text


def _files(newest: dict[Path, Evaluation], pages: list[Path], viewer: str) -> list[str]:
    lines = [f"report: {shown(run_dir / 'report.html')}" for run_dir in newest]
    lines += [f"{page.stem.partition('_of_')[0]}: {shown(page)}" for page in pages]
    for evaluation in newest.values():
        lines.append(f"all {len(evaluation.metrics)} numbers: {shown(evaluation.folder / 'metrics.json')}")
    if viewer:
        lines.append(f"MLflow: {viewer}")
    return lines


def _next(run_dirs: list[Path]) -> list[str]:
    """Return commands for the next steps, with the last run as example."""
    run_dir = shlex.quote(shown(run_dirs[-1]))
    everyone = shlex.join(shown(each) for each in run_dirs)
    longer = 2 * run_config(run_dirs[-1]).train.images
    return [
        "next:",
        f"  python tools/compare.py {everyone}",
        f'  python tools/sample.py {run_dir} "Male,!Smiling" --n 16 --out grid.png',
        f"  python launch.py --run-dir {run_dir} --stages eval eval.n=10000",
        f"  python launch.py --run-dir {run_dir} train.images={longer}",
    ]


def shown(path: Path) -> str:
    """Return a path as a person types it here: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
