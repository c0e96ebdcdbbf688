"""Errors that a user can cause and mend: shown as one message, without a traceback, with exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


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


def exit_code(main: Callable[[], object]) -> int:
    """Run `main` and return the exit code of this program.

    0: done. 2: a UserError or a full disk; its message goes to stderr. Other errors keep their traceback.
    141 (as after SIGPIPE): the reader of a pipe, such as `| head`, has ended.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + signal.SIGPIPE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        file = error.filename or "a file"
        reason = f"{file} could not be written ({error.strerror})"
        print(f"error: {reason}; make room, then the same command continues", file=sys.stderr)
        return 2
    return 0
