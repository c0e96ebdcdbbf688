"""Measure the pipeline on this machine: loader, train stage, shard stage, evaluation, start-up.

With --peers it measures this project beside the libraries that people would use instead.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.errors import ConfigError, exit_code
from pipeline.rundir.files import write_json, write_text
from pipeline.runtime.distributed import tune_process
from tools.dev.benchmarks import stages
from tools.dev.benchmarks.device import device
from tools.dev.benchmarks.encoded import encoded
from tools.dev.benchmarks.evaluation import evaluation
from tools.dev.benchmarks.harness import Bench, Result
from tools.dev.benchmarks.host import host
from tools.dev.benchmarks.loader import loader
from tools.dev.benchmarks.page import markdown, replace_section
from tools.dev.benchmarks.peers.registry import PEERS
from tools.dev.benchmarks.streaming import streaming
from tools.dev.benchmarks.train import train
from tools.dev.benchmarks.workspace import load_config, machine, workspace

BENCHMARKS: dict[str, Callable[[Bench], dict[str, Result]]] = {
    "loader": loader,
    "encoded": encoded,
    "streaming": streaming,
    "train": train,
    "host": host,
    "device": device,
    "shard": stages.shard,
    "evaluation": evaluation,
    "startup": stages.startup,
}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog="tools/dev/bench.py", description=__doc__)
    parser.add_argument(
        "--source", metavar="FOLDER", help="CelebA in its official layout (default: 2000 faces drawn here)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything that was measured")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the tables that are printed")
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=int,
        default=5,
        help="rounds; contenders take turns in each (default: 5)",
    )
    parser.add_argument(
        "--page",
        metavar="FILE",
        type=Path,
        help="write the tables into this machine's part of docs/performance.md",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="compare with other libraries, which `make bench-peers` installs",
    )
    parser.add_argument(
        "--only",
        metavar="A,B",
        help=f"names out of {','.join(BENCHMARKS)}; with --peers out of {','.join(PEERS)} (default: all)",
    )
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=float,
        default=3.0,
        help="rough length of one repetition (default: 3)",
    )
    parser.add_argument(
        "--fp32",
        action="store_true",
        help="leave out bf16, which a CPU without AVX-512 emulates fifteen times slower",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="changes to configs/sigma_cvae_nf.yaml, e.g. train.batch_size=256",
    )
    args = parser.parse_intermixed_args(argv)
    known = PEERS if args.peers else BENCHMARKS
    args.benchmarks = {}
    for name in args.only.split(",") if args.only else known:
        if name not in known:
            raise ConfigError(f"--only: unknown benchmark {name!r}, expected names out of {','.join(known)}")
        args.benchmarks[name] = known[name]
    if args.repeats < 1 or args.seconds <= 0:
        raise ConfigError(
            f"--repeats {args.repeats} --seconds {args.seconds:g}: expected N of at least 1 and S above 0"
        )
    return args


def run_one(benchmark: Callable[[Bench], dict[str, Result]], bench: Bench) -> dict[str, Result]:
    """Run one benchmark. Raises ConfigError if a peer is not installed."""
    try:
        return benchmark(bench)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; `make bench-peers` installs all peers") from None


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises ConfigError, DataError."""
    args = arguments(argv)
    report: dict[str, Any] = {"suite": "peers" if args.peers else "own", "machine": machine()}
    logging.getLogger("cvae.bench").addHandler(logging.NullHandler())
    config = load_config(args.source, args.overrides)
    tune_process()  # as every stage does
    precisions = ("fp32",) if args.fp32 else ("bf16", "fp32")
    with workspace(config, args.repeats, args.seconds, precisions) as bench:
        origin = "the CelebA folder given" if args.source else "toy faces drawn by the project"
        report["source"] = f"{origin}, {len(bench.celeba.names)} images"
        report["benchmarks"] = {}
        for name, benchmark in args.benchmarks.items():
            print(f"{name} ...", file=sys.stderr)
            report["benchmarks"] |= run_one(benchmark, bench)
    if args.json:
        write_json(args.json, report)
    text = markdown(report)
    if args.page:
        replace_section(args.page, report)
    if args.markdown:
        write_text(args.markdown, text)
    print(text)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that the temporary folder is removed
    sys.exit(exit_code(main))
