"""Cancel what is queued or runs of a launch: `python tools/cancel.py RUN_DIR ...`; its finishing job then tells MLflow and ends."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import UserError, exit_code
from slurm import ledger
from slurm.chain import FINISH


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tools/cancel.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+")
    run_dirs = [run_dir.absolute() for run_dir in parser.parse_args().run_dir]
    ids = [job["id"] for run_dir in run_dirs for job in ledger.unfinished(run_dir) if job["stage"] != FINISH]
    if not ids:
        print("nothing is queued and nothing runs")
        return
    done = subprocess.run(["scancel", *ids], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"scancel {' '.join(ids)}: {done.stderr.strip()}")
    print(f"cancelled: {' '.join(ids)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
