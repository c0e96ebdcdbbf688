"""A seeded mutation fuzzer, and a guard that notices forbidden actions of the process."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKENS = [
    b"\0", b"\xff", b"-1", b"0", b"1e999", b"NaN", b"null", b"true",
    b'""', b"[]", b"{}", b"9" * 400, b"\xef\xbb\xbf", b"\r\n",
    b"../", b"/etc/passwd",
    b"!!python/object/apply:os.system ['touch /tmp/pwned']", b"${oc.env:HOME}",
    b"${", b"&a", b"*a", b"[" * 3000,
    b'{"a":' * 3000, b"base: x\n",
    b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.", b"\xe2\x80\xae", b"'",
    b'"', b"#", b"%", b"\t", b",", b": ", b"- ", b"<html>",
]  # fmt: skip
FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.find_class",
    "socket.connect",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return `content` after one to four random edits."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        more = rng.randint(1, 40)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + more]
        elif kind == 2:
            data[at:at] = data[at : at + more]
        elif kind == 3:
            data[at:at] = rng.choice(TOKENS)
        elif kind == 4:
            data[at : at + more] = rng.choice(TOKENS)
        elif kind == 5:
            data[at : at + more] = rng.randbytes(more)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


class Guard:
    """Records forbidden events of this process while `active`.

    There is one guard, because an audit hook can never be removed.
    """

    def __init__(self) -> None:
        self.active: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.active is None:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {arguments!r}"[:300])
        elif (
            event == "open"
            and isinstance(arguments[0], (str, bytes))
            and isinstance(arguments[2], int)
            and arguments[2] & WRITING
        ):
            file = os.path.abspath(os.fsdecode(arguments[0]))
            if not file.startswith((str(self.active), "/dev/")):
                self.seen.append(f"writes {file}")

    @contextmanager
    def watching(self, folder: Path, limit_s: float) -> Iterator[None]:
        """Allow writing only in `folder`, for at most `limit_s`."""

        def late(*_: object) -> None:
            raise TimeoutError(f"not done after {limit_s} s")

        previous = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        self.active = folder
        try:
            yield
        finally:
            self.active = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


GUARD = Guard()
