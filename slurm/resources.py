"""The resources of each job: nodes, processes, GPUs, memory and time."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from pipeline.config.load import resources
from pipeline.config.schema import ClusterConfig, RunConfig
from pipeline.config.suggest import suggest
from pipeline.errors import ConfigError
from pipeline.stages import STAGES
from slurm.executors import executor_named

FINISH = "finish"  # the last job of a launch; not a stage, because it belongs to several runs
SINGLE_TASK = ("shard", FINISH)  # one task without a GPU
AT_LEAST_ONE = ("nodes", "tasks_per_node", "cpus_per_task", "timeout_min", "jobs")
# A stage without a GPU does not inherit these: they describe the GPU jobs.
GPU_KEYS = ("constraint", "mem_gb")
GPU_OPTIONS = re.compile(r"(gres|tres|gpus?|mem|constraint|cpus-per-gpu|ntasks-per-gpu)(-.*)?")
GPU_RESOURCE = re.compile(r"(gres[:/])?(gpu|mps|shard)\b|mem=")  # an item of --gres or --tres-per-task
ASKS_FOR_GPUS = re.compile(r"gpus(-per-(node|task|socket))?|(gres|tres-per-\w+)=.*gpu.*")
GPU_REQUEST = re.compile(r"(?P<gres>gpu:)?((?P<type>[\w.-]+):)?(?P<count>\d+)")
ONE_GPU = re.compile(r"gpu(:[A-Za-z][\w.-]*)?")  # Slurm reads a GRES without a number as one


def require_stage(name: str, where: str) -> None:
    """Raise ConfigError with the nearest name for an unknown stage; `where`: its key or option."""
    if name not in STAGES:
        hint = suggest(name, STAGES)
        raise ConfigError(f"{where}: unknown stage {name!r}, expected one of {', '.join(STAGES)}{hint}")


def stage_resources(config: RunConfig, stage: str) -> ClusterConfig:
    """Return what one stage asks for.

    Raises ConfigError that names the key if the executor cannot provide it.
    """
    for name in config.cluster.stages:
        if name != FINISH:
            require_stage(name, "key 'cluster.stages'")
    wanted = resources(config.cluster, stage)
    wanted = dataclasses.replace(wanted, extra_sbatch=_hyphenated(wanted.extra_sbatch))
    if stage in SINGLE_TASK:
        wanted = _without_gpus(wanted, config.cluster.stages.get(stage) or {})
    for key in AT_LEAST_ONE:
        value = getattr(wanted, key)
        if value < 1:
            raise ConfigError(f"key 'cluster.{key}' for stage {stage}: got {value}, expected at least 1")
    if wanted.jobs > 1 and not (stage in STAGES and STAGES[stage].splits):
        raise ConfigError(
            f"key 'cluster.jobs' for stage {stage}: got {wanted.jobs}, but only the shard stage can be split"
        )
    if wanted.nodes > 1 and not executor_named(wanted.executor).many_nodes:
        raise ConfigError(
            f"key 'cluster.nodes' for stage {stage}: got {wanted.nodes}, "
            f"but executor '{wanted.executor}' has one node"
        )
    if wanted.gpus_per_node != "auto":
        gpu_request(wanted, stage)
    return wanted


def _hyphenated(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of sbatch under the names that sbatch has: mem_per_gpu is mem-per-gpu."""
    return {key.lstrip("-").replace("_", "-"): value for key, value in options.items()}


def _without_gpus(wanted: ClusterConfig, own: dict[str, object]) -> ClusterConfig:
    """One task, and only those GPU-related settings that the stage states for itself."""
    fresh = ClusterConfig()
    dropped = {key: getattr(fresh, key) for key in GPU_KEYS if key not in own}
    own_options = own.get("extra_sbatch") or {}
    assert isinstance(own_options, dict)
    stated = _hyphenated(own_options)
    options = {}
    for key, value in wanted.extra_sbatch.items():
        if key in stated or value is None or not GPU_OPTIONS.fullmatch(key):
            options[key] = value
        elif rest := _besides_gpus(key, value):
            options[key] = rest
    return dataclasses.replace(
        wanted, nodes=1, tasks_per_node=1, gpus_per_node=0, extra_sbatch=options, **dropped
    )


def _besides_gpus(key: str, value: str) -> str:
    """Return what a GPU option of sbatch asks for besides GPUs and their memory, or ""."""
    if not key.startswith(("gres", "tres")) or "bind" in key:
        return ""
    return ",".join(item for item in value.split(",") if not GPU_RESOURCE.match(item))


@dataclass(frozen=True)
class GpuRequest:
    """The GPUs of one node: how many, of which type, and whether Slurm is asked by `--gres`."""

    count: int
    type: str = ""
    gres: bool = False


def counted(n: int, one: str, many: str) -> str:
    """Return "1 node" or "2 nodes"."""
    return f"{n} {one if n == 1 else many}"


def gpu_request(wanted: ClusterConfig, stage: str) -> GpuRequest:
    """Parse `gpus_per_node`: 4, a100:4, gpu:4 or gpu:a100:4. Raises ConfigError for anything else."""
    value = wanted.gpus_per_node
    written = str(value)
    found = GPU_REQUEST.fullmatch(f"{written}:1" if ONE_GPU.fullmatch(written) else written)
    if not found:
        raise ConfigError(
            f"key 'cluster.gpus_per_node' for stage {stage}: got {value!r}, expected a number (4), "
            "a type and a number (a100:4), a GRES (gpu:a100:4), or auto with executor 'local'"
        )
    return GpuRequest(int(found["count"]), found["type"] or "", bool(found["gres"]))


def asks_for_gpus(wanted: ClusterConfig, stage: str) -> bool:
    """Whether a stage asks for GPUs, by `gpus_per_node` or by an option of sbatch."""
    options = [f"{key}={value}" for key, value in wanted.extra_sbatch.items() if value]
    by_option = [text for text in options if ASKS_FOR_GPUS.match(text)]
    return bool(by_option) or gpu_request(wanted, stage).count > 0


def require_a_gpu_each(wanted: ClusterConfig, stage: str, count: int) -> None:
    """Raise ConfigError if ranks would share a GPU; `count`: GPUs of a node, 0 for the CPU."""
    if count and wanted.tasks_per_node > count:
        raise ConfigError(
            f"key 'cluster.tasks_per_node' for stage {stage}: got {wanted.tasks_per_node} ranks for "
            f"{count} GPUs (cluster.gpus_per_node); every rank needs a GPU of its own"
        )


def idle_gpus(wanted: ClusterConfig, stage: str, count: int) -> list[str]:
    """Return a warning if a node gets more GPUs than ranks."""
    if count <= wanted.tasks_per_node:
        return []
    return [
        f"key 'cluster.tasks_per_node' for stage {stage}: {wanted.tasks_per_node} ranks leave "
        f"{count - wanted.tasks_per_node} of {count} GPUs (cluster.gpus_per_node) idle; "
        f"cluster.tasks_per_node={count} would use all"
    ]
