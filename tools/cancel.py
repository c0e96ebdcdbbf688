"""Cancel the queued and running jobs of a launch: `python tools/cancel.py RUN_DIR ...`.

Running jobs save their work first. On a cluster the launch's last job still updates MLflow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import exit_code
from slurm.executors import EXECUTORS, executor_named
from slurm.status import unfinished


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tools/cancel.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directory that holds config.yaml")
    args = parser.parse_args()
    jobs = [job for run_dir in args.run_dir for job in unfinished(run_dir.absolute())]
    lines = []
    for name in EXECUTORS:
        own = [job for job in jobs if job["executor"] == name]
        if own:
            lines += executor_named(name).cancel(own)
    print("\n".join(lines) or "no job of these runs is queued or running")


if __name__ == "__main__":
    sys.exit(exit_code(main))
