"""Send run directories to MLflow: `python tools/sync_mlflow.py RUN_DIR ...`; twice changes nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import exit_code
from pipeline.tracking.sync import tracker_of


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tools/sync_mlflow.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directory that holds config.yaml")
    for run_dir in parser.parse_args().run_dir:
        tracker = tracker_of(run_dir)
        tracker.push()
        print(f"{run_dir}: {tracker.address}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
