"""Check one run before its launch: paths, space, weights, the tracker's store, time limits, batch."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.config.load import flatten
from pipeline.config.paths import is_remote
from pipeline.config.schema import PHASES, RunConfig
from pipeline.data.encoded.remote import is_url
from pipeline.data.sources.base import DatasetInfo, require_sizes_fit
from pipeline.data.sources.celeba_names import CELEBA_INFO
from pipeline.data.sources.registry import changed_labels, recognise
from pipeline.errors import ConfigError, DataError
from pipeline.rundir.layout import source_path, source_place
from pipeline.runtime.split import ceil_div
from pipeline.stages import STAGES
from pipeline.tracking.sync import make_tracker
from slurm.chain import Run
from slurm.preflight.sizes import checkpoint_bytes, shards_bytes, small_images, stored_bytes
from slurm.resources import asks_for_gpus, gpu_request, idle_gpus, stage_resources

NETWORK_FILE_SYSTEMS = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "wekafs", "panfs", "pvfs2",
    "orangefs", "cifs", "smb3", "afs", "glusterfs", "fuse.glusterfs", "fuse.juicefs", "fuse.cephfs",
    "virtiofs", "9p", "daos", "quobyte", "gfs2", "ocfs2",
)  # fmt: skip
MOUNTS = Path("/proc/self/mounts")
OCTAL = re.compile(r"\\(\d{3})")  # how the kernel writes a blank, tab, newline or backslash of a folder
BATCHES = (*PHASES, "classifier")  # stages with a global batch
LONG_STAGES = ("train", "classifier", "eval")  # with a time limit that may stop them
SMALL_SHARE = 32  # with fewer images in a step a GPU mostly waits for kernel launches and communication
SHORT_JOB_MIN = 10  # submitit counts every stop of a job as short as this as a time-out


class Finding(NamedTuple):
    """One thing to change, and whether the launch must stop for it."""

    text: str
    fatal: bool


def source_is_there(run: Run) -> Iterator[Finding]:
    """The source holds a known data set, and its images are as large as the shards need them.

    CelebA's images have one size that is known, so they are not opened; of others a few are.
    """
    if STAGES["shard"].complete(run.config, run.run_dir):
        warning = changed_labels(run.config)
        if warning:
            yield Finding(warning, False)
        return  # the shards are there, so nothing reads the source any more
    info: object = CELEBA_INFO
    try:
        if run.config.shard.source:
            kind = recognise(source_place(run.config), run.config.shard.source_kind)
            info = getattr(kind, "info", None)
        if isinstance(info, DatasetInfo):
            require_sizes_fit(run.config.shard, info)
            return
        small = small_images(run.config)
        if small:
            yield Finding(small, True)
    except DataError as error:
        yield Finding(f"key 'shard.source': {error}", True)
    except ConfigError as error:
        yield Finding(str(error), True)


def folders_can_be_written(run: Run) -> Iterator[Finding]:
    """The runs directory and the folder of the run can be written."""
    for key, path in (("runs_dir", Path(run.config.runs_dir)), ("--run-dir", run.run_dir)):
        folder = _existing(path)
        if not folder.is_dir():
            yield Finding(f"key '{key}': {path}: {folder} is a file, expected a folder", True)
        elif not os.access(folder, os.W_OK):
            yield Finding(f"key '{key}': {folder}: cannot be written", True)


def folders_are_shared(run: Run) -> Iterator[Finding]:
    """Judged by the type of their file systems, nodes can see the runs directory and the data."""
    folder = _existing(Path(run.config.runs_dir))
    data = ("shard.source", folder if is_remote(run.config.shard.source) else source_path(run.config))
    if run.config.data.shards:
        data = ("data.shards", Path(run.config.data.shards))
    for key, path in (("runs_dir", folder), data):
        kind = file_system(path)
        if path.exists() and kind not in NETWORK_FILE_SYSTEMS:
            yield Finding(
                f"key '{key}': {path} is on {kind}, a local file system; every node must see it at this path",
                False,
            )


def space_suffices(run: Run) -> Iterator[Finding]:
    """There is room for shards and checkpoints."""
    config = run.config
    shards = shards_bytes(run)
    needed = shards + (config.train.keep_checkpoints + 2) * checkpoint_bytes(run)
    free = shutil.disk_usage(_existing(Path(config.runs_dir))).free
    if free < needed:
        yield Finding(
            f"key 'runs_dir': {config.runs_dir}: {free / 1e9:.3g} GB are free, "
            f"but shards and checkpoints may need {needed / 1e9:.3g} GB",
            True,
        )


def node_has_room(run: Run) -> Iterator[Finding]:
    """What is read through a node's own disk fits its limit. The disk itself is seen only from the node."""
    data = run.config.data
    if not is_url(data.tars):
        return
    stored = stored_bytes(run)
    if not data.cache_dir:
        yield Finding(f"key 'data.cache_dir': is empty, but {data.tars} is read through a folder there", True)
    elif stored > data.cache_gb * 1e9:
        share = data.cache_gb * 1e9 / stored
        text = f"holds {share:.0%} of the {stored / 1e9:.3g} GB of shards, so every epoch fetches them again"
        yield Finding(f"key 'data.cache_gb': {data.cache_gb:g}: {text}", False)


