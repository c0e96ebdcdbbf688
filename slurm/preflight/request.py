"""Check the request of one job: partition, time limit, and what `sbatch --test-only` says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator

from pipeline.config.schema import ClusterConfig
from slurm.chain import Step
from slurm.executors.cluster import script_of
from slurm.preflight.checks import Finding
from slurm.queue import nodes_of, time_limit_min, unknown_partition
from slurm.resources import stage_resources

SBATCH_LIMIT_S = 20
ASKED_KEYS = (
    "partition", "account", "qos", "constraint", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task",
    "mem_gb", "timeout_min",
)  # fmt: skip
SBATCH_PREFIX = re.compile(r"^(sbatch|allocation failure): (error: )?")


def slurm_accepts(group: list[Step]) -> Iterator[Finding]:
    """Pass the script to `sbatch --test-only`; check partition and time limit, which sbatch may overlook."""
    stage = group[0].stage
    wanted = stage_resources(group[0].run.config, stage)
    unknown = unknown_partition(wanted.partition) if wanted.partition else ""
    if unknown:
        yield Finding(f"key 'cluster.partition' for stage {stage}: {unknown}", True)
        return
    limit = time_limit_min(wanted.partition)
    if wanted.timeout_min > limit:  # sbatch may accept the job and let it wait for ever
        yield Finding(
            f"key 'cluster.timeout_min' for stage {stage}: {wanted.timeout_min}: the partition's limit is "
            f"{limit:.0f}; a job that reaches its own limit saves, is requeued and goes on",
            True,
        )
    refusal = _test_only(script_of(group[:1], None))
    if refusal:
        yield Finding(
            f"stage {stage}: Slurm refuses the job: {refusal}; {_asked(wanted)}; "
            f"the partition has {nodes_of(wanted.partition)}",
            True,
        )


def _test_only(script: str) -> str:
    """Return why sbatch would refuse a script, or ""."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script.replace("#SBATCH --chdir", "# chdir"))  # the copy of the code does not exist yet
        file.flush()
        command = ["sbatch", "--test-only", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SBATCH_LIMIT_S)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines() or ["no reason given"]
    return SBATCH_PREFIX.sub("", lines[-1])


def _asked(wanted: ClusterConfig) -> str:
    given = [f"cluster.{key}={getattr(wanted, key)}" for key in ASKED_KEYS if getattr(wanted, key)]
    return f"asked for {', '.join(given)}"
