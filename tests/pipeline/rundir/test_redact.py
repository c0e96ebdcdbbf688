"""Credentials are hidden in text."""

from __future__ import annotations

from pipeline.rundir.redact import redact


def test_redact() -> None:
    assert (
        redact("API request to https://ada:p%40ss@host:5000/api failed")
        == "API request to https://***@host:5000/api failed"
    )
    assert redact("http://ada:p@ss@host/x") == "http://***@host/x"
    assert redact("sqlite:////runs/a@b.db") == "sqlite:////runs/a@b.db"