def weights_are_there(run: Run) -> Iterator[Finding]:
    """Weights that training or evaluation load exist: better to know now than at the end of the chain."""
    start = run.config.train.init_from
    if start and not (Path(start) / "config.yaml").is_file():
        yield Finding(f"key 'train.init_from': {start}: is no run directory (no config.yaml in it)", True)
    hints = {
        "eval.inception_weights": "; `tools/fetch_weights.py` fetches it on a machine with internet access",
        "eval.network": "",
        "model.losses.perceptual.network": "",
        "tune.losses.perceptual.network": "",
    }
    values = flatten(run.config)
    for key, hint in hints.items():
        if values[key] and not Path(values[key]).is_file():
            yield Finding(f"key '{key}': {values[key]}: no such file{hint}", True)


def tracker_answers(run: Run) -> Iterator[Finding]:
    """The tracker's store answers, if one is configured."""
    problem = make_tracker(run.run_dir, run.config).problem()
    if problem:
        yield Finding(problem, True)


def walltime_leaves_time(run: Run) -> Iterator[Finding]:
    """The warning before the time limit leaves time to work."""
    for stage in LONG_STAGES:
        wanted = stage_resources(run.config, stage)
        if wanted.signal_delay_s >= wanted.timeout_min * 60:
            yield Finding(
                f"key 'cluster.signal_delay_s' for stage {stage}: {wanted.signal_delay_s} s before a limit "
                f"of {wanted.timeout_min} min: jobs would stop at once",
                True,
            )


def walltime_suits_submitit(run: Run) -> Iterator[Finding]:
    """The time limit suits submitit's rule, which takes the stop of a short job for a time-out."""
    for stage in LONG_STAGES:
        wanted = stage_resources(run.config, stage)
        if wanted.signal_delay_s < wanted.timeout_min * 60 <= SHORT_JOB_MIN * 60:
            yield Finding(
                f"key 'cluster.timeout_min' for stage {stage}: {wanted.timeout_min}: in jobs of at most "
                f"{SHORT_JOB_MIN} minutes every stop, also a preemption, counts as a time-out; "
                f"cluster.max_timeouts={wanted.max_timeouts} are allowed",
                False,
            )


def batch_fits(run: Run) -> Iterator[Finding]:
    """The global batch of each stage suits its ranks, and each GPU has a rank."""
    for stage in BATCHES:
        wanted = stage_resources(run.config, stage)
        ranks = wanted.nodes * wanted.tasks_per_node
        for text in batch_warnings(run.config, ranks, asks_for_gpus(wanted, stage), stage):
            yield Finding(text, False)
        for text in idle_gpus(wanted, stage, gpu_request(wanted, stage).count):
            yield Finding(text, False)


def batch_warnings(config: RunConfig, ranks: int, on_gpus: bool, stage: str = "train") -> list[str]:
    """Return warnings if a global batch is uneven over the ranks or leaves a GPU too little to do.

    A stage that has no global batch, or that is left out, has none.
    """
    if stage not in BATCHES:
        return []
    values = flatten(config)
    if values.get(f"{stage}.images") == 0:
        return []
    batch = values[f"{stage}.batch_size"]
    found = []
    even = ranks * ceil_div(batch, ranks)
    lost = 1 - batch / even
    if lost > 0:
        found.append(
            f"key '{stage}.batch_size': {batch} images over {ranks} ranks are shared unevenly: "
            f"{lost:.0%} of the ranks' time is lost; {even} would be even"
        )
    if on_gpus and batch < SMALL_SHARE * ranks:
        found.append(
            f"key '{stage}.batch_size': {batch} images over {ranks} GPUs are {batch / ranks:.3g} per GPU and "
            f"step; below {SMALL_SHARE} a GPU is mostly idle: use {max(1, batch // SMALL_SHARE)} GPUs, or "
            f"{stage}.batch_size={SMALL_SHARE * ranks}"
        )
    return found


EVERYWHERE = (
    source_is_there,
    folders_can_be_written,
    space_suffices,
    node_has_room,
    weights_are_there,
    tracker_answers,
    walltime_leaves_time,
)
ON_A_CLUSTER = (*EVERYWHERE, folders_are_shared, walltime_suits_submitit, batch_fits)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def file_system(path: Path) -> str:
    """Return the type of the file system that `path` is on."""
    deepest = Path()
    found = "unknown"
    for line in MOUNTS.read_text().splitlines():
        _, written, kind, *_ = line.split()
        mount = Path(OCTAL.sub(lambda code: chr(int(code[1], 8)), written))
        if path.is_relative_to(mount) and len(mount.parts) >= len(deepest.parts):
            deepest = mount
            found = kind
    return found
