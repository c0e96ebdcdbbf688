"""The order of samples and their random numbers: pure functions of the seed, for any number of ranks."""

import numpy as np
import pytest

from pipeline.data.order import FIRST_STREAM, NEWEST_STREAM, STREAMS, Stream
from pipeline.runtime.keyed import normal_rows, raw_rows
from pipeline.runtime.shuffle import ROUNDS, shuffled
from pipeline.runtime.split import share

BOUNDS = np.cumsum([0, 10, 10, 9, 9, 9])
TOTAL = 47
# Noted with the code that had only one stream: seed 7, step 5 of 8 images.
OLD_INDICES = [22, 25, 21, 20, 27, 28, 26, 42]
OLD_NOISE = [[0.24266884, 0.35664481, 0.51237929], [-0.32880145, 0.08287997, -1.28018951]]
OLD_FLIPS = [0.6581984961793438, 0.2839215670709728, 0.05506858591319508]
OLD_ANGLES = [0.9166958702143801, -0.7939615690581161, -0.06993574981546646]
CELEBA = np.cumsum([0] + [2048] * 79 + [978])  # the shards of CelebA's training split
BOTH = pytest.mark.parametrize("number", STREAMS)


def stream(number: int, seed: int = 0, at_once: int = 2, batch: int = 8) -> Stream:
    return STREAMS[number](BOUNDS, seed, at_once, batch)


def epoch(number: int, epoch: int, seed: int = 0, at_once: int = 2) -> np.ndarray:
    return stream(number, seed, at_once).indices(range(epoch * TOTAL, (epoch + 1) * TOTAL))


@BOTH
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_an_epoch_has_every_sample_once(number, at_once):
    assert sorted(epoch(number, 3, at_once=at_once)) == list(range(TOTAL))


@BOTH
def test_epochs_and_seeds_differ_and_repeat_themselves(number):
    assert not np.array_equal(epoch(number, 0), epoch(number, 1))
    assert not np.array_equal(epoch(number, 0), epoch(number, 0, seed=1))
    np.testing.assert_array_equal(epoch(number, 3, seed=5), epoch(number, 3, seed=5))


@BOTH
def test_only_so_many_shards_are_open_at_a_time(number):
    shard = np.searchsorted(BOUNDS, epoch(number, 0), side="right")
    assert [len(set(shard[:18])) <= 2, len(set(shard))] == [True, 5]
    switches = [s for i, s in enumerate(shard) if s not in shard[:i]]
    last = {s: np.flatnonzero(shard == s)[-1] for s in set(shard)}
    first = {s: np.flatnonzero(shard == s)[0] for s in set(shard)}
    assert max(last[s] for s in switches[:2]) < min(first[s] for s in switches[2:])


@BOTH
def test_the_stream_runs_across_epochs(number):
    one = stream(number)
    whole = np.concatenate([epoch(number, e) for e in range(4)])
    for start, stop in [(0, 5), (45, 50), (40, 150), (20, 20), (3, 8)]:  # also backwards, as after a resume
        np.testing.assert_array_equal(one.indices(range(start, stop)), whole[start:stop])


@BOTH
def test_a_share_gets_its_slice_of_the_batch_of_one_rank(number):
    one, batch = stream(number), range(40, 48)
    for rank in range(3):
        mine = share(8, rank, 3)
        here = range(40 + mine.start, 40 + mine.stop)
        cut = slice(mine.start, mine.stop)
        np.testing.assert_array_equal(one.indices(here), one.indices(batch)[cut])
        np.testing.assert_array_equal(one.noise(here, 5), one.noise(batch, 5)[cut])
        for own, all_of_it in zip(one.augmentation(here), one.augmentation(batch), strict=True):
            np.testing.assert_array_equal(own, all_of_it[cut])


def test_the_first_stream_is_that_of_runs_which_began_before_the_second():
    old = stream(FIRST_STREAM, seed=7)
    assert old.indices(range(40, 48)).tolist() == OLD_INDICES
    np.testing.assert_allclose(old.noise(range(40, 42), 3), OLD_NOISE, rtol=1e-6)
    flips, angles = old.augmentation(range(40, 43))
    np.testing.assert_allclose(flips, OLD_FLIPS, rtol=1e-12)
    np.testing.assert_allclose(angles, OLD_ANGLES, rtol=1e-12)


def test_normal_rows_are_normal_and_independent():
    rows = normal_rows(3, "test", range(2000), 129)
    assert rows.dtype == np.float32 and rows.shape == (2000, 129)
    moments = [float((rows**k).mean()) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.04)
    between = np.corrcoef(rows[:, :64].ravel(), rows[:, 64:128].ravel())[0, 1]
    assert abs(between) < 0.01 and len(np.unique(rows)) > 0.98 * rows.size


@pytest.mark.parametrize("n", [1, 2, 5, 47, 64])
def test_a_shuffle_is_a_permutation_and_sends_everything_everywhere(n):
    keys = raw_rows(0, "keys", range(1000), ROUNDS).astype(np.uint32)
    images = np.stack([shuffled(np.arange(n), n, k) for k in keys])
    assert (np.sort(images, 1) == np.arange(n)).all()
    counts = np.stack([np.bincount(images[:, i], minlength=n) for i in range(n)])
    freedom = (n - 1) ** 2
    chi_square = ((counts - 1000 / n) ** 2 / (1000 / n)).sum()
    assert abs(chi_square - freedom) <= 5 * np.sqrt(2 * freedom)


def words_of(ranks: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Random words and permuted positions that one rank of `ranks` needs for 20 steps of 128 images each."""
    spent = []
    monkeypatch.setattr(
        "pipeline.runtime.keyed.raw_rows", counted(raw_rows, spent, lambda a: len(a[2]) * a[3])
    )
    monkeypatch.setattr("pipeline.data.order.shuffled", counted(shuffled, spent, lambda a: len(a[0])))
    one = STREAMS[NEWEST_STREAM](CELEBA, 0, 8, 128 * ranks)
    for step in range(20):
        first = step * 128 * ranks
        mine = range(first, first + 128)
        one.indices(mine), one.augmentation(mine), one.noise(mine, 128)
    return sum(spent)


def counted(function, spent, size):
    def call(*arguments):
        spent.append(size(arguments))
        return function(*arguments)

    return call


def test_the_work_of_a_rank_does_not_grow_with_the_number_of_ranks(monkeypatch):
    alone = words_of(1, monkeypatch)
    assert alone > 20 * 128 * 64
    for ranks in (8, 512):
        assert words_of(ranks, monkeypatch) == alone


@pytest.mark.parametrize("total,world", [(8, 3), (3, 4), (128, 7), (0, 2)])
def test_shares_cover_everything_in_order(total, world):
    assert [i for r in range(world) for i in share(total, r, world)] == list(range(total))
    sizes = [len(share(total, r, world)) for r in range(world)]
    assert max(sizes) - min(sizes) <= 1
