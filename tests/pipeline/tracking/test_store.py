"""Which store a run has: addresses in every spelling, and MLflow's own variables."""

from __future__ import annotations

from pathlib import Path

import pytest
import requests

from pipeline.config.load import load
from pipeline.errors import ConfigError
from pipeline.tracking.mlflow_store import database_file, experiment_name, open_client, store_uri, with_store
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


@pytest.mark.parametrize(
    "variables,options",
    [
        ({"SERVER_CERT_PATH": "/etc/ca.pem"}, {"verify": "/etc/ca.pem"}),
        ({"INSECURE_TLS": "true"}, {"verify": False}),
        ({"INSECURE_TLS": "false"}, {"verify": True}),  # requests then reads REQUESTS_CA_BUNDLE
        ({"CLIENT_CERT_PATH": "/etc/me.pem"}, {"verify": True, "cert": "/etc/me.pem"}),
        ({"USERNAME": "ada", "PASSWORD": "x"}, {"verify": True, "auth": ("ada", "x")}),
        ({"TOKEN": "abc"}, {"verify": True, "headers": {"Authorization": "Bearer abc"}}),
    ],
)
def test_the_preflight_asks_a_server_as_mlflow_does(variables, options, tmp_path, monkeypatch):
    asked = []

    def get(url, timeout, **given):
        asked.append((url, given))
        raise requests.exceptions.SSLError("self-signed certificate of ada:secret")

    monkeypatch.setattr(requests, "get", get)
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    tracker = make_tracker(tmp_path, load([], ["tracking.uri=https://ada:secret@host/"]))
    assert "key 'tracking.uri': https://***@host/ does not answer (self-signed" in tracker.problem()
    assert asked == [("https://ada:secret@host/health", options)]
