"""Disturb a small training at seeded random moments and check that every promise holds.

Each trial trains on 1 to 4 ranks, meets one fault, restarts with the same command, and is compared
with an undisturbed run of its world size: final weights, consumed samples, every deterministic
metric series. `python tools/dev/chaos.py --trials 200` is the long form.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# Set before torch is imported: ranks share the cores, and no thread may run during a fork.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch._dynamo  # noqa: F401  # saves each rank 2 s at its first optimizer step

from pipeline.config import load as configuration
from pipeline.errors import ConfigError, exit_code
from pipeline.run import run_stage
from tools.dev.chaos_parts import ranks
from tools.dev.chaos_parts.faults import FAULTS
from tools.dev.chaos_parts.processes import adopt_orphans, die_with_parent, end_descendants
from tools.dev.chaos_parts.server import Server
from tools.dev.chaos_parts.trial import (
    INTERVAL,
    STEPS,
    TINY,
    Outcome,
    Reference,
    Trial,
    run_trial,
    undisturbed,
)

MLFLOW = "MLflow server stopped"
GRACE_S = 5.0  # what the last processes of a campaign may take to end
log = logging.getLogger("chaos")
_server: Server | None = None  # the campaign's; every worker inherits it


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises ConfigError if there is nothing to do."""
    parser = argparse.ArgumentParser(
        prog="tools/dev/chaos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--trials",
        metavar="N",
        type=int,
        default=len(FAULTS),
        help="faults take turns (default: one of each)",
    )
    add(
        "--seed", metavar="S", type=int, default=0, help="seed of the first trial, then S+1, ... (default: 0)"
    )
    add("--worlds", metavar="W,W", default="1,2,3,4", help="numbers of ranks, in turn (default: 1,2,3,4)")
    add("--jobs", metavar="J", type=int, default=2, help="trials at a time (default: 2)")
    add("--only", metavar="TEXT", default="", help="use only faults whose name contains TEXT")
    add("--skip", metavar="TEXT", help="leave out the faults whose name contains TEXT")
    add(
        "--limit-s",
        metavar="S",
        type=float,
        default=120.0,
        help="ranks that report no step for S seconds hang (default: 120)",
    )
    add("--folder", metavar="DIR", type=Path, help="where failed trials stay (default: a temporary folder)")
    add("--json", metavar="FILE", type=Path, help="write all outcomes to FILE")
    args = parser.parse_args(argv)
    args.kinds = []
    for kind in FAULTS:
        is_skipped = args.skip and args.skip in kind
        if args.only in kind and not is_skipped:
            args.kinds.append(kind)
    if not args.kinds or args.trials < 1:
        raise ConfigError(
            f"--only {args.only!r} --skip {args.skip!r} --trials {args.trials}: no trial is left to run; "
            f"the faults are {', '.join(FAULTS)}"
        )
    args.worlds = [int(world) for world in args.worlds.split(",")]
    return args


def make_shards(runs_dir: Path) -> None:
    """Write the tiny shards that every trial copies."""
    run_dir = runs_dir / "shards"
    run_dir.mkdir(parents=True)
    config = configuration.load([], [*TINY, f"runs_dir={runs_dir}"])
    (run_dir / "config.yaml").write_text(configuration.dump(config))
    pid = ranks.fork(partial(run_stage, run_dir, "shard"), run_dir / "log")
    status = os.waitpid(pid, 0)[1]
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError((run_dir / "log").read_text())


def begin_worker(server: Server | None) -> None:
    """Prepare a worker process: it dies with the campaign, and finds the orphans of its trials."""
    global _server
    _server = server
    die_with_parent()
    adopt_orphans()


def run_in_worker(
    number: int, kind: str, world: int, seed: int, folder: Path, limit_s: float, wanted: Reference
) -> Outcome:
    """Run one trial in a worker process."""
    trial = Trial(kind, world, seed, folder / f"trial{number:04d}", folder, limit_s)
    if kind != MLFLOW:
        return run_trial(trial, wanted)
    assert _server is not None
    with _server.turn:
        trial.server = _server
        return run_trial(trial, wanted)


