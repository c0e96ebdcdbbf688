"""Find out before a launch what would go wrong. Each check yields findings: problems or warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from pipeline.errors import ConfigError
from slurm.chain import Chain, Run, batches
from slurm.preflight.chain_checks import OF_A_CHAIN, torch_sees_gpus
from slurm.preflight.checks import EVERYWHERE, ON_A_CLUSTER, Finding
from slurm.preflight.request import slurm_accepts
from slurm.queue import ask

Check = Callable[[], Iterator[Finding]]


def check_this_machine(runs: list[Run], chain: Chain) -> list[str]:
    """Check paths, space, GPUs and the tracker's store, and return the warnings.

    Raises ConfigError with every problem, one a line.
    """
    checks = _of_runs(runs, EVERYWHERE)
    checks += [partial(check, chain) for check in (*OF_A_CHAIN, torch_sees_gpus)]
    return _warnings(checks, "nothing was started")


def check_cluster(runs: list[Run], chain: Chain) -> list[str]:
    """Check requests, paths, space, tracking and limits, and return the warnings.

    Raises ConfigError with every problem, one a line.
    """
    if ask("sinfo", "-h") is None:
        raise ConfigError(
            "Slurm does not answer: sbatch is installed here, but `sinfo` fails; use a login node of the "
            "cluster, or wait until its controller is back"
        )
    checks = _of_runs(runs, ON_A_CLUSTER)
    checks += [partial(check, chain) for check in OF_A_CHAIN]
    checks += [partial(slurm_accepts, group) for group in batches(chain)]
    return _warnings(checks, "nothing was submitted")


def _of_runs(runs: list[Run], kinds: tuple[Callable[[Run], Iterator[Finding]], ...]) -> list[Check]:
    return [partial(check, run) for run in runs for check in kinds]


def _warnings(checks: list[Check], outcome: str) -> list[str]:
    """Run the checks side by side and return the warnings. Raises ConfigError with all problems."""
    with ThreadPoolExecutor(16) as pool:  # most of the time is spent waiting for answers
        answers = list(pool.map(lambda check: list(check()), checks))
    found = dict.fromkeys(finding for answer in answers for finding in answer)
    problems = [finding.text for finding in found if finding.fatal]
    if len(problems) == 1:
        raise ConfigError(f"{problems[0]}; {outcome} (--no-preflight skips this check)")
    if problems:
        raise ConfigError("\n  ".join([f"{outcome} (--no-preflight skips these checks):", *problems]))
    return [finding.text for finding in found if not finding.fatal]
