"""Small files: whole or not at all, with the usual mode, and readable after a torn line."""

import errno
import json
import os
import stat

import pytest

from pipeline.errors import StorageError, exit_code
from pipeline.rundir import files, record
from pipeline.rundir.files import append_line, give_usual_mode, read_json_lines, write_json


def test_a_torn_line_costs_itself_only(tmp_path):
    file = tmp_path / "history.jsonl"
    append_line(file, json.dumps({"n": 1}))
    with open(file, "a") as opened:
        opened.write('{"n": 2, "half')
    assert read_json_lines(file) == [{"n": 1}]
    append_line(file, json.dumps({"n": 3}))
    append_line(file, json.dumps({"n": 4}))
    assert read_json_lines(file) == [{"n": 1}, {"n": 3}, {"n": 4}]


def test_a_run_with_a_torn_history_is_still_readable(tmp_path):
    append_line(tmp_path / "config_history.jsonl", json.dumps({"commit": "abc"}))
    with open(tmp_path / "config_history.jsonl", "a") as opened:
        opened.write('{"commit": "de')
    assert record.commit(tmp_path) == "abc"


@pytest.mark.parametrize("write", [lambda file: write_json(file, [1]), lambda file: append_line(file, "1")])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_refuses_is_a_named_error(write, number, tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    file = tmp_path / "x.json"
    file.write_text("old\n")
    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(StorageError, match=f"x.json: could not be written .{os.strerror(number)}.*make room"):
        write(file)
    assert file.read_text().startswith("old\n") and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("number,code", [(errno.ENOSPC, 2), (errno.EDQUOT, 2), (errno.EROFS, 2)])
def test_a_full_disk_anywhere_ends_without_a_traceback(number, code, capsys):
    def main():
        raise OSError(number, os.strerror(number), "/data/c.html")

    assert exit_code(main) == code
    assert f"/data/c.html could not be written ({os.strerror(number)})" in capsys.readouterr().err


def test_another_oserror_keeps_its_traceback():
    def main():
        raise OSError(errno.EIO, "bad disk")

    with pytest.raises(OSError, match="bad disk"):
        exit_code(main)


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_the_usual_mode_is_what_the_umask_leaves(mask, tmp_path):
    file = tmp_path / "weights"
    before = os.umask(mask)
    try:
        os.close(os.open(file, os.O_CREAT, 0o600))
        give_usual_mode(file)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [file]