def run_all(args: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Run all trials, `args.jobs` at a time."""
    make_shards(folder)
    wanted = {}
    for world in sorted(set(args.worlds)):
        wanted[world] = undisturbed(world, folder / f"undisturbed{world}", folder, args.limit_s)
    log.info("undisturbed runs on %s ranks are done", ", ".join(map(str, wanted)))
    outcomes = []
    with ExitStack() as stack:
        server = stack.enter_context(Server(folder / "server")) if MLFLOW in args.kinds else None
        pool = ProcessPoolExecutor(args.jobs, get_context("fork"), begin_worker, (server,))
        stack.enter_context(pool)
        futures = []
        for number in range(args.trials):
            kind = args.kinds[number % len(args.kinds)]
            turn = number + number // len(args.kinds)
            world = args.worlds[turn % len(args.worlds)]
            job = (number, kind, world, args.seed + number, folder, args.limit_s, wanted[world])
            futures.append(pool.submit(run_in_worker, *job))
        for future in as_completed(futures):
            outcome = future.result()
            outcomes.append(outcome)
            if args.json:  # after every trial, so that a campaign that is killed leaves its findings
                rows = [dataclasses.asdict(o) for o in outcomes]
                args.json.write_text(json.dumps(rows, indent=1))
            verdict = outcome.error or f"ok, {outcome.lost} lost"
            done = f"{len(outcomes)}/{len(futures)}"
            log.info("%s %s on %d: %s", done, outcome.kind, outcome.world, verdict)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Return a Markdown table with a row for each fault."""
    lines = [
        "| fault | trials | as promised | right refusals | most steps lost | promised "
        "| checkpoint in flight | median s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, fault in FAULTS.items():
        own = [o for o in outcomes if o.kind == kind]
        if not own:
            continue
        cells = [
            kind,
            len(own),
            sum(not o.error for o in own),
            sum(o.refusals for o in own),
            max(o.lost for o in own),
            round(fault.intervals * INTERVAL),
            sum(o.in_flight for o in own),
            f"{statistics.median(o.seconds for o in own):.1f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def failure(outcome: Outcome) -> str:
    """Return the last lines of a failing campaign: seed, trial, promise, folder, command."""
    promise = outcome.error.partition("\n")[0]
    again = ["--seed", str(outcome.seed), "--trials", "1"]
    again += ["--only", outcome.kind, "--worlds", str(outcome.world)]
    return (
        f"BROKEN seed {outcome.seed}, {Path(outcome.folder).name}, "
        f"{outcome.kind} on {outcome.world} ranks: {promise}\n"
        f"  kept in {outcome.folder}\n"
        f"  repeat: python tools/dev/chaos.py {shlex.join(again)}"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exits with 1 if a promise was broken or a process outlived the campaign.
    """
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    adopt_orphans()
    start = time.monotonic()
    try:
        outcomes = run_all(args, folder)
    finally:
        survivors = end_descendants(GRACE_S)
        if survivors:
            print(f"BROKEN processes outlived the campaign: {', '.join(survivors)}", file=sys.stderr)
    minutes = (time.monotonic() - start) / 60
    failed = [o for o in outcomes if o.error]
    print(table(outcomes))
    print(
        f"\n{len(outcomes)} trials, {len(failed)} broke a promise; {STEPS} steps each, "
        f"train.max_lost_steps={INTERVAL}; {minutes:.1f} min",
        flush=True,
    )
    for outcome in failed:
        print(f"\n{outcome.kind} on {outcome.world} ranks:\n{outcome.error}\n", file=sys.stderr)
    for outcome in failed:
        print(failure(outcome), file=sys.stderr)
    if failed or survivors:
        raise SystemExit(1)
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(exit_code(main))
