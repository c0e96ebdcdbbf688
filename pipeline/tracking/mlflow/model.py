"""An exported model in MLflow: logged with its run, registered under a name, ready to be served."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cvae
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError
from pipeline.rundir.record import read_json, run_config
from pipeline.rundir.redact import redact
from pipeline.tracking.address import store_uri
from pipeline.tracking.base import TrackingError
from pipeline.tracking.mlflow.health import first_line, store_errors
from pipeline.tracking.mlflow.store import database_lock, open_client
from pipeline.tracking.sync import tracker_of

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

SERVED = Path(__file__).with_name("served.py")
NEEDED = ("torch", "safetensors", "pillow", "mlflow")  # of the environment that serves
DEFAULT_STORE = "MLFLOW_TRACKING_URI"
PORT = 5001  # MLflow's own interface listens at 5000


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    store: str  # its address, without credentials

    @property
    def uri(self) -> str:
        """Return the address that `mlflow models` and `mlflow.pyfunc.load_model` understand."""
        return f"models:/{self.name}/{self.version}"

    @property
    def command(self) -> str:
        """Return the command that serves this version."""
        store = f"MLFLOW_TRACKING_URI={shlex.quote(self.store)}"
        return f"{store} mlflow models serve -m {shlex.quote(self.uri)} --env-manager local -p {PORT}"


def register(run_dir: Path, folder: Path, name: str) -> Registered:
    """Log the export in `folder` as the model of a run, and register it under `name` as a new version.

    The run is sent to its store first. Raises ConfigError if the run is not tracked, and TrackingError if
    the store refuses.
    """
    config = run_config(run_dir)
    if not config.tracking.enabled or config.tracking.name != "mlflow":
        raise ConfigError(f"{run_dir}: is not tracked in MLflow; launch it with tracking.enabled=true")
    tracker_of(run_dir).push()
    uri = store_uri(config)
    note = read_json(run_dir / "mlflow.json")
    try:
        with database_lock(uri), _default_store(uri):
            client = open_client(uri)
            run = client.get_run(note["run_id"])
            version = _log(client, run, folder, name, config)
    except store_errors() as error:
        raise TrackingError(
            f"MLflow store {redact(uri)} did not take the model: {first_line(error)}; {folder} is complete"
        ) from None
    return Registered(name, version, redact(uri))


@contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's default store: its registry looks there for logged models, whatever the client."""
    before = os.environ.get(DEFAULT_STORE)
    os.environ[DEFAULT_STORE] = uri
    try:
        yield
    finally:
        del os.environ[DEFAULT_STORE]
        if before is not None:
            os.environ[DEFAULT_STORE] = before


def _log(client: MlflowClient, run: Run, folder: Path, name: str, config: RunConfig) -> str:
    """Log the model, register it, and return the version."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    card = read_json(folder / "model.json")
    origin = {key: str(value) for key, value in card["provenance"].items()}
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=name,
        source_run_id=run.info.run_id,
        params=origin,
        tags={"variant": config.name},
        model_type="cvae",
    )
    with tempfile.TemporaryDirectory() as place:
        _save(Path(place), folder, str(logged.model_id), run.info.run_id)
        client.log_model_artifacts(logged.model_id, str(Path(place) / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    step = int(card["provenance"]["step"])
    client.log_outputs(run.info.run_id, models=[LoggedModelOutput(logged.model_id, step)])
    try:
        client.create_registered_model(name, description="Draws images with attributes; see its run.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{logged.model_id}"
    made = client.create_model_version(name, source, run.info.run_id, model_id=logged.model_id)
    return str(made.version)


def _save(place: Path, folder: Path, model_id: str, run_id: str) -> None:
    """Write a model in MLflow's format to `place`/model: the two files, cvae, and the code that serves."""
    from mlflow.models import Model
    from mlflow.pyfunc import save_model

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    export = place / "export"
    export.mkdir()
    for file in ("model.safetensors", "model.json"):
        shutil.copyfile(folder / file, export / file)
    package = place / "cvae"
    shutil.copytree(Path(cvae.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example was not provided")
        save_model(
            str(place / "model"),
            python_model=str(SERVED),
            artifacts={"model": str(export)},
            code_paths=[str(package)],
            signature=_signature(read_json(export / "model.json")["sampling"]),
            pip_requirements=[f"{need}=={importlib.metadata.version(need)}" for need in NEEDED],
            mlflow_model=Model(model_uuid=model_id, model_id=model_id, run_id=run_id),
        )


def _signature(sampling: dict[str, float]) -> ModelSignature:
    """Return what goes in and out: a request in words, a PNG image as base64, and the settings.

    The model draws as it was evaluated (`sampling`) unless it is told otherwise.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    settings: list[Any] = [
        ParamSpec("seed", "long", 0),
        ParamSpec("temperature", "double", 1.0),
        ParamSpec("guidance", "double", float(sampling["guidance"])),
        ParamSpec("margin", "double", float(sampling["margin"])),
        ParamSpec("tries", "long", int(sampling.get("tries", 1))),
    ]
    words = Schema([ColSpec("string", "request")])
    pictures = Schema([ColSpec("string", "png")])
    return ModelSignature(inputs=words, outputs=pictures, params=ParamSchema(settings))
