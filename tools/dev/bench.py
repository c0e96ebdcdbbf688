"""Measure the pipeline on this machine: loader, train stage, shard stage, evaluation, start-up."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from pipeline.config import load as configuration
from pipeline.config.paths import absolute_paths
from pipeline.config.schema import RunConfig
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.celeba_images import CelebaImages
from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.errors import ConfigError, exit_code
from pipeline.prepare import ROOT, commit
from pipeline.rundir import layout
from pipeline.rundir.files import write_json, write_text
from pipeline.runtime.distributed import Ranks, tune_process
from pipeline.stages import shard as shard_stage
from tools.dev.benchmarks import stages
from tools.dev.benchmarks.evaluation import evaluation
from tools.dev.benchmarks.harness import Bench, Result
from tools.dev.benchmarks.loader import loader

BENCHMARKS: dict[str, Callable[[Bench], dict[str, Result]]] = {
    "loader": loader,
    "train": stages.train,
    "shard": stages.shard,
    "evaluation": evaluation,
    "startup": stages.startup,
}
DEFAULTS = ["train.batch_size=128"]
TOY = ["toy.n=2000", "shard.samples_per_shard=256"]  # enough shards to shuffle and to share among cores


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
        "--only", metavar="A,B", default=",".join(BENCHMARKS), help="names out of %(default)s (default: all)"
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
    args.only = args.only.split(",")
    for name in args.only:
        if name not in BENCHMARKS:
            raise ConfigError(
                f"--only: unknown benchmark {name!r}, expected names out of {','.join(BENCHMARKS)}"
            )
    if args.repeats < 1 or args.seconds <= 0:
        raise ConfigError(
            f"--repeats {args.repeats} --seconds {args.seconds:g}: expected N of at least 1 and S above 0"
        )
    return args


def load_config(source: str | None, overrides: list[str]) -> RunConfig:
    """Return the measured configuration.

    Without `source` it draws toy faces first and uses their folder.
    """
    given = [f"shard.source={source}", "shard.allow_subset=true"] if source else TOY
    file = ROOT / "configs/sigma_cvae_nf.yaml"
    config = absolute_paths(configuration.load([file], [*DEFAULTS, *given, *overrides]))
    if config.shard.source:
        return config
    folder = layout.toy_dir(config)
    cores = len(os.sched_getaffinity(0))
    make_toy_celeba(folder, config.toy.n, config.toy.seed, cores, logging.getLogger("cvae.bench"))
    return replace(config, shard=replace(config.shard, source=str(folder)))


@contextmanager
def workspace(
    config: RunConfig, repeats: int, seconds: float, precisions: tuple[str, ...]
) -> Iterator[Bench]:
    """Write shards and unpack the images into a temporary folder on the disk of the runs."""
    Path(config.runs_dir).mkdir(parents=True, exist_ok=True)
    cache = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=config.runs_dir) as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the cache of verified shards
        try:
            celeba = Celeba.open(layout.source_path(config), config.shard.allow_subset)
            if celeba.images.place.suffix == ".zip":
                with zipfile.ZipFile(celeba.images.place) as archive:
                    archive.extractall(folder)
                unpacked = CelebaImages(Path(folder) / celeba.images.inside)
                celeba = replace(celeba, images=unpacked)
            config = replace(config, runs_dir=folder)
            shard_stage.run(config, stages.context(Path(folder), Ranks()))
            yield Bench(config, celeba, repeats, seconds, precisions)
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if cache is not None:
                os.environ["XDG_CACHE_HOME"] = cache


def machine() -> dict[str, Any]:
    """Describe the machine, the versions and the time of the measurement."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy", "pillow")},
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


# ---- report


def number(value: float) -> str:
    """Format with three significant digits and separated thousands."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(result: Result) -> str:
    """Return protocol, figures and ratios of one benchmark as Markdown."""
    spread = ("median", "min", "max")
    figures = []
    for name, values in result["contenders"].items():
        figures.append([name, *(number(values[k]) for k in spread)])
    parts = [
        f"## {result['title']}",
        f"{result['protocol']} N = {result['repeats']}.",
        table([result["unit"], *spread], figures),
    ]
    if result["ratios"]:
        rows = []
        for r in result["ratios"]:
            values = [number(r[k]) for k in spread]
            verdict = "yes" if r["met"] else "no"
            rows.append([f"{r['contender']} / {r['reference']}", *values, f"≥ {r['target']:g}", verdict])
        parts.append(table(["ratio within a round", *spread, "target", "met"], rows))
    return "\n\n".join(parts)


def markdown(report: dict[str, Any]) -> str:
    """Return the page that shows the content of the JSON."""
    facts = []
    for name, value in report["machine"].items():
        if value is not None:
            facts.append([name.replace("_", " "), str(value)])
    head = (
        f"# Benchmarks\n\n`tools/dev/bench.py` wrote this page. Source: {report['source']}. The figures "
        "are medians over N repetitions with their extremes. The contenders take turns, one repetition of "
        "each per round, and a ratio is taken within each round."
    )
    sections = [section(result) for result in report["benchmarks"].values()]
    return "\n\n".join([head, table(["machine", ""], facts), *sections]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises ConfigError, DataError."""
    args = arguments(argv)
    report: dict[str, Any] = {"machine": machine()}
    logging.getLogger("cvae.bench").addHandler(logging.NullHandler())
    config = load_config(args.source, args.overrides)
    tune_process()  # as every stage does
    precisions = ("fp32",) if args.fp32 else ("bf16", "fp32")
    with workspace(config, args.repeats, args.seconds, precisions) as bench:
        origin = "the CelebA folder given" if args.source else "toy faces drawn by the project"
        report["source"] = f"{origin}, {len(bench.celeba.names)} images"
        report["benchmarks"] = {}
        for name in args.only:
            print(f"{name} ...", file=sys.stderr)
            report["benchmarks"] |= BENCHMARKS[name](bench)
    if args.json:
        write_json(args.json, report)
    text = markdown(report)
    if args.markdown:
        write_text(args.markdown, text)
    print(text)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # so that the temporary folder is removed
    sys.exit(exit_code(main))
