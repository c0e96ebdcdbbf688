"""What would go wrong is said before anything is submitted: each check yields problems (they stop the launch) and warnings."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.schema import ClusterConfig
from pipeline.config.suggest import suggest
from pipeline.data.records import RecordFormat
from pipeline.data.sources.celeba import CELEBA_ATTRIBUTES
from pipeline.errors import ConfigError
from pipeline.rundir.layout import source_path
from pipeline.runtime.split import ceil_div
from pipeline.stages import STAGES
from slurm.chain import Chain, Run, Step, batches, stage_resources
from slurm.dryrun import sbatch_script
from slurm.queue import ask

NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "wekafs", "panfs", "pvfs2", "orangefs", "cifs", "smb3", "afs",
    "glusterfs", "fuse.glusterfs", "fuse.juicefs", "fuse.cephfs", "virtiofs", "9p", "daos", "quobyte", "gfs2", "ocfs2",
)  # fmt: skip
IMAGES = 202_599  # of CelebA
CHECKPOINT_BYTES = 200e6  # generous for the networks of the configurations here
MLFLOW_LIMIT_S = 2.0


class Finding(NamedTuple):
    """One thing to mend, and whether the launch may go on without."""

    text: str
    fatal: bool


def preflight(runs: list[Run], chain: Chain) -> list[str]:
    """Check profile, paths, space, tracking and limits at once; returns the warnings.

    Raises ConfigError with every problem found, a line each.
    """
    asked: list[tuple[Callable[[Any], Iterator[Finding]], Any]] = [
        (check, run) for run in runs for check in RUN_CHECKS
    ]
    asked += [(slurm_accepts, group) for group in batches(chain)]
    with ThreadPoolExecutor(16) as pool:  # most of the time is spent waiting for answers
        found = dict.fromkeys(
            finding for findings in pool.map(lambda ask: list(ask[0](ask[1])), asked) for finding in findings
        )
    if problems := [finding.text for finding in found if finding.fatal]:
        raise ConfigError(
            "\n  ".join(["nothing was submitted (--no-preflight skips these checks):", *problems])
        )
    return [finding.text for finding in found]


# ---- the profile, as Slurm sees it


def slurm_accepts(group: list[Step]) -> Iterator[Finding]:
    """Partition, account, limits, processors, GPUs: `sbatch --test-only` of the very script, with a word on which key to change."""
    run, stage = group[0].run, group[0].stage
    wanted = stage_resources(run.config, stage)
    if wanted.partition and (unknown := _unknown_partition(wanted.partition)):
        yield Finding(f"key 'cluster.partition' for stage {stage}: {unknown}", True)
        return
    if wanted.timeout_min > (
        limit := _limit_min(wanted.partition)
    ):  # sbatch may accept it and let it wait for ever
        key = f"key 'cluster.timeout_min' for stage {stage}: {wanted.timeout_min}"
        yield Finding(
            f"{key}: the partition's limit is {limit:.0f}; a job that reaches its own limit saves, is requeued and goes on",
            True,
        )
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(
            sbatch_script(group[:1], None).replace("#SBATCH --chdir", "# chdir")
        )  # the copy of the code is not there yet
        script.flush()
        said = subprocess.run(
            ["sbatch", "--test-only", script.name], capture_output=True, text=True, timeout=20
        )
    if said.returncode:
        reason = re.sub(
            r"^(sbatch|allocation failure): (error: )?",
            "",
            said.stderr.strip().splitlines()[-1] if said.stderr.strip() else "?",
        )
        yield Finding(
            f"stage {stage}: Slurm refuses the job: {reason}; {_asked(wanted)}; {_has(wanted)}", True
        )


def _unknown_partition(name: str) -> str:
    there = (ask("sinfo", "-h", "-o", "%R") or "").split()
    if not there or set(name.split(",")) <= set(there):
        return ""
    hint = suggest(name, there)
    return f"no partition {name!r} on this cluster, there are {', '.join(there)}{hint}"


def _limit_min(partition: str | None) -> float:
    """The longest time limit of the partition, minutes; infinity where Slurm does not tell."""
    limits = []
    for text in (ask("sinfo", "-h", *(["-p", partition] if partition else []), "-o", "%l") or "").split():
        days, _, clock = text.rpartition("-")
        if not re.fullmatch(r"\d+(:\d+)*", clock):  # "infinite"
            return math.inf
        parts = [0, 0, *map(int, clock.split(":"))][-3:]  # [hours, minutes, seconds]
        limits.append(int(days or 0) * 1440 + parts[0] * 60 + parts[1] + parts[2] / 60)
    return max(limits, default=math.inf)


def _asked(wanted: ClusterConfig) -> str:
    keys = (
        "partition",
        "account",
        "qos",
        "constraint",
        "nodes",
        "tasks_per_node",
        "gpus_per_node",
        "cpus_per_task",
        "mem_gb",
        "timeout_min",
    )
    return "asked for " + ", ".join(
        f"cluster.{key}={getattr(wanted, key)}" for key in keys if getattr(wanted, key)
    )


def _has(wanted: ClusterConfig) -> str:
    rows = ask(
        "sinfo",
        "-h",
        *(["-p", wanted.partition] if wanted.partition else []),
        "-o",
        "%D nodes of %c CPUs, %m MB, %G, features %f, limit %l",
    )
    return f"the partition has {' | '.join((rows or 'unknown nodes').strip().splitlines()[:4])}"


# ---- one run


def source_is_there(run: Run) -> Iterator[Finding]:
    """The folder with CelebA."""
    source = source_path(run.config)
    if run.config.shard.source and not source.is_dir():
        yield Finding(f"key 'shard.source': {source}: no such folder", True)


def folders_are_shared(run: Run) -> Iterator[Finding]:
    """The runs directory can be written and lies where nodes can see it, as far as a file system's type tells."""
    folder = _existing(Path(run.config.runs_dir))
    if not os.access(folder, os.W_OK):
        yield Finding(f"key 'runs_dir': {folder}: cannot be written", True)
    for key, path in (("runs_dir", folder), ("shard.source", source_path(run.config))):
        kind = file_system(path)
        if path.exists() and kind not in NETWORK_FILE_SYSTEMS:
            yield Finding(
                f"key '{key}': {path} lies on {kind}, a local file system: every node must see it under this path",
                False,
            )


