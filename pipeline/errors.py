"""Errors that a user can cause and mend: shown as one message, without a traceback, with exit code 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A user's mistake; the message names the file, key or value, what was expected and what to do."""


class ConfigError(UserError):
    """A configuration key or value that does not fit."""


class DataError(UserError):
    """An input file (image, annotation, shard, manifest) that does not fit."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, missing, or of another configuration."""


class StorageError(UserError):
    """The disk refused a write: full, over its quota, read-only."""


class OwnedError(UserError):
    """The run directory belongs to a process that is alive."""


def exit_code(main: Callable[[], object]) -> int:
    """Run `main`; return 0, or 2 after printing a UserError's message to stderr (other errors keep their traceback).

    141, as for a program that SIGPIPE ended, where its output was piped into one that has ended (`| head`).
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
