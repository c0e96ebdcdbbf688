"""What a launch tells a person: first data, place and plan; at its end six numbers, files, next commands."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from pipeline.config.schema import RunConfig
from pipeline.reporting.text import duration, number, protocol_line, text_table, with_arrow
from pipeline.rundir import layout
from pipeline.rundir.headline import HEADLINES, standing_for
from pipeline.rundir.record import Evaluation, effort, evaluations, run_config
from pipeline.tracking.sync import make_tracker
from slurm.chain import Chain, Run

REFERENCES = {"floors": "knowing nothing", "ceilings": "real images"}
LONGEST_NAME = 28  # characters of a run's name


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
    """Return the first lines of a launch: data, place, tracker, runs and jobs."""
    lines = list(dict.fromkeys(data_line(run.config) for run in runs))
    lines.append(place)
    stores = dict.fromkeys(make_tracker(run.run_dir, run.config).address for run in runs)
    lines += [f"tracking: {store}" for store in stores]
    for run in runs:
        lines.append(f"run: {run.config.name}, seed {run.config.seed}, in {shown(run.run_dir)}")
    lines += chain.notes
    stages: dict[str, int] = {}
    for step in chain.steps:
        stages[step.stage] = stages.get(step.stage, 0) + 1
    listed = ", ".join(f"{stage} x{n}" if n > 1 else stage for stage, n in stages.items())
    rest = "queued or complete" if chain.queued else "complete"
    lines.append(f"jobs: {listed or f'none, everything that was asked for is {rest}'}")
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
        lines += [headline_table(newest), "", *_files(newest, pages, viewer), "", *_next(newest)]
    return "\n".join(lines)


def headline_table(newest: dict[Path, Evaluation]) -> str:
    """Return one row for each of the six numbers, one column for each run, then what they lie between."""
    found = list(newest.values())
    first = found[0]
    head = ["", *(run_dir.name[-LONGEST_NAME:] for run_dir in newest), *REFERENCES.values()]
    took = [effort(run_dir, evaluation)[1] for run_dir, evaluation in newest.items()]
    empty = [""] * len(REFERENCES)
    rows = [
        ["number of the evaluation", *(str(evaluation.number) for evaluation in found), *empty],
        ["training took", *(duration(seconds) for seconds in took), *empty],
    ]
    for headline in HEADLINES:
        name = standing_for(headline, found)
        bounds = [number(getattr(first, kind).get(name)) for kind in REFERENCES]
        label = with_arrow(headline.label, first.about.get(name, {}).get("direction", "none"))
        rows.append([label, *(_value(evaluation, name) for evaluation in found), *bounds])
    legend = "↓ lower is better, ↑ higher is better; ± half of the 95 % interval"
    return f"{text_table(head, rows)}\n{protocol_line(first.protocol)}; {legend}"


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
        lines.append(f"numbers: {shown(evaluation.folder / 'metrics.json')} (all {len(evaluation.metrics)})")
    if viewer:
        lines.append(f"MLflow: {viewer}")
    return lines


def _next(newest: dict[Path, Evaluation]) -> list[str]:
    """Return commands for the next steps, with the last run as example."""
    last = list(newest)[-1]
    run_dir = shlex.quote(shown(last))
    everyone = shlex.join(shown(each) for each in newest)
    compare = [f"  python tools/compare.py {everyone}"] if len(newest) > 1 else []
    longer = 2 * run_config(last).train.images
    request = shlex.quote(_example_request(newest[last]))  # "!" means something to a shell
    return [
        "next:",
        *compare,
        f"  python tools/sample.py {run_dir} {request} --n 16 --out grid.png",
        f"  python launch.py --run-dir {run_dir} --stages eval eval.seed=1",
        f"  python launch.py --run-dir {run_dir} train.images={longer}",
    ]


def _example_request(evaluation: Evaluation) -> str:
    """Return a request that the model knows: CelebA's usual example, else one of its first attributes."""
    known = list(evaluation.per_attribute)
    if {"Male", "Smiling"} <= set(known) or not known:
        return "Male,!Smiling"
    return known[0]


def shown(path: Path) -> str:
    """Return a path as a person types it here: relative if it lies below the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