def space_suffices(run: Run) -> Iterator[Finding]:
    """Room for shards and checkpoints."""
    config = run.config
    images = (
        0
        if STAGES["shard"].complete(config, run.run_dir)
        else IMAGES
        if config.shard.source
        else config.toy.n
    )
    needed = (
        images * RecordFormat(config.shard.size, len(CELEBA_ATTRIBUTES)).length
        + (config.train.keep_checkpoints + 2) * CHECKPOINT_BYTES
    )
    free = shutil.disk_usage(_existing(Path(config.runs_dir))).free
    if free < needed:
        yield Finding(
            f"key 'runs_dir': {config.runs_dir}: {free / 1e9:.3g} GB are free, shards and checkpoints may need {needed / 1e9:.3g} GB",
            True,
        )


def weights_are_there(run: Run) -> Iterator[Finding]:
    """Weights that the evaluation loads: better now than at the end of the chain."""
    for key, hint in (
        ("inception_weights", "; `tools/fetch_weights.py` fetches it on a machine with internet"),
        ("network", ""),
    ):
        weights = getattr(run.config.eval, key)
        if weights and not Path(weights).is_file():
            yield Finding(f"key 'eval.{key}': {weights}: no such file{hint}", True)


def mlflow_answers(run: Run) -> Iterator[Finding]:
    """A tracking server, if one is configured."""
    from pipeline.rundir.redact import redact
    from pipeline.tracking.mlflow_store import tracking_uri

    uri = tracking_uri(run.config)
    if not run.config.tracking.enabled or not uri.startswith(("http://", "https://")):
        return
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=MLFLOW_LIMIT_S).close()
    except urllib.error.HTTPError as error:
        if error.code == 403 or error.code >= 500:  # others only say that this server has no /health
            hint = (
                "start the server with --allowed-hosts for this name"
                if error.code == 403
                else "is the server well?"
            )
            yield Finding(f"key 'tracking.uri': {redact(uri)} answers {error.code}; {hint}", True)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        yield Finding(
            f"key 'tracking.uri': {redact(uri)} does not answer ({why}); start the server, or set tracking.enabled=false",
            True,
        )


def walltime_is_sound(run: Run) -> Iterator[Finding]:
    """The warning before the time limit, and submitit's rule of ten minutes."""
    for stage in ("train", "classifier", "eval"):
        wanted = stage_resources(run.config, stage)
        if wanted.signal_delay_s >= wanted.timeout_min * 60:
            yield Finding(
                f"key 'cluster.signal_delay_s' for stage {stage}: {wanted.signal_delay_s} s before a limit of {wanted.timeout_min} min: "
                "jobs would stop at once", True,
            )  # fmt: skip
        elif wanted.timeout_min <= 10:
            yield Finding(
                f"key 'cluster.timeout_min' for stage {stage}: {wanted.timeout_min}: in jobs of at most 10 minutes every stop, "
                f"also a preemption, counts as a time-out, of which cluster.max_timeouts={wanted.max_timeouts} are allowed", False,
            )  # fmt: skip


def batch_is_even(run: Run) -> Iterator[Finding]:
    """A global batch that does not divide by the ranks leaves some of them waiting."""
    wanted, batch = stage_resources(run.config, "train"), run.config.train.batch_size
    ranks = wanted.nodes * wanted.tasks_per_node
    even = ranks * ceil_div(batch, ranks)
    lost = 1 - batch / even
    if lost > 0:
        yield Finding(
            f"key 'train.batch_size': {batch} images over {ranks} ranks are shared unevenly: {lost:.0%} of the ranks' time is lost; "
            f"{even} would be even", False,
        )  # fmt: skip


RUN_CHECKS = (
    source_is_there, folders_are_shared, space_suffices, weights_are_there, mlflow_answers, walltime_is_sound, batch_is_even,
)  # fmt: skip


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def file_system(path: Path) -> str:
    """Type of the file system that `path` lies on."""
    found = ("", "unknown")
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if str(path).startswith(mount) and len(mount) >= len(found[0]):
            found = (mount, kind)
    return found[1]
