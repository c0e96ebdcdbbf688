"""Send run directories to MLflow. To send one twice changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import add_run_dirs, parser
from pipeline.errors import exit_code
from pipeline.tracking.sync import tracker_of

EXAMPLES = """\
  python tools/sync_mlflow.py runs/sigma_cvae runs/sigma_cvae_nf
"""


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    words = parser("tools/sync_mlflow.py", __doc__, EXAMPLES)
    add_run_dirs(words)
    for run_dir in words.parse_args(argv).run_dir:
        tracker = tracker_of(run_dir)
        tracker.push()
        print(f"{run_dir}: {tracker.address}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
