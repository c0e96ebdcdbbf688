"""Append-only files: a torn last line is left out by every reader, other damage is named."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from pipeline.data.journal import Journal, ShardReport
from pipeline.errors import UserError
from pipeline.rundir import record
from pipeline.rundir.lines import append_line, read_json_lines
from pipeline.rundir.metrics_log import MetricsLog
from pipeline.runtime.node import NodeMonitor
from pipeline.tracking.mlflow.curves import curve_points
from slurm.overview import overview
from slurm.status import LogTail, as_table, survey, tail
from tests.conftest import ROOT


def test_a_torn_line_costs_itself_only(tmp_path):
    file = tmp_path / "history.jsonl"
    append_line(file, json.dumps({"n": 1}))
    with open(file, "a") as opened:
        opened.write('{"n": 2, "half')
    assert read_json_lines(file) == [{"n": 1}]
    append_line(file, json.dumps({"n": 3}))
    append_line(file, json.dumps({"n": 4}))
    assert read_json_lines(file) == [{"n": 1}, {"n": 3}, {"n": 4}]


def test_another_damaged_line_is_named_and_left_out(tmp_path, caplog):
    file = tmp_path / "history.jsonl"
    file.write_bytes(b'{"n": 1}\n\xff{"n"\n{"n": 3}\nnull\n{"n": 44')
    assert read_json_lines(file) == [{"n": 1}, {"n": 3}]
    first, second = caplog.messages
    assert f"{file}, line 2" in first and f"{file}, line 4" in second


def test_lines_of_many_processes_are_all_kept(tmp_path):
    """Two launches of one run may note their changes at the same time, after one that was killed."""
    file = tmp_path / "history.jsonl"
    file.write_text('{"n": -1}\n{"n": -2, "half')
    children = []
    for writer in range(4):
        child = os.fork()
        if not child:
            for count in range(25):
                append_line(file, json.dumps({"n": 25 * writer + count}))
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sorted(line["n"] for line in read_json_lines(file)) == [-1, *range(100)]


# ---- every append-only file of a runs folder, really torn

SOURCE = {"name": "celeba"}
REPORT = ShardReport("train-00000.tar", 1, 2, "5a", [1], [])
FILES = {
    "metrics": "stored/train/metrics.jsonl",
    "nodes": "stored/nodes/here.jsonl",
    "history": "stored/config_history.jsonl",
    "journal": "_shared/shards/made/journal.jsonl",
    "log": "stored/logs/train/rank0.log",
}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of runs in which every append-only file has at least two lines."""
    shutil.copytree(ROOT / "tests/data/stored_run", tmp_path / "runs")
    runs = tmp_path / "runs"
    nodes = MetricsLog(runs / FILES["nodes"], None)
    for step in (1, 2):
        nodes.append(step, {"system/here/load": step})
    nodes.close()
    append_line(runs / FILES["history"], json.dumps({"commit": "f00", "stages": ["train"]}))
    journal = Journal(runs / FILES["journal"])
    journal.file.parent.mkdir()
    journal.resume(SOURCE, set())
    journal.add(REPORT)
    log = runs / FILES["log"]
    log.parent.mkdir(parents=True)
    log.write_text("10:00:00 train[0] I step 5/6\n10:00:01 train[0] I a face \u263a\n", encoding="utf-8")
    return runs


def everything_read(runs: Path) -> list[object]:
    """What each reader makes of the files."""
    run_dir = runs / "stored"
    node = NodeMonitor(runs / "stored/nodes", logging.getLogger("cvae.test"), 0.01)
    node._end.set()  # it goes on after the samples that are there, and takes none
    node._sample_until_the_end()
    return [
        as_table(survey([run_dir])),
        record.started(run_dir),
        record.commit(run_dir),
        list(curve_points(run_dir)),
        _read_again(runs / FILES["journal"]),
        tail(runs / FILES["log"]).splitlines()[:1],
        LogTail(runs / FILES["log"]).new(),
        overview([run_dir], runs).split(" ago")[1:],
    ]


def _read_again(file: Path) -> dict[str, ShardReport]:
    before = file.read_bytes()
    found = Journal(file).resume(SOURCE, {REPORT.file})
    file.write_bytes(before)
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_torn_last_line_is_left_out_by_every_reader(name: str, runs: Path, caplog) -> None:
    file = runs / FILES[name]
    content = file.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    file.write_bytes(content[:last])
    expected = everything_read(runs)
    caplog.clear()
    half = content[: (last + len(content)) // 2]
    zeros = b"\0" * 100  # a power cut may leave a length without its content
    for torn in (content[: last + 1], half + zeros, content[:-2], content[:-1]):
        file.write_bytes(torn)
        assert everything_read(runs) == expected
    assert not caplog.messages


@pytest.mark.parametrize("name", ["metrics", "nodes", "history", "journal"])
@pytest.mark.parametrize("damage", [b"\xff\xfe{", b"null", b"{}", b"[" * 100_000])
def test_another_damaged_line_is_named_by_every_reader(name: str, damage: bytes, runs: Path, caplog) -> None:
    file = runs / FILES[name]
    _, *rest = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([damage, *rest]))
    try:
        everything_read(runs)
    except UserError as error:
        assert f"{file}, line 1" in str(error)
    else:
        assert damage == b"{}" or f"{file}, line 1" in caplog.text
