"""Errors that a user can cause and mend: shown as one message, without a traceback, with exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
NO_RIGHT = (errno.EACCES, errno.EPERM)
NO_PLACE = "No usable temporary directory"  # Python's tempfile says so in an OSError without a file


class UserError(Exception):
    """A user's mistake; the message names the file, key or value, what was expected and what to do."""


class ConfigError(UserError):
    """A configuration key or value that does not fit."""


class DataError(UserError):
    """An input file (image, annotation, shard, manifest) that does not fit."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, missing, or of another configuration."""


class StorageError(UserError, OSError):
    """The disk refused a write: it is full, over its quota, or read-only.

    It is an OSError too, so that code that can do without the file treats it like any other.
    """


class OwnedError(UserError):
    """The run directory belongs to a process that is alive."""


def as_user_error(error: Exception) -> Exception:
    """Return a StorageError for an OSError of a disk, of missing rights or of TMPDIR, else the error."""
    if isinstance(error, UserError) or not isinstance(error, OSError):
        return error
    if error.errno in DISK_ERRORS:
        file = error.filename2 or error.filename or "a file or the output"  # filename2: of a copy, where to
        reason = f"{file} could not be written ({error.strerror})"
        return StorageError(f"{reason}; make room, then the same command continues")
    if error.errno in NO_RIGHT and error.filename:
        reason = f"{error.filename} could not be read or written ({error.strerror})"
        return StorageError(f"{reason}; get the right to do so, then the same command continues")
    if NO_PLACE in str(error):
        return StorageError(f"{error.strerror}: set TMPDIR to a folder that can be written")
    return error


def exit_code(main: Callable[[], object]) -> int:
    """Run `main` and return the exit code of this program.

    0: done. 2: a UserError, a full disk, or a missing right; its message goes to stderr.
    Other errors keep their traceback.
    141 (as after SIGPIPE): the reader of a pipe, such as `| head`, has ended.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_unwritten()
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        found = as_user_error(error)
        if not isinstance(found, UserError):
            raise
        with suppress(OSError):  # the log of a shell may lie on the same full disk
            print(f"error: {found}", file=sys.stderr)
        _drop_unwritten()
        return 2
    return 0


def _drop_unwritten() -> None:
    """Drop output that nobody takes. Python would try once more at its end, and exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
