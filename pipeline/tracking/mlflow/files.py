"""The files that MLflow keeps of a run: configuration, report, pictures, evaluations and logs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from pipeline.config.paths import database_file
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.rundir.record import Evaluation, read_json
from pipeline.rundir.redact import redact
from pipeline.tracking.base import TrackingError
from pipeline.tracking.mlflow.health import first_line

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

NOTE = "mlflow.json"  # which run of which store a directory is, and which files were sent
MOST_OF_A_LOG = 2_000_000  # bytes, the last ones
_LOGGED_IMAGE = re.compile(r"[+%]step[+%](\d+)[+%].*\.webp$")  # the last file that MLflow writes of an image


@dataclass(frozen=True)
class FileSender:
    """Sends the files of one run directory; `uri` is the store's address."""

    client: MlflowClient
    run: Run
    run_dir: Path
    uri: str

    def send(self, children: list[tuple[Evaluation, str]], with_logs: bool) -> None:
        """Send what changed since it was sent; `children` are evaluations and their run ids.

        `with_logs`: nothing writes to the logs any more. Raises TrackingError that names the folder of
        files if it cannot be written.
        """
        artifacts = str(self.run.info.artifact_uri)
        self._require_folder(artifacts)
        try:
            self._send_changed_files(children, with_logs)
            self._send_progress_pictures()
        except Exception as error:
            # MLflow raises many kinds here: of the disk, of a bucket's library, an ImportError without one.
            raise TrackingError(
                f"MLflow store {redact(self.uri)} holds all numbers, but no files could be sent to "
                f"{redact(artifacts)}: {first_line(error)}; start the server with --serve-artifacts, or give "
                "this machine the right to write there, "
                f"then `python tools/sync_mlflow.py {self.run_dir}` sends them"
            ) from None

    def _require_folder(self, artifacts: str) -> None:
        """Raise TrackingError if a SQLite store keeps its files in a runs folder that is gone."""
        url = urlsplit(artifacts)
        if database_file(self.uri) is None or url.scheme != "file":
            return
        folder = Path(unquote(url.path))
        if len(folder.parents) > 3 and not folder.parents[3].is_dir():
            raise TrackingError(
                f"MLflow store {redact(self.uri)} holds all numbers, but no files: it keeps them in "
                f"{folder.parents[3]}, which is gone (were the runs moved?); a link from there helps"
            )

    def _send_changed_files(self, children: list[tuple[Evaluation, str]], with_logs: bool) -> None:
        wanted = [*self._wanted_files(children), *(self._logs() if with_logs else [])]
        for file, run_id, folder in wanted:
            note = read_json(self.run_dir / NOTE)
            stat = file.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
            name = f"{run_id}/{file.relative_to(self.run_dir)}"
            if note["sent"].get(name) == state:
                continue
            if file.name == "config.yaml" or file.suffix == ".log":
                self.client.log_text(run_id, redact(_last_text(file)), f"{folder}{file.name}")
            elif file.is_dir():
                self._send_folder(run_id, file)
            else:
                self.client.log_artifact(run_id, str(file), folder or None)
            note["sent"][name] = state
            write_json(self.run_dir / NOTE, note)

    def _send_folder(self, run_id: str, folder: Path) -> None:
        """Send the files of a folder one by one: MLflow's `log_artifacts` fails on files of a colleague."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                place = file.parent.relative_to(folder)
                self.client.log_artifact(run_id, str(file), None if place == Path() else str(place))

    def _wanted_files(self, children: list[tuple[Evaluation, str]]) -> Iterator[tuple[Path, str, str]]:
        """Yield (file or folder, run id, folder in the run's artifacts)."""
        parent_id = self.run.info.run_id
        for name in ("config.yaml", "report.html"):
            file = self.run_dir / name
            if file.exists():
                yield file, parent_id, ""
        for evaluation, child_id in children:
            yield evaluation.folder, child_id, ""
            for picture in evaluation.pictures:
                yield picture, parent_id, f"eval_{evaluation.number}"

    def _logs(self) -> Iterator[tuple[Path, str, str]]:
        """Yield the ranks' logs."""
        for file in sorted((self.run_dir / "logs").glob("*/rank*.log")):
            yield file, self.run.info.run_id, f"logs/{file.parent.name}/"

    def _send_progress_pictures(self) -> None:
        """Send samples of fixed noise as images with a step, each once; MLflow shows them with a slider."""
        drawn = layout.progress_pictures(self.run_dir)
        if not drawn:
            return
        from PIL import Image

        run_id = self.run.info.run_id
        there = set()
        for file in self.client.list_artifacts(run_id, "images"):
            found = _LOGGED_IMAGE.search(file.path)
            if found:
                there.add(int(found[1]))
        for step, picture in drawn:
            if step not in there:
                time_ms = int(picture.stat().st_mtime * 1000)
                self.client.log_image(
                    run_id, Image.open(picture), key="samples", step=step, timestamp=time_ms
                )


def _last_text(file: Path) -> str:
    """Return the end of a text file; a log may be long."""
    with open(file, "rb") as opened:
        opened.seek(max(0, file.stat().st_size - MOST_OF_A_LOG))
        return opened.read().decode(errors="replace")
