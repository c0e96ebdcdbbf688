"""Encoded shards: the bytes, the pixels, the order, and what a damaged one says."""

import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset

from pipeline.config.load import load
from pipeline.data.encoded.crops import cut_box, random_boxes
from pipeline.data.encoded.packer import image_file
from pipeline.data.encoded.reader import EncodedShards
from pipeline.data.loader import TrainBatches
from pipeline.data.shards import Shards
from pipeline.data.sources.decode import decode
from pipeline.data.staging import open_shards
from pipeline.errors import ConfigError, DataError
from pipeline.rundir import layout


@pytest.fixture(scope="module")
def encoded(encoded_overrides):
    return load([], encoded_overrides)


@pytest.fixture(scope="module")
def both(tiny_overrides, encoded):
    """The same 48 images as strided and as encoded shards."""
    strided = Shards(layout.shards_dir(load([], tiny_overrides)), "train")
    return strided, open_shards(layout.shards_dir(encoded), "train", encoded.data)


def by_key(shards):
    """Every sample of a split, in the order of its keys."""
    keys = shards.keys(np.arange(len(shards)))
    order = np.argsort(keys)
    images, attributes = shards.gather(order)
    return sorted(keys), images, attributes


def test_pixels_labels_and_keys_are_those_of_strided_shards(both):
    strided, encoded = both
    assert isinstance(encoded, EncodedShards)
    theirs, ours = by_key(strided), by_key(encoded)
    assert ours[0] == theirs[0]
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_array_equal(ours[2], theirs[2])
    np.testing.assert_array_equal(encoded.attributes(), encoded.gather(np.arange(48))[1])


def test_webdataset_reads_the_tars_and_finds_the_original_files(encoded, noise_celeba):
    tars = sorted(layout.shards_dir(encoded).glob("train-*.tar"))
    dataset = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    samples = list(dataset)
    assert len(samples) == 48
    for sample in samples[::7]:
        original = noise_celeba / "img_align_celeba" / f"{sample['__key__']}.jpg"
        assert sample["jpg"] == original.read_bytes()
        assert np.load(io.BytesIO(sample["attrs.npy"])).shape == (40,)


def test_the_index_names_the_bytes_that_the_tar_lists(both):
    shards = both[1]
    with tarfile.open(shards.folder / shards.entries[0]["file"]) as tar:
        for row, member in enumerate(m for m in tar if m.name.endswith(".jpg")):
            stored = tar.extractfile(member)
            assert stored is not None and stored.read() == shards.content(0, row)


class Odd:
    """A reader whose pixels are not those that its file holds: it turns images upside down."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, name):
        return decode(self.content)[::-1]

    def read_bytes(self, name):
        return self.content


def test_an_image_that_its_reader_changes_is_stored_as_its_pixels(noise_celeba):
    original = (noise_celeba / "img_align_celeba" / "000001.jpg").read_bytes()
    content, pixels = image_file(Odd(original), "1")
    assert content.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decode(content), pixels)


def test_a_random_crop_depends_on_the_position_alone():
    whole = random_boxes(3, range(0, 200), 0.3)
    np.testing.assert_array_equal(random_boxes(3, range(50, 60), 0.3), whole[50:60])
    share = whole[:, 2] * whole[:, 3]
    assert share.min() > 0.25 and share.max() <= 1 and share.std() > 0.1
    assert random_boxes(3, range(0), 0.3).shape == (0, 4)


def test_a_box_lies_within_a_square_of_any_side():
    for side in (1, 7, 148):
        square = np.arange(side * side).reshape(side, side, 1)
        cuts = [cut_box(square, box) for box in random_boxes(3, range(200), 0.3)]
        corners = {(int(piece[0, 0, 0]), int(piece[-1, -1, 0])) for piece in cuts}
        assert all(piece.size and max(piece.shape) <= side for piece in cuts)
        assert side == 1 or len(corners) > side
    low = np.array([0.999999, 0.0, 0.5, 1.0])
    assert cut_box(np.arange(100).reshape(10, 10, 1), low).ravel().tolist() == list(range(50, 100))


def test_crops_reach_the_batch_and_need_encoded_shards(both, encoded):
    strided, shards = both
    plain = TrainBatches(shards, encoded.data, 0, 8, 4, 0, 1).at(3)
    cropping = replace(encoded.data, random_crop=0.2)
    parts = [TrainBatches(shards, cropping, 0, 8, 4, rank, 3).at(3) for rank in range(3)]
    cropped = TrainBatches(shards, cropping, 0, 8, 4, 0, 1).at(3)
    assert cropped.images.shape == plain.images.shape and not (cropped.images == plain.images).all()
    assert (np.concatenate([part.images for part in parts]) == cropped.images.numpy()).all()
    assert (cropped.flip == plain.flip).all()
    with pytest.raises(ConfigError, match="random_crop"):
        TrainBatches(strided, cropping, 0, 8, 4, 0, 1)


@pytest.mark.parametrize(
    "size, stored", [(64, "strided"), (128, "strided"), (129, "encoded"), (256, "encoded")]
)
def test_the_format_follows_from_the_size(size, stored):
    assert load([], [f"shard.size={size}"]).shard.stored_as == stored
    assert load([], [f"shard.size={size}", "shard.format=encoded"]).shard.stored_as == "encoded"


def test_encoded_shards_keep_the_background():
    with pytest.raises(ConfigError, match=r"shard\.background"):
        load([], ["shard.format=encoded", "shard.background=green"])


def test_the_digest_of_strided_shards_does_not_know_the_key(tiny_overrides, encoded):
    plain = layout.shards_digest(load([], tiny_overrides))
    assert layout.shards_digest(load([], [*tiny_overrides, "shard.format=strided"])) == plain
    assert layout.shards_digest(encoded) != plain


@pytest.fixture
def copy(encoded, tmp_path):
    """A folder with the same shards, to damage."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for file in layout.shards_dir(encoded).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def cut(file):
    file.write_bytes(file.read_bytes()[:-3000])


def change(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, change, lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["train-00001.tar", "train-00001.index.safetensors"])
def test_a_damaged_file_is_named(copy, encoded, name, damage):
    damage(copy / name)
    with pytest.raises(DataError, match=name):
        open_shards(copy, "train", encoded.data)
    left = open_shards(copy, "train", replace(encoded.data, damaged="exclude"))
    assert left.excluded == {"train-00001.tar": 4} and len(left) == 44
