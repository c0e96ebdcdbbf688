"""Is a store well? What MLflow raises where it is not, and what a launch asks before it starts anything."""

from __future__ import annotations

import socket
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from pipeline.rundir.redact import redact
from pipeline.tracking.base import TrackingError

CONNECT_TIMEOUT_S = 10.0


def store_errors() -> tuple[type[Exception], ...]:
    """Return what MLflow raises if a store is unreachable, locked, refuses, or lacks its library."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, RequestException, SQLAlchemyError, OSError, ImportError


def first_line(error: Exception) -> str:
    """Return the first line of an error, short and without credentials."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redact(lines[0])[:300]


def require_listening(uri: str) -> None:
    """Raise TrackingError if nobody listens at `uri`.

    A connection costs nothing, but importing mlflow takes seconds of the GIL. A proxy is not asked.
    """
    url = urlsplit(uri)
    host = url.hostname or ""
    if url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    usual_port = 443 if url.scheme == "https" else 80
    try:
        socket.create_connection((host, url.port or usual_port), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise TrackingError(f"MLflow server {redact(uri)} does not answer ({error})") from None


def server_problem(uri: str) -> str:
    """Ask a server as MLflow's client does; return what is wrong, in words, or "".

    The client knows the institute's CA, certificates, logins from variables or ~/.mlflow/credentials, and
    plug-ins. A server may tell everybody that it is well and still want a login for the rest.
    """
    where = f"key 'tracking.uri': {redact(uri)}"
    try:
        require_listening(uri)
        answer = _answer(uri)
    except TrackingError as error:
        why = first_line(error)
        return f"{where} does not answer ({why}); start the server, or set tracking.enabled=false"
    if answer in (401, 403):
        return (
            f"{where} answers {answer}; set the login that it wants (MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN), or start the server with --allowed-hosts "
            "for this name"
        )
    if answer >= 500:
        return f"{where} answers {answer}; is the server well?"
    return ""  # other codes only say that this server has no /health


def database_problem(uri: str) -> str:
    """Return which library the driver of a database lacks here, in words, or ""."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        return (
            f"key 'tracking.uri': {redact(uri)}: its driver is not installed ({error}); install it here and "
            "on the nodes, or name a server, http://HOST:PORT"
        )
    except SQLAlchemyError:
        pass  # no database: `databricks`, or the address of a plug-in of MLflow
    return ""


def _answer(uri: str) -> int:
    """Return the status code of /health, or that of a refused login behind it. Raises TrackingError."""
    refusals: tuple[type[Exception], ...] = (*store_errors(), ValueError)
    try:
        health = _status_code(uri, "GET", "/health")
        if health >= 400:
            return health
        inside = _status_code(uri, "POST", "/api/2.0/mlflow/experiments/search", json={"max_results": 1})
    except refusals as error:
        raise TrackingError(first_line(error)) from None
    return inside if inside in (401, 403) else health  # a proxy may not pass everything on


def _status_code(uri: str, method: str, endpoint: str, **content: Any) -> int:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    login = get_default_host_creds(uri)
    answer = http_request(
        login, endpoint, method, max_retries=0, timeout=CONNECT_TIMEOUT_S, raise_on_status=False, **content
    )
    return int(answer.status_code)
