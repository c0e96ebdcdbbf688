"""Samples of a node: they lie beside the run, go on after a restart, and never stop a training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.rundir import layout
from pipeline.rundir.metrics_log import read_metrics
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.node import Node, NodeMonitor, node_monitor
from tests.tiny_run import context

LOG = logging.getLogger("cvae.test")


def steps_once(monitor: NodeMonitor, samples: int) -> list[int]:
    """The steps in the monitor's file once it holds so many samples."""
    with monitor:
        while len(found := read_metrics(monitor._file)) < samples:
            assert monitor._thread.is_alive()
            monitor._end.wait(0.01)
    return [record["step"] for record in found]


def test_samples_go_on_after_a_restart(tmp_path: Path) -> None:
    assert steps_once(NodeMonitor(tmp_path, LOG, 0.01), 2)[:2] == [1, 2]
    before = len(read_metrics(next(tmp_path.iterdir())))
    steps = steps_once(NodeMonitor(tmp_path, LOG, 0.01), before + 2)
    assert steps == list(range(1, len(steps) + 1))
    (name,) = {key.rsplit("/", 1)[0] for key in read_metrics(next(tmp_path.iterdir()))[0]["values"]}
    assert name == f"system/{next(tmp_path.iterdir()).stem}"


def test_values_are_those_of_this_machine() -> None:
    values = dict(Node().sample())
    assert 0 < values["system_memory_usage_percentage"] < 100
    assert 0 <= values["cpu_utilization_percentage"] <= 100
    assert 0 <= values["network_receive_megabytes"] < 1e6  # since the monitor began, not since the boot


@pytest.mark.parametrize("what", ["damaged file", "no /proc"])
def test_what_cannot_be_sampled_is_one_warning(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(node: Node) -> Iterator[tuple[str, float]]:
        raise OSError(what)

    monitor = NodeMonitor(tmp_path, LOG, 0.01)
    if what == "damaged file":
        monitor._file.write_text("{not json}\n{}\n")
    else:
        monkeypatch.setattr(Node, "sample", broken)
    with monitor:
        monitor._thread.join(60)
    (warning,) = caplog.messages
    assert "no system metrics" in warning and (what in warning or "line 1" in warning)


def test_a_gpu_that_answers_nothing_costs_its_own_values_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # and NVML is not on this machine
    names = [name for name, _ in Node().sample()]
    assert "cpu_utilization_percentage" in names and not any(name.startswith("gpu_") for name in names)


def test_one_rank_of_each_node_samples(tmp_path: Path) -> None:
    entered = []
    for rank in range(4):  # two nodes of two ranks
        ranks = Ranks(rank, 4, local_rank=rank % 2)
        with node_monitor(context(tmp_path, ranks)) as monitor:
            entered.append(monitor is not None)
    assert entered == [True, False, True, False]
    (file,) = layout.nodes_dir(tmp_path).iterdir()  # both are this machine here
    assert file.suffix == ".jsonl"
