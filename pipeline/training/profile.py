"""A torch.profiler trace of a few training steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule


@contextmanager
def profiler(steps: int, file: Path) -> Iterator[Callable[[], None]]:
    """Call the yielded function after each step: after 3 steps, `steps` of them are traced into `file`; 0: nothing."""
    if not steps:
        yield lambda: None
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    when = schedule(wait=1, warmup=2, active=steps, repeat=1)
    with profile(
        schedule=when, on_trace_ready=lambda p: p.export_chrome_trace(str(file)), profile_memory=True
    ) as running:
        yield running.step
