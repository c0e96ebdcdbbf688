"""Stop requests from the scheduler: a signal sets a flag, and the stage acts on it at a step boundary."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """Raised by a stage on every rank after it was asked to stop and has saved its state."""


class StopFlag:
    """`requested` turns true when a stop signal arrives on this rank; other ranks may not know yet.

    The flag listens between `install` and `uninstall`, or inside a `with`. `received` keeps the signals.
    """

    def __init__(self) -> None:
        """Make a flag that does not listen yet."""
        self.requested = False
        self.received: set[int] = set()
        self.previous: dict[int, Any] = {}  # the handlers that were there before, e.g. submitit's

    def install(self, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> StopFlag:
        """Listen to `signals`; main thread only. A hang-up that is ignored stays ignored (nohup)."""
        for number in signals:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self.previous[number] = signal.signal(number, self._handle)
        return self

    def uninstall(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous.clear()

    def __enter__(self) -> StopFlag:
        """Install."""
        return self.install()

    def __exit__(self, *_: object) -> None:
        """Uninstall."""
        self.uninstall()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        self.received.add(signum)
