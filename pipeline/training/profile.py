"""A torch.profiler trace of a few training steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

SKIPPED_STEPS = 3  # the first is not traced, the profiler warms up during the next two


@contextmanager
def profiler(steps: int, file: Path) -> Iterator[Callable[[], None]]:
    """Trace `steps` training steps into `file` after SKIPPED_STEPS steps; 0 steps: no trace.

    The caller calls the yielded function after each step.
    """
    if not steps:
        yield lambda: None
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    when = schedule(wait=1, warmup=SKIPPED_STEPS - 1, active=steps, repeat=1)

    def write(finished: profile) -> None:
        finished.export_chrome_trace(str(file))

    with profile(schedule=when, on_trace_ready=write, profile_memory=True) as running:
        yield running.step
