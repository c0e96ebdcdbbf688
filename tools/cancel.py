"""Cancel the queued and running jobs of runs.

Running jobs save their work first. On a cluster the launch's last job still updates MLflow.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import add_run_dirs, parser
from pipeline.errors import exit_code
from pipeline.rundir.record import require_run
from slurm.executors import EXECUTORS, executor_named
from slurm.status import unfinished

EXAMPLES = """\
  python tools/cancel.py runs/sigma_cvae_nf
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises a UserError."""
    words = parser("tools/cancel.py", __doc__, EXAMPLES)
    add_run_dirs(words)
    args = words.parse_args(argv)
    for run_dir in args.run_dir:
        require_run(run_dir)
    jobs = [job for run_dir in args.run_dir for job in unfinished(run_dir.absolute())]
    lines = []
    for name in EXECUTORS:
        own = [job for job in jobs if job["executor"] == name]
        if own:
            lines += executor_named(name).cancel(own)
    print("\n".join(lines) or "no job of these runs is queued or running")


if __name__ == "__main__":
    sys.exit(exit_code(main))
