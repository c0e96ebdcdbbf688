"""Predict a training step on many GPUs, and check the same model with 1, 2 and 4 processes here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config import load as configuration
from pipeline.errors import exit_code
from pipeline.prepare import ROOT, commit
from pipeline.rundir.files import write_bytes, write_json, write_text
from pipeline.runtime.ports import free_port
from tools.dev.benchmarks.harness import Bench
from tools.dev.benchmarks.page import table, wrapped
from tools.dev.benchmarks.workspace import load_config, workspace
from tools.dev.scaling_parts.model import Costs, Network, busy, step
from tools.dev.scaling_parts.plots import parts_plot, ranks_plot

WORLDS = (1, 2, 4)  # processes of the check
GPUS = (8, 64, 512)
CASES = ((64, 16), (64, 128), (64, 1024), (128, 128))  # pixels, and images of a GPU
# One H100, bf16, batches of 128 and 1,024: eager steps of 18.4 and 16.7 ms, captured ones of 3.65 and
# 14.04 ms.
# 232,000 images/s from the loader's thread. One H200: pauses of 5.6 ms and 0.58 s every 150 and 300 steps.
GRAPH = Costs(0.0, 2.17e-3, 11.6e-6, 1 / 232_000, 15.7e6, 5.6e-3, 150, 0.58, 300)
EAGER = replace(GRAPH, launches=17.5e-3)
MODES = {"eager": EAGER, "graph": GRAPH}
BEGIN, END = "<!-- begin: check -->", "<!-- end: check -->"


def measure(bench: Bench, world: int, batch: int, calls: int) -> dict[str, float]:
    """Run `world` processes on this machine and return rank 0's seconds."""
    folder = Path(tempfile.mkdtemp(prefix=f"ranks{world}_", dir=bench.folder))
    overrides = [f"train.batch_size={batch}", "tracking.enabled=false"]
    (folder / "given.yaml").write_text(configuration.dump(bench.config))
    config = configuration.load([folder / "given.yaml"], overrides)
    (folder / "config.yaml").write_text(configuration.dump(config))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "tools.dev.scaling_parts.worker", str(folder), str(calls)]
    ranks = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **shared, **own}))
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise RuntimeError(f"ranks of {world} ended with {codes}")
    return json.loads((folder / "seconds.json").read_text())


def check(bench: Bench, share: int, calls: int, rounds: int) -> dict[str, Any]:
    """Measure steps of 1, 2 and 4 processes and predict them from their parts.

    One process with two batches gives the fixed costs and those of an image. The all-reduces are
    measured alone. Four processes on two cores have half a core each. All measurements take turns.
    """
    cores = len(os.sched_getaffinity(0))
    cases = [(1, 4 * share), *((world, world * share) for world in WORLDS)]
    turns = [{case: measure(bench, *case, calls) for case in cases} for _ in range(rounds)]
    found: dict[tuple[int, int], dict[str, float]] = {}
    for case in cases:
        found[case] = {part: median(turn[case][part] for turn in turns) for part in turns[0][case]}
    image = (found[1, 4 * share]["step"] - found[1, share]["step"]) / (3 * share)
    fixed = found[1, share]["step"] - share * image
    rows = []
    for world in WORLDS:
        parts = found[world, world * share]
        crowded = max(1.0, world / cores)
        predicted = crowded * (fixed + share * image) + parts["gradients"] + parts["sums"]
        rows.append({"ranks": world, "predicted": predicted, **parts})
    return {
        "share": share,
        "size": bench.config.shard.size,
        "cores": cores,
        "rounds": rounds,
        "fixed": fixed,
        "image": image,
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
        "rows": rows,
    }


def check_text(found: dict[str, Any]) -> str:
    """Return the check as text and table."""
    head = ["processes", "step, measured", "step, predicted", "ratio", "gradients", "sums", "loading"]
    rows = []
    for row in found["rows"]:
        milliseconds = [f"{1e3 * row[name]:.3g} ms" for name in ("step", "predicted")]
        parts = [f"{1e3 * row[name]:.3g} ms" for name in ("gradients", "sums", "load")]
        ratio = f"{row['predicted'] / row['step']:.2f}"
        rows.append([str(row["ranks"]), *milliseconds, ratio, *parts])
    text = (
        f"{found['share']} images of {found['size']} pixels a process, one thread each, gloo, "
        f"{found['cores']} cores, load {found['load']} at the end, commit {found['commit']}, "
        f"medians of {found['rounds']} rounds that take turns. A step costs "
        f"{1e3 * found['fixed']:.3g} ms and {1e3 * found['image']:.3g} ms for each image."
    )
    return f"{wrapped(text)}\n\n{table(head, rows)}"


def prediction() -> str:
    """Return the table of predicted steps on GPUs."""
    head = ["mode", "pixels", "images a GPU", "GPUs", "compute", "gradients", "sums", "step", "computing"]
    head += ["images/s"]
    rows = []
    for mode, costs in MODES.items():
        for size, share in CASES:
            for ranks in (1, *GPUS):
                made = step(costs, Network(), ranks, share, size)
                parts = [made.compute, made.gradients, made.sums, made.total]
                cells = [f"{1e3 * seconds:.3g} ms" for seconds in parts]
                computing = f"{busy(costs, Network(), ranks, share, size):.0%}"
                rate = f"{ranks * share / made.total:,.0f}"
                rows.append([mode, str(size), str(share), str(ranks), *cells, computing, rate])
    return table(head, rows)


def replace_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    before, _, rest = page.read_text().partition(begin)
    write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="tools/dev/scaling.py", description=__doc__)
    parser.add_argument(
        "--page",
        metavar="FILE",
        type=Path,
        default=ROOT / "docs/operations/scaling.md",
        help="page (default: %(default)s)",
    )
    parser.add_argument("--check", action="store_true", help="run 1, 2 and 4 processes and write the check")
    parser.add_argument("--share", metavar="N", type=int, default=16, help="images a process (default: 16)")
    parser.add_argument("--calls", metavar="N", type=int, default=30, help="steps timed (default: 30)")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="rounds (default: 5)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises ConfigError, DataError."""
    args = arguments(argv)
    pictures = ROOT / "docs/pictures"
    write_bytes(pictures / "scaling_ranks.svg", ranks_plot(GRAPH, Network(), GPUS))
    write_bytes(pictures / "scaling_parts.svg", parts_plot(MODES, Network(), GPUS))
    replace_between(args.page, "<!-- begin: prediction -->", "<!-- end: prediction -->", prediction())
    if args.check:
        config = load_config(None, ["toy.n=400", "shard.samples_per_shard=128"])
        with workspace(config, 1, 1.0, ("fp32",)) as bench:
            found = check(bench, args.share, args.calls, args.rounds)
        write_json(ROOT / "runs/scaling.json", found)
        replace_between(args.page, BEGIN, END, check_text(found))
    print(json.dumps({mode: asdict(costs) for mode, costs in MODES.items()}, indent=1))


if __name__ == "__main__":
    sys.exit(exit_code(main))
