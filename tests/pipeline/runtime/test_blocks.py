"""Blocks of work: the same on any number of ranks."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.runtime.blocks import Watch, map_blocks
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.logs import PROGRESS, Pace
from pipeline.runtime.preempt import Stopped
from pipeline.runtime.split import ceil_div, spread


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_blocks_are_the_same_on_any_rank(world_size: int) -> None:
    blocks: list[list[int]] = []
    parts = []
    for rank in range(world_size):
        ranks = SimpleNamespace(rank=rank, world_size=world_size, gather_rows=lambda x: x)
        parts.append(
            map_blocks(lambda i: blocks.append(i.tolist()) or {"x": torch.from_numpy(i)}, 11, 4, ranks)["x"]
        )  # type: ignore[arg-type, func-returns-value]
    assert np.concatenate(parts).tolist() == list(range(11))
    assert {tuple(block) for block in blocks} == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)}


@pytest.mark.parametrize("n, total", [(1, 1), (3, 7), (7, 7), (100, 20_000)])
def test_spread_positions_are_distinct_and_reach_over_the_whole_split(n: int, total: int) -> None:
    positions = spread(n, total)
    assert len(set(positions)) == n and positions[0] == 0 and total - positions[-1] <= ceil_div(total, n)


def test_a_stop_signal_ends_the_work_after_the_block_in_progress() -> None:
    watch, done = Watch("part samples"), []

    def work(indices: np.ndarray) -> dict[str, torch.Tensor]:
        done.append(indices[0])
        watch.stop.requested = len(done) == 2
        return {"x": torch.from_numpy(indices)}

    with pytest.raises(Stopped, match="by a signal"):
        map_blocks(work, 20, 4, Ranks(), watch)
    assert done == [0, 4]


def test_a_rank_that_got_no_signal_stops_with_the_others() -> None:
    """It has done its share, and learns of the stop before rows are exchanged."""
    stops = SimpleNamespace(rank=1, world_size=2, device="cpu", reduce_sum=lambda asked: asked + 1)
    with pytest.raises(Stopped):
        map_blocks(lambda i: {"x": torch.from_numpy(i)}, 8, 4, stops, Watch("part samples"))  # type: ignore[arg-type]


def test_watched_blocks_tell_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Pace, "due", lambda self: True)
    with caplog.at_level(logging.INFO, "cvae"):
        map_blocks(lambda i: {"x": torch.from_numpy(i)}, 11, 4, Ranks(), Watch("part samples"))
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in told] == ["part samples 1/3", "part samples 2/3"]
    assert all(PROGRESS.fullmatch(line) for line in told)  # so that a launch and tools/status.py show it
