"""Find out before a submission what would go wrong. Each check yields findings: problems or warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.errors import ConfigError
from slurm.chain import Chain, Run, batches
from slurm.preflight.checks import RUN_CHECKS, Finding
from slurm.preflight.request import slurm_accepts
from slurm.queue import ask


def warnings_before_launch(runs: list[Run], chain: Chain) -> list[str]:
    """Check requests, paths, space, tracking and limits, and return the warnings.

    Raises ConfigError with every problem, one a line.
    """
    if ask("sinfo", "-h") is None:
        raise ConfigError(
            "Slurm does not answer: sbatch is installed here, but `sinfo` fails; use a login node of the "
            "cluster, or wait until its controller is back"
        )
    checks: list[Callable[[], Iterator[Finding]]] = []
    for run in runs:
        checks += [partial(check, run) for check in RUN_CHECKS]
    checks += [partial(slurm_accepts, group) for group in batches(chain)]
    with ThreadPoolExecutor(16) as pool:  # most of the time is spent waiting for answers
        answers = list(pool.map(lambda check: list(check()), checks))
    found = dict.fromkeys(finding for answer in answers for finding in answer)
    problems = [finding.text for finding in found if finding.fatal]
    if problems:
        head = "nothing was submitted (--no-preflight skips these checks):"
        raise ConfigError("\n  ".join([head, *problems]))
    return [finding.text for finding in found]
