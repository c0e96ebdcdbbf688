"""Send run directories to MLflow: `python tools/sync_mlflow.py RUN_DIR ...`; running it again changes nothing."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import exit_code
from pipeline.rundir.record import run_config
from pipeline.rundir.redact import redact
from pipeline.tracking.mlflow_store import tracking_uri
from pipeline.tracking.mlflow_sync import Feeder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tools/sync_mlflow.py", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="run directory that holds config.yaml")
    for run_dir in parser.parse_args().run_dir:
        config = run_config(run_dir)
        Feeder(run_dir.absolute()).push()
        print(
            f"{run_dir}: {redact(tracking_uri(config)) if config.tracking.enabled else 'tracking.enabled is false, nothing sent'}"
        )


if __name__ == "__main__":
    sys.exit(exit_code(main))
