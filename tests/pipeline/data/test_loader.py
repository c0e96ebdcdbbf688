"""Batches: pixels on the device, keyed augmentation, prefetching."""

import threading

import numpy as np
import pytest
import torch

from pipeline.config import load as configuration
from pipeline.data.loader import Prefetcher, TrainBatches, flip_images, rotate_images, to_float
from pipeline.data.shards import Shards
from pipeline.rundir import layout


def test_to_float_is_the_scale_of_the_equations():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).repeat(2, 4, 4, 1)
    x = to_float(images)
    assert x.shape == (2, 3, 4, 4) and x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))


def test_flip_mirrors_only_the_chosen():
    images = torch.arange(2 * 2 * 3 * 3, dtype=torch.uint8).view(2, 2, 3, 3)
    out = flip_images(images, torch.tensor([True, False]))
    assert torch.equal(out[0, :, 0], images[0, :, 2]) and torch.equal(out[1], images[1])


def test_rotation_by_a_right_angle_is_a_transpose_and_flip():
    x = torch.randn(1, 3, 8, 8)
    turned = rotate_images(x, torch.tensor([torch.pi / 2]))
    torch.testing.assert_close(turned, torch.rot90(x, 1, (2, 3)), atol=1e-5, rtol=0)


@pytest.fixture
def batches(tiny_overrides):
    config = configuration.load(
        [], [*tiny_overrides, "data.attributes=[Young,Male]", "data.rotation_degrees=5"]
    )
    shards = Shards(layout.shards_dir(config), "train")
    return lambda rank, world: TrainBatches(shards, config.data, 0, 8, 4, rank, world), shards


def test_random_numbers_are_those_of_the_global_batch(batches):
    make, _ = batches
    whole = make(0, 1).at(5)
    parts = [make(r, 3).at(5) for r in range(3)]
    np.testing.assert_array_equal(np.concatenate([p.indices for p in parts]), whole.indices)
    for i in range(1, len(whole)):
        assert torch.equal(torch.cat([p[i] for p in parts]), whole[i])
    assert not torch.equal(make(0, 1).at(6).noise, whole.noise)
    assert make(0, 1).at(5).flip.any() and whole.angle.abs().max() <= np.deg2rad(5)


def test_only_the_wanted_attributes_in_the_wanted_order(batches):
    make, shards = batches
    batch = make(0, 1).at(0)
    _, attributes = shards.gather(batch.indices)
    names = shards.attribute_names
    np.testing.assert_array_equal(
        batch.attributes.numpy(), attributes[:, [names.index("Young"), names.index("Male")]]
    )


def test_prefetcher_keeps_order_and_passes_errors_on():
    assert list(Prefetcher(lambda s: s * s, 2, 6)) == [4, 9, 16, 25]

    def fails(step):
        if step == 3:
            raise OSError("disk")
        return step

    seen = []
    with pytest.raises(OSError, match="disk"):
        for item in Prefetcher(fails, 0, 9):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_closing_a_prefetcher_ends_its_thread():
    before = threading.active_count()
    running = Prefetcher(lambda s: s, 0, 10**9)
    assert next(iter(running)) == 0
    running.close()
    assert threading.active_count() == before
