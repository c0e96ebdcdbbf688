"""Small files: whole or not at all, and with the usual mode."""

import errno
import os
import stat
import subprocess
import sys
import tempfile

import pytest

from pipeline.errors import DISK_ERRORS, StorageError, exit_code
from pipeline.rundir import files
from pipeline.rundir.files import give_usual_mode, naming, write_json
from pipeline.rundir.lines import append_line
from tests.conftest import ROOT


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_folders_is_written_all_the_same(number, tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_json(tmp_path / "x.json", [1])
    assert (tmp_path / "x.json").read_text() == "[\n 1\n]\n"


@pytest.mark.parametrize("number", DISK_ERRORS)
def test_a_disk_that_refuses_any_write_inside_a_block_is_named(number, tmp_path):
    file = tmp_path / "train-0.tar"
    with pytest.raises(StorageError, match="train-0.tar: could not be written"), naming(file):
        raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="bad disk"), naming(file):
        raise OSError(errno.EIO, "bad disk")


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


def test_a_missing_right_is_named_without_a_traceback(capsys):
    def main():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/c.html")

    assert exit_code(main) == 2
    assert "/data/c.html could not be read or written (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("number", DISK_ERRORS)
def test_a_full_disk_anywhere_ends_without_a_traceback(number, capsys):
    def main():
        raise OSError(number, os.strerror(number), "/data/c.html")

    assert exit_code(main) == 2
    assert f"/data/c.html could not be written ({os.strerror(number)})" in capsys.readouterr().err


@pytest.mark.parametrize("words", [1, 100_000])
@pytest.mark.parametrize("whole", [False, True])
def test_an_output_on_a_full_disk_ends_with_code_2(words, whole):
    """Python holds short output back until its end. `whole`: the messages go to the full disk too."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    main = f"lambda: print('x ' * {words})"
    script = f"import sys; from pipeline.errors import exit_code; sys.exit(exit_code({main}))"
    with open("/dev/full", "w") as full:
        outputs = {"stdout": full, "stderr": full if whole else subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, text=True, **outputs)
    assert done.returncode == 2
    said = "error: a file or the output could not be written (No space left on device)"
    assert whole or (done.stderr.startswith(said) and done.stderr.count("\n") == 1)


def test_a_copy_that_finds_no_room_names_its_target(capsys):
    def main():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/from", None, "/to")

    assert exit_code(main) == 2
    assert "error: /to could not be written (No space left on device)" in capsys.readouterr().err


def test_without_a_temporary_folder_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/1/nowhere"])
    assert exit_code(tempfile.mkdtemp) == 2
    said = capsys.readouterr().err
    assert "No usable temporary directory found" in said and "set TMPDIR to a folder" in said


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
