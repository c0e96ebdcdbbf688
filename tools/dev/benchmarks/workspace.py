"""What the benchmarks run on: a configuration, its images and shards, and the machine."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pipeline.config import load as configuration
from pipeline.config.paths import absolute_paths
from pipeline.config.schema import RunConfig
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.celeba_images import CelebaImages
from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.prepare import ROOT, commit
from pipeline.rundir import layout
from pipeline.runtime.distributed import Ranks
from pipeline.stages import shard as shard_stage
from tools.dev.benchmarks.harness import Bench
from tools.dev.benchmarks.stages import context

DEFAULTS = ["train.batch_size=128"]
TOY = ["toy.n=2000", "shard.samples_per_shard=256"]  # enough shards to shuffle and to share among cores


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
            shard_stage.run(config, context(Path(folder), Ranks()))
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
