"""Send run directories to MLflow. To send one twice changes nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import add_run_dirs, parser
from pipeline.config.schema import RunConfig
from pipeline.errors import exit_code
from pipeline.rundir.record import run_config
from pipeline.tracking.address import experiment_name, with_store
from pipeline.tracking.sync import make_tracker

EXAMPLES = """\
  python tools/sync_mlflow.py runs/sigma_cvae runs/sigma_cvae_nf
  python tools/sync_mlflow.py runs/sigma_cvae --uri http://mlflow.example:5000 --experiment faces
"""


def sent_to(config: RunConfig, uri: str | None, experiment: str | None) -> RunConfig:
    """Return the configuration with another store or experiment, where these are given.

    MLflow's variables do not count: they belong to launches.
    """
    tracking = replace(config.tracking, experiment=experiment or experiment_name(config))
    if not uri:
        return replace(config, tracking=tracking)
    return with_store(replace(config, tracking=replace(tracking, enabled=True, uri=uri)))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    words = parser("tools/sync_mlflow.py", __doc__, EXAMPLES)
    add_run_dirs(words)
    words.add_argument("--uri", metavar="URI", help="this store instead of that of each run")
    words.add_argument("--experiment", metavar="NAME", help="this experiment instead of that of each run")
    args = words.parse_args(argv)
    for run_dir in args.run_dir:
        tracker = make_tracker(run_dir, sent_to(run_config(run_dir), args.uri, args.experiment))
        tracker.push()
        print(f"{run_dir}: {tracker.address}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
