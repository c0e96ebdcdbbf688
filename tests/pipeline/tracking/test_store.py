"""Which store a run has: addresses in every spelling, and MLflow's own variables."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import requests

from pipeline.config.load import dump, load
from pipeline.config.paths import database_file
from pipeline.errors import ConfigError
from pipeline.tracking.address import experiment_name, store_uri, with_store
from pipeline.tracking.base import TrackingError
from pipeline.tracking.mlflow.store import open_client
from pipeline.tracking.sync import make_tracker


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)


@pytest.mark.parametrize(
    "written,file",
    [
        ("sqlite:///team.db", "team.db"),
        ("sqlite:///sub/../team.db?timeout=9", "sub/../team.db"),
        ("sqlite:///My%20runs/team.db", "My runs/team.db"),
        ("sqlite:///$TEAM/team.db", "shared/team.db"),
        ("SQLite+pysqlite:///team.db", "team.db"),
    ],
)
def test_a_relative_database_becomes_absolute_once(written, file, tmp_path, monkeypatch):
    monkeypatch.setenv("TEAM", str(tmp_path / "shared"))
    config = with_store(load([], [f"tracking.uri={written}"]))
    assert database_file(store_uri(config)) == tmp_path / file
    assert with_store(config) == config
    assert store_uri(config).partition("?")[1:] == written.partition("?")[1:]


def test_an_unknown_variable_in_the_address_is_refused():
    with pytest.raises(ConfigError, match="key 'tracking.uri'.*NOWHERE is not set"):
        with_store(load([], ["tracking.uri=sqlite:///$NOWHERE/team.db"]))


@pytest.mark.parametrize(
    "uri", ["mlruns", "./team.db", "file:///tmp/mlruns", "sqlite://", "sqlite:///:memory:"]
)
def test_an_address_that_keeps_nothing_is_refused_before_the_launch(uri, monkeypatch):
    with pytest.raises(ConfigError, match="key 'tracking.uri': got.*expected sqlite:///FILE"):
        with_store(load([], [f"tracking.uri='{uri}'"]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match="variable MLFLOW_TRACKING_URI: got"):
        with_store(load([]))
    assert with_store(load([], ["tracking.enabled=false"])).tracking.uri


@pytest.mark.slow  # sets up two databases
@pytest.mark.parametrize("name", ["100%41 done", "why? a#b & 'c'"])
def test_a_database_lies_in_the_folder_of_the_runs_whatever_its_name(name, tmp_path):
    runs = tmp_path / name
    runs.mkdir()
    config = load([], [f"runs_dir={runs}"])
    open_client(store_uri(config))
    assert (runs / "mlflow.db").exists()
    assert [folder.name for folder in tmp_path.iterdir()] == [name]


def test_mlflows_own_variables_fill_empty_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@host:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "faces")
    config = with_store(load([]))
    assert (config.tracking.uri, experiment_name(config)) == ("http://ada:secret@host:5000", "faces")
    tracker = make_tracker(tmp_path, config)
    assert tracker.live and "secret" not in tracker.address + tracker.viewer
    given = with_store(load([], ["tracking.uri=sqlite:////a/b.db", "tracking.experiment=mine"]))
    assert (given.tracking.uri, experiment_name(given)) == ("sqlite:////a/b.db", "mine")


def test_without_any_address_the_store_moves_with_the_runs():
    config = with_store(load([], ["runs_dir=/data/runs"]))
    assert config.tracking.uri == "" and experiment_name(config) == "cvae"
    assert database_file(store_uri(config)) == Path("/data/runs/mlflow.db")


def test_nothing_is_sent_where_tracking_is_off(tmp_path):
    tracker = make_tracker(tmp_path, load([], ["tracking.enabled=false", f"runs_dir={tmp_path}"]))
    tracker.push()
    assert not tracker.live and tracker.viewer == "" and tracker.problem() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_database_without_its_driver_is_a_problem_and_no_traceback(tmp_path):
    uri = "postgresql+asyncpg://ada:secret@host/db"
    config = with_store(load([], [f"tracking.uri={uri}", f"runs_dir={tmp_path}"]))
    (tmp_path / "config.yaml").write_text(dump(config))
    tracker = make_tracker(tmp_path, config)
    found = tracker.problem()
    assert "key 'tracking.uri'" in found and "its driver is not installed (No module named" in found
    with pytest.raises(TrackingError, match="was not updated: No module named") as error:
        tracker.push()
    assert "secret" not in found + str(error.value)


def test_a_server_is_one_in_capital_letters_too(tmp_path):
    assert make_tracker(tmp_path, with_store(load([], ["tracking.uri=HTTP://host:5000"]))).live


BASIC = "Basic YWRhOng="  # ada:x


@pytest.fixture
def requests_of_mlflow(monkeypatch, tmp_path):
    """What MLflow's client sends: (path, Authorization, verify, cert); `codes` are the answers, in turn."""
    sent: list[tuple] = []
    codes: list[int] = []

    def send(self, request, timeout, verify, cert, **rest):
        path = request.url.split("/", 3)[3]
        sent.append((path, request.headers.get("Authorization"), verify, cert))
        answer = requests.Response()
        answer.status_code = codes.pop(0) if codes else 200
        answer.request = request
        answer.url = request.url
        answer.raw = io.BytesIO()
        return answer

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    monkeypatch.setattr("pipeline.tracking.mlflow.health.require_listening", lambda uri: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    return sent, codes


@pytest.mark.parametrize(
    "variables,sent",
    [
        ({"MLFLOW_TRACKING_SERVER_CERT_PATH": "/etc/ca.pem"}, (None, "/etc/ca.pem", None)),
        ({"REQUESTS_CA_BUNDLE": "/etc/ca.pem"}, (None, "/etc/ca.pem", None)),
        ({"MLFLOW_TRACKING_INSECURE_TLS": "true"}, (None, False, None)),
        ({"MLFLOW_TRACKING_CLIENT_CERT_PATH": "/etc/me.pem"}, (None, True, "/etc/me.pem")),
        ({"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "x"}, (BASIC, True, None)),
        ({"MLFLOW_TRACKING_TOKEN": "abc"}, ("Bearer abc", True, None)),
    ],
)
def test_the_preflight_asks_a_server_as_mlflow_does(
    variables, sent, requests_of_mlflow, tmp_path, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tracker = make_tracker(tmp_path, load([], ["tracking.uri=https://host/"]))
    assert tracker.problem() == ""
    assert requests_of_mlflow[0][0] == ("health", *sent)


def test_the_preflight_knows_the_login_in_mlflows_own_file(requests_of_mlflow, tmp_path):
    (tmp_path / ".mlflow").mkdir()
    login = "[mlflow]\nmlflow_tracking_username = ada\nmlflow_tracking_password = x\n"
    (tmp_path / ".mlflow" / "credentials").write_text(login)
    tracker = make_tracker(tmp_path, load([], ["tracking.uri=https://host"]))
    assert tracker.problem() == ""
    assert requests_of_mlflow[0][0] == ("health", BASIC, True, None)


@pytest.mark.parametrize(
    "codes,said",
    [([401], "answers 401; set the login"), ([200, 401], "answers 401; set the login"),
     ([403], "--allowed-hosts"), ([502], "is the server well"), ([404], ""), ([200, 501], "")],
)  # fmt: skip
def test_a_server_that_wants_a_login_is_a_problem_also_if_its_health_is_public(
    codes, said, requests_of_mlflow, tmp_path
):
    requests_of_mlflow[1].extend(codes)
    found = make_tracker(tmp_path, load([], ["tracking.uri=https://ada:secret@host"])).problem()
    assert said in found and bool(said) == bool(found) and "secret" not in found
