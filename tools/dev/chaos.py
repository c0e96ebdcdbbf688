"""Kill, freeze, starve and damage a small training at seeded random moments; whatever happens, nothing that was reached is lost.

`python tools/dev/chaos.py --trials 200` is the long form. Each trial trains on 1 to 4 ranks, meets one fault, is restarted with the same
command, and is compared with an undisturbed run of its world size: final weights, consumed samples, every deterministic metric series.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = (
    "1"  # before torch: its ranks share the cores, and no thread may run where a process forks
)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch._dynamo  # noqa: F401  # each rank's first optimizer step would import it, for 2 s

from pipeline.config import load as configuration
from pipeline.errors import ConfigError, exit_code
from pipeline.run import run_stage
from tools.dev.chaos_parts import ranks
from tools.dev.chaos_parts.faults import FAULTS
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
log = logging.getLogger("chaos")
_server: Server | None = None  # of this worker process


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line."""
    parser = argparse.ArgumentParser(
        prog="tools/dev/chaos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trials",
        metavar="N",
        type=int,
        default=len(FAULTS),
        help="fault kinds take turns (default: one of each)",
    )
    parser.add_argument(
        "--seed", metavar="S", type=int, default=0, help="of all moments, ranks and bytes (default: 0)"
    )
    parser.add_argument(
        "--worlds", metavar="W,W", default="1,2,3,4", help="numbers of ranks, taking turns (default: 1,2,3,4)"
    )
    parser.add_argument("--jobs", metavar="J", type=int, default=2, help="trials at a time (default: 2)")
    parser.add_argument("--only", metavar="TEXT", default="", help="fault kinds whose name contains TEXT")
    parser.add_argument("--skip", metavar="TEXT", help="not the fault kinds whose name contains TEXT")
    parser.add_argument(
        "--limit-s",
        metavar="S",
        type=float,
        default=120.0,
        help="seconds after which a rank that is still there hangs",
    )
    parser.add_argument(
        "--folder", metavar="DIR", type=Path, help="keep what failed here (default: a temporary folder)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all outcomes")
    args = parser.parse_args(argv)
    args.kinds = [kind for kind in FAULTS if args.only in kind and not (args.skip and args.skip in kind)]
    if not args.kinds or args.trials < 1:
        raise ConfigError(
            f"--only {args.only} --trials {args.trials}: nothing to do; kinds are {', '.join(FAULTS)}"
        )
    args.worlds = [int(world) for world in args.worlds.split(",")]
    return args


def make_shards(runs_dir: Path) -> None:
    """The tiny shards that every trial gets a copy of."""
    run_dir = runs_dir / "shards"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(
        configuration.dump(configuration.load([], [*TINY, f"runs_dir={runs_dir}"]))
    )
    pid = ranks.fork(partial(run_stage, run_dir, "shard"), run_dir / "log")
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError((run_dir / "log").read_text())


def one(
    number: int, kind: str, world: int, seed: int, folder: Path, limit_s: float, wanted: Reference
) -> Outcome:
    """One trial, in a worker process."""
    global _server
    if kind == MLFLOW:
        if _server is None:
            _server = Server(folder / f"server{os.getpid()}")
        _server.start()
    trial = Trial(
        kind, world, seed, folder / f"trial{number:04d}", folder, limit_s, _server if kind == MLFLOW else None
    )
    return run_trial(trial, wanted)


def stop_server() -> None:
    """At the end of a worker process."""
    if _server is not None:
        _server.stop()


def run_all(args: argparse.Namespace, folder: Path) -> list[Outcome]:
    """All trials, `args.jobs` at a time."""
    make_shards(folder)
    wanted = {
        world: undisturbed(world, folder / f"undisturbed{world}", folder, args.limit_s)
        for world in sorted(set(args.worlds))
    }
    log.info("undisturbed runs on %s ranks are there", ", ".join(map(str, wanted)))
    outcomes = []
    with ProcessPoolExecutor(args.jobs, get_context("fork")) as pool:
        futures = []
        for number in range(args.trials):
            kind, world = (
                args.kinds[number % len(args.kinds)],
                args.worlds[(number + number // len(args.kinds)) % len(args.worlds)],
            )
            futures.append(
                pool.submit(one, number, kind, world, args.seed + number, folder, args.limit_s, wanted[world])
            )
        for done, future in enumerate(as_completed(futures), 1):
            outcome = future.result()
            outcomes.append(outcome)
            if args.json:  # at once: also what a harness found that was itself killed
                args.json.write_text(json.dumps([dataclasses.asdict(o) for o in outcomes], indent=1))
            log.info(
                "%d/%d %s on %d: %s",
                done,
                len(futures),
                outcome.kind,
                outcome.world,
                outcome.error or f"ok, {outcome.lost} lost",
            )
        for stopping in [pool.submit(stop_server) for _ in range(4 * args.jobs)]:  # each worker gets some
            stopping.result()
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Markdown, a row per fault kind."""
    lines = [
        "| fault | trials | as promised | right refusals | most steps lost | promised | checkpoint in flight | median s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, fault in FAULTS.items():
        own = [o for o in outcomes if o.kind == kind]
        if own:
            cells = [
                len(own),
                sum(not o.error for o in own),
                sum(o.refusals for o in own),
                max(o.lost for o in own),
            ]
            cells += [round(fault.intervals * INTERVAL), sum(o.in_flight for o in own)]
            lines.append(
                f"| {kind} | {' | '.join(map(str, cells))} | {statistics.median(o.seconds for o in own):.1f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 where a promise was broken."""
    args = arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    start = time.monotonic()
    outcomes = run_all(args, folder)
    failed = [o for o in outcomes if o.error]
    minutes = (time.monotonic() - start) / 60
    print(table(outcomes))
    what = f"{STEPS} steps each, train.checkpoint_interval={INTERVAL}"
    print(f"\n{len(outcomes)} trials, {len(failed)} broke a promise; {what}; {minutes:.1f} min")
    for outcome in failed:
        print(
            f"\n{outcome.kind} on {outcome.world} ranks, seed {outcome.seed}: {outcome.error}",
            file=sys.stderr,
        )
    if failed:
        raise SystemExit(1)
    if not args.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(exit_code(main))
