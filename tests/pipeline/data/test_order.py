"""The order of samples: a pure function of the seed."""

import numpy as np
import pytest

from pipeline.data.order import Stream, plan
from pipeline.runtime.split import share

BOUNDS = np.cumsum([0, 10, 10, 9, 9, 9])


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_an_epoch_has_every_sample_once(at_once):
    assert sorted(plan(BOUNDS, 0, 0, at_once)) == list(range(47))


def test_epochs_and_seeds_differ_and_repeat_themselves():
    assert not np.array_equal(plan(BOUNDS, 0, 0, 2), plan(BOUNDS, 0, 1, 2))
    assert not np.array_equal(plan(BOUNDS, 0, 0, 2), plan(BOUNDS, 1, 0, 2))
    np.testing.assert_array_equal(plan(BOUNDS, 5, 3, 2), plan(BOUNDS, 5, 3, 2))


def test_only_so_many_shards_are_open_at_a_time():
    shard = np.searchsorted(BOUNDS, plan(BOUNDS, 0, 0, 2), side="right")
    assert [len(set(shard[:18])) <= 2, len(set(shard))] == [True, 5]
    switches = [s for i, s in enumerate(shard) if s not in shard[:i]]
    last = {s: np.flatnonzero(shard == s)[-1] for s in set(shard)}
    first = {s: np.flatnonzero(shard == s)[0] for s in set(shard)}
    assert max(last[s] for s in switches[:2]) < min(first[s] for s in switches[2:])


def test_the_stream_runs_across_epochs():
    stream = Stream(BOUNDS, 0, 2)
    whole = np.concatenate([plan(BOUNDS, 0, e, 2) for e in range(4)])
    for start, stop in [(0, 5), (45, 50), (40, 150), (20, 20), (3, 8)]:  # also backwards, as after a resume
        np.testing.assert_array_equal(stream.take(start, stop), whole[start:stop])


@pytest.mark.parametrize("total,world", [(8, 3), (3, 4), (128, 7), (0, 2)])
def test_shares_cover_everything_in_order(total, world):
    assert [i for r in range(world) for i in share(total, r, world)] == list(range(total))
    sizes = [len(share(total, r, world)) for r in range(world)]
    assert max(sizes) - min(sizes) <= 1
