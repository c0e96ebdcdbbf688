"""Prepare one rank of a job: its variables, the port where the ranks meet, and its GPUs."""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir.files import write_text
from pipeline.runtime.ports import reserve_port
from pipeline.runtime.preempt import StopFlag, Stopped
from slurm.queue import ask
from slurm.resources import asks_for_gpus, stage_resources

if TYPE_CHECKING:
    from submitit import JobEnvironment

GPU_CHOICE = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")
PORT_WAIT_S = 300.0  # a rank's container may start minutes before rank 0's
PORT_POLL_S = 0.05


# ---- variables and port


def export_ranks(environment: JobEnvironment, stop: StopFlag) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT (all ranks).

    The pipeline reads nothing else of the cluster. CUDA_VISIBLE_DEVICES stays as it is: a rank selects its
    GPU by LOCAL_RANK.
    """
    from submitit.helpers import TorchDistributedEnvironment

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if environment.num_tasks > 1:
        os.environ["MASTER_PORT"] = str(shared_port(environment, stop))
    if environment.num_nodes == 1:
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a host's own name need not resolve


def shared_port(environment: JobEnvironment, stop: StopFlag) -> int:
    """Return a port that is free on rank 0's node (all ranks). Rank 0 tells the others by a file.

    Submitit would derive the port from the job's id. If another program has that port, every restart
    of the job fails. Raises Stopped if a stop request arrives first.
    """
    if environment.global_rank == 0:
        _held.append(reserve_port())
        port = int(_held[-1].getsockname()[1])
        write_text(port_file(environment), str(port))
        return port
    file = port_file(environment)
    give_up = time.monotonic() + PORT_WAIT_S
    while time.monotonic() < give_up:
        os.listdir(file.parent)  # makes a network file system ask its server again
        with suppress(FileNotFoundError):
            return int(file.read_text())
        if stop.requested:
            raise Stopped("before rank 0 had started")
        time.sleep(PORT_POLL_S)
    raise TimeoutError(f"Timed out waiting for rank 0, which writes its port to {file}")


def port_file(environment: JobEnvironment) -> Path:
    """Return the file with the port of this attempt; Slurm counts the requeues of a job."""
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    return Path(environment.paths.folder) / f"{environment.job_id}_port_{attempt}"


_held: list[socket.socket] = []  # open until this process ends


# ---- GPUs


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use: indices, or UUIDs of GPUs and MIG devices.

    CUDA_VISIBLE_DEVICES decides if it is set, because the user chose; otherwise nvidia-smi does. A container
    may have GPUs without nvidia-smi; then the device files are counted.
    """
    choice = os.environ.get(GPU_CHOICE)
    if choice is None:
        listed = ask("nvidia-smi", "-L")
        return _gpu_devices() if listed is None else _listed_gpus(listed)
    names = []
    for name in choice.split(","):
        if name.strip() in ("", "-1", "NoDevFiles"):  # CUDA stops reading here
            break
        names.append(name.strip())
    return list(dict.fromkeys(names))


def _gpu_devices() -> list[str]:
    """Return the indices of the GPUs whose device files are there; CUDA counts them from 0."""
    return [str(index) for index, _ in enumerate(DEVICES.glob("nvidia[0-9]*"))]


def _listed_gpus(text: str) -> list[str]:
    """Parse `nvidia-smi -L`. A GPU that is split into MIG devices is replaced by these."""
    devices: dict[str, list[str]] = {}
    index = ""
    for line in text.splitlines():
        gpu = re.match(r"GPU (\d+):", line)
        part = re.search(r"\(UUID: (MIG-[^)]+)\)", line)
        if gpu:
            index = gpu.group(1)
            devices[index] = []
        elif part and index:
            devices[index].append(part.group(1))
    names = []
    for index, parts in devices.items():
        names += parts or [index]
    return names


def choose_own_part(environment: JobEnvironment) -> None:
    """Leave a rank only its own MIG device: CUDA shows a process the first of several (each rank)."""
    names = os.environ.get(GPU_CHOICE, "").split(",")
    if any(name.startswith("MIG-") for name in names):
        os.environ[GPU_CHOICE] = names[environment.local_rank % len(names)]


def require_gpus(environment: JobEnvironment, config: RunConfig, stage: str) -> None:
    """Raise ConfigError if the stage asked for GPUs that PyTorch cannot use.

    A run never falls back to the CPU in silence.
    """
    choose_own_part(environment)
    choice = os.environ.get(GPU_CHOICE, "")
    wanted = stage_resources(config, stage)
    if environment.name() == "slurm":
        needed = int(asks_for_gpus(wanted, stage))  # a site may show each rank only its own GPU
    else:
        needed = len([name for name in choice.split(",") if name])  # set by the launcher
    if not needed:
        return
    import torch

    seen = torch.cuda.device_count()
    if seen < needed:
        raise ConfigError(
            f"key 'cluster.gpus_per_node' for stage {stage}: got {wanted.gpus_per_node}, but PyTorch "
            f"{torch.__version__} sees {seen} GPUs on {socket.gethostname()} ({GPU_CHOICE}={choice!r}); "
            "check the driver and the build of PyTorch, or set cluster.gpus_per_node=0 for the CPU"
        )
