"""Shards: plain tars for others, an array for us, and every kind of damage named."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing.synchronize
import os
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset

from pipeline.config.schema import ShardConfig
from pipeline.data import shards as shards_module
from pipeline.data.annotations import write_annotations
from pipeline.data.manifest import build_manifest, content_digest
from pipeline.data.pixels import crop_centre, resize
from pipeline.data.records import RecordFormat, key_of
from pipeline.data.shards import Shards
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES
from pipeline.data.sources.toy.dataset import make_toy_celeba
from pipeline.data.workers import write_shards
from pipeline.data.writer import plan_shards
from pipeline.errors import DataError
from pipeline.rundir.files import seal, sha256, write_json
from pipeline.runtime.preempt import StopFlag
from tests.celeba_source import make_source

CONFIG = ShardConfig(crop=148, samples_per_shard=5, size=32)
TRAIN = 13  # -> shards of 4, 4 and 5


def write(source: Path, folder: Path, config: ShardConfig = CONFIG, processes: int = 1) -> Path:
    """Shards and manifest of `source` in the new `folder`."""
    folder.mkdir(parents=True)
    celeba = Celeba.open(source)
    reports = list(write_shards(plan_shards(celeba, config, folder), processes, StopFlag()))
    annotations = write_annotations(folder, celeba.annotated)
    write_json(folder / "manifest.json", build_manifest(celeba, config, reports, annotations))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the files of a folder."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that no test changes, beside their source."""
    base = tmp_path_factory.mktemp("shards")
    return write(make_source(base / "source", train=TRAIN, val=2, test=3), base / "folder")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Notes of verified files go to the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cvae-shards"


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the shards to damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


# ---- the format


def test_tarfile_and_webdataset_read_the_same_samples(original: Path) -> None:
    shards = Shards(original, "train")
    keys = shards.keys(np.arange(TRAIN))
    images, attributes = shards.gather(np.arange(TRAIN))
    tars = sorted(original.glob("train-*.tar"))
    plain = {}
    for tar in tars:
        with tarfile.open(tar) as opened:
            for member in opened:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                    0,
                    0,
                    0,
                    "",
                    0o644,
                )
                file = opened.extractfile(member)
                assert file is not None
                plain[member.name] = np.load(BytesIO(file.read()), allow_pickle=False)
    assert list(plain) == [f"{key}.{part}.npy" for key in keys for part in ("attrs", "image")]
    samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == keys
    for i, (key, sample) in enumerate(zip(keys, samples, strict=True)):
        for found in (plain[f"{key}.image.npy"], sample["image.npy"]):
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, images[i])
        for found in (plain[f"{key}.attrs.npy"], sample["attrs.npy"]):
            np.testing.assert_array_equal(found, attributes[i])


@pytest.mark.parametrize("size", [1, 32, 64, 86, 256])
@pytest.mark.parametrize("key", ["0", "a-b_C", "k" * 90])
def test_a_record_is_what_tarfile_and_numpy_would_write(size: int, key: str) -> None:
    record = RecordFormat(size, 40)
    images = np.random.default_rng(size).integers(0, 256, (1, size, size, 3), np.uint8)
    attributes = np.eye(40, dtype=np.uint8)[:1]
    wanted = BytesIO()
    with tarfile.open(fileobj=wanted, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, array in (("attrs", attributes[0]), ("image", images[0])):
            npy = BytesIO()
            np.save(npy, array)
            member = tarfile.TarInfo(f"{key}.{name}.npy")
            member.size = npy.tell()
            npy.seek(0)
            tar.addfile(member, npy)
    packed = record.pack([key], attributes, images)
    assert packed.shape == (1, record.length)
    assert packed.tobytes() == wanted.getvalue()[: record.length]
    assert key_of(bytes(record.members_of(packed.reshape(-1), 1)[0])) == key


def test_samples_are_the_cropped_and_resized_images_of_their_split(original: Path) -> None:
    celeba = Celeba.open(original.parent / "source")
    seen = []
    for index, split in enumerate(("train", "val", "test")):
        shards = Shards(original, split)
        images, attributes = shards.gather(np.arange(len(shards)))
        for i, key in enumerate(shards.keys(np.arange(len(shards)))):
            row = celeba.keys.index(key)
            assert celeba.splits[row] == index
            np.testing.assert_array_equal(attributes[i], celeba.labels[row])
            crop = crop_centre(celeba.images.read(f"{key}.jpg"), 148)
            np.testing.assert_array_equal(images[i], resize(crop[None], 32)[0])
            seen.append(f"{key}.jpg")
        assert shards.manifest["splits"][split]["label_counts"] == attributes.sum(0).tolist()
    assert sorted(seen) == celeba.names


def test_bytes_depend_neither_on_processes_nor_place_nor_packing(original: Path, tmp_path: Path) -> None:
    elsewhere = write(
        make_source(tmp_path / "else where", train=TRAIN, val=2, test=3, archive=True),
        tmp_path / "b",
        processes=2,
    )
    assert contents(elsewhere) == contents(original)


@pytest.mark.parametrize("name", ["/no/folder", "/" + "x" * 300])
def test_without_semaphores_one_process_does_the_work(
    name: str,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The system refuses these names, as it refuses all if /dev/shm is full, closed or missing."""
    named = staticmethod(lambda: name)
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "_make_name", named)
    assert contents(write(original.parent / "source", tmp_path / "b", processes=2)) == contents(original)
    make_toy_celeba(tmp_path / "toy", 51, 0, processes=2)
    assert len(list((tmp_path / "toy/img_align_celeba").iterdir())) == 51
    assert [text[:8] for text in caplog.messages] == ["/dev/shm"] * 2


def test_a_seeded_permutation_assigns_samples_to_even_shards(original: Path, tmp_path: Path) -> None:
    celeba = Celeba.open(original.parent / "source")

    def plan(seed: int) -> list[list[str]]:
        return [
            task.names for task in plan_shards(celeba, ShardConfig(samples_per_shard=5, seed=seed), tmp_path)
        ]

    assert plan(0) == plan(0) != plan(1)
    for names in (plan(0), plan(1), plan(-1)):
        assert sorted(map(len, names)) == [2, 3, 4, 4, 5]
        assert all(shard == sorted(shard) for shard in names)
        assert sorted(sum(names[:3], [])) == celeba.names[:TRAIN] != sum(names[:3], [])


# ---- the array


def test_gather_keeps_the_order_asked_and_repeats(original: Path) -> None:
    shards = Shards(original, "train")
    images, attributes = shards.gather(np.arange(TRAIN))
    keys = shards.keys(np.arange(TRAIN))
    assert len(set(keys)) == TRAIN == len(shards)
    assert len({image.tobytes() for image in images}) == TRAIN
    for asked in (
        np.random.default_rng(0).integers(0, TRAIN, 50),
        np.array([12, 0, 12]),
        np.array([5]),
        np.array([], np.int64),
    ):
        some_images, some_attributes = shards.gather(asked)
        assert some_images.shape == (len(asked), 32, 32, 3) and some_attributes.shape == (len(asked), 40)
        np.testing.assert_array_equal(some_images, images[asked])
        np.testing.assert_array_equal(some_attributes, attributes[asked])
        assert shards.keys(asked) == [keys[i] for i in asked]
    np.testing.assert_array_equal(shards.attributes(), attributes)


def test_gathered_arrays_belong_to_the_caller(original: Path) -> None:
    shards = Shards(original, "val")
    images, attributes = shards.gather(np.array([0]))
    before = images.copy()
    images[:], attributes[:] = 0, 9
    np.testing.assert_array_equal(shards.gather(np.array([0]))[0], before)


def test_what_shards_say_about_themselves(original: Path) -> None:
    shards = Shards(original, "train")
    assert shards.bounds.tolist() == [0, 4, 8, 13] and shards.bounds.dtype == np.int64
    assert (shards.size, tuple(shards.attribute_names)) == (32, CELEBA_ATTRIBUTES)
    lines = [
        f"{file.name} {sha256(file)}\n"
        for split in ("train", "val", "test")
        for file in sorted(original.glob(f"{split}-*"))
    ]
    assert shards.content_digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert shards.manifest["counts"] == {"annotated": 18, "present": 18, "skipped": 0}


@pytest.mark.parametrize("bad", [[-1], [TRAIN], [0, 99]])
def test_positions_outside_are_refused(original: Path, bad: list[int]) -> None:
    with pytest.raises(IndexError, match="expected 0..12"):
        Shards(original, "train").gather(np.array(bad))


# ---- damage


def flip(file: Path, at: int) -> None:
    """Flip one bit in place."""
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)[0]
        opened.seek(at)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("verify", ["once", "always"])
def test_a_flipped_bit_is_found_anywhere(folder: Path, verify: str) -> None:
    Shards(folder, "train", verify)
    flip(folder / "train-00001.tar", 9999)
    with pytest.raises(
        DataError,
        match=r"train-00001.tar: its sha256 differs.*delete it and manifest.json beside it, then run",
    ):
        Shards(folder, "train", verify)
    assert len(Shards(folder, "val", verify)) == 2


def test_missing_extra_and_truncated_tars(folder: Path) -> None:
    (folder / "train-00003.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00003.tar: is not listed in manifest.json; remove it"):
        Shards(folder, "train")
    (folder / "train-00003.tar").unlink()
    os.truncate(folder / "train-00002.tar", 5 * RecordFormat(32, 40).length)
    with pytest.raises(
        DataError, match=r"train-00002.tar: has \d+ bytes, expected \d+ \(5 samples\); delete it"
    ):
        Shards(folder, "train")
    (folder / "train-00002.tar").unlink()
    with pytest.raises(
        DataError, match=r"train-00002.tar: is listed in manifest.json but cannot be read.*delete it"
    ):
        Shards(folder, "train")


def replace_tar(folder: Path, name: str, content: bytes) -> None:
    """Put `content` under `name` and make the manifest agree in everything that it holds."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
    for entry in entries:
        if entry["file"] == name:
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["content_digest"] = content_digest(entries)
    manifest = seal({key: value for key, value in manifest.items() if key != "digest"})
    write_json(folder / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"|u1", b"|i1"),
        (b"False", b" True"),
        (b"(32, 32, 3)", b"(3, 32, 32)"),
        (b".image.npy", b".imagf.npy"),
    ],
)
def test_headers_of_another_type_are_refused_although_the_stride_fits(
    folder: Path, old: bytes, new: bytes
) -> None:
    content = (folder / "val-00000.tar").read_bytes()
    replace_tar(folder, "val-00000.tar", content)
    Shards(folder, "val")
    replace_tar(folder, "val-00000.tar", content.replace(old, new))
    with pytest.raises(DataError, match=r"val-00000.tar: the first record's headers"):
        Shards(folder, "val")


def test_manifest_that_is_missing_damaged_or_of_another_format(folder: Path) -> None:
    file = folder / "manifest.json"
    good = file.read_text()
    for text, message in (
        (good[:100], "manifest.json: is damaged; delete it and run the shard stage again"),
        ("[]", "manifest.json: is damaged"),
        (good.replace('"samples"', '"simples"'), "manifest.json: is damaged"),
        (good.replace('"format": 1', '"format": 2'), "shards of format 2, expected 1"),
        (good.replace("train-00000.tar", "../rain-00000.tar"), "manifest.json: is damaged"),
        (good.replace("train-00000.tar", "train-00009.tar"), "is damaged .its content_digest"),
        (good.replace("train-00000.tar", "train-00001.tar"), "manifest.json: is damaged"),
        (good.replace('"Young"', '"Yonug"'), "manifest.json: is damaged .its digest"),
        ("[" * 100_000, "manifest.json: is damaged"),
    ):
        assert text != good
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            Shards(folder, "train")
    file.unlink()
    with pytest.raises(DataError, match="manifest.json: cannot be read; run the shard stage"):
        Shards(folder, "train")


def test_damage_is_left_out_and_counted_where_that_is_asked_for(
    original: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Shards(original, "train")
    flip(folder / "train-00000.tar", 9999)
    (folder / "train-00002.tar").unlink()
    (folder / "train-00009.tar").write_bytes(b"extra")
    shards = Shards(folder, "train", damaged="exclude")
    assert shards.excluded == {"train-00000.tar": 4, "train-00002.tar": 5} and len(shards) == 4
    np.testing.assert_array_equal(shards.gather(np.arange(4))[0], whole.gather(np.arange(4, 8))[0])
    for name in (
        "train-00000.tar: its sha256",
        "train-00002.tar: is listed",
        "train-00009.tar: is not listed",
        "its 5 samples are left out",
    ):
        assert name in caplog.text
    (folder / "train-00001.tar").write_bytes(b"")
    with pytest.raises(DataError, match="no intact shard of the train split is left"):
        Shards(folder, "train", damaged="exclude")


def test_truncation_at_any_byte_and_swapped_or_doubled_tars_are_found(folder: Path) -> None:
    file, content = folder / "val-00000.tar", (folder / "val-00000.tar").read_bytes()
    for length in {
        0,
        1,
        511,
        512,
        len(content) - 1,
        *np.random.default_rng(0).integers(0, len(content), 40).tolist(),
    }:
        file.write_bytes(content[:length])
        with pytest.raises(DataError, match="val-00000.tar: has"):
            Shards(folder, "val")
    file.write_bytes(content)
    one, two = folder / "train-00000.tar", folder / "train-00001.tar"
    first, second = one.read_bytes(), two.read_bytes()
    for left, right in ((second, first), (first, first)):
        one.write_bytes(left)
        two.write_bytes(right)
        with pytest.raises(DataError, match="sha256 differs"):
            Shards(folder, "train")


def test_unknown_split(original: Path) -> None:
    with pytest.raises(DataError, match="no split 'valid', expected one of train, val, test"):
        Shards(original, "valid")


# ---- how often a file is hashed


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    names: list[str] = []

    def counting(file: Path) -> str:
        names.append(file.name)
        return sha256(file)

    monkeypatch.setattr(shards_module, "sha256", counting)
    return names


def test_once_means_once_per_unchanged_file(folder: Path, hashed: list[str]) -> None:
    for _ in range(3):
        Shards(folder, "val")
    assert hashed == ["val-00000.tar"]
    os.utime(folder / "val-00000.tar", ns=(0, 0))
    Shards(folder, "val")
    assert hashed == ["val-00000.tar"] * 2
    Shards(folder, "val", "always")
    Shards(folder, "val", "always")
    assert hashed == ["val-00000.tar"] * 4


def test_a_failed_verification_is_not_remembered(folder: Path, hashed: list[str]) -> None:
    flip(folder / "val-00000.tar", 9999)
    for _ in range(2):
        with pytest.raises(DataError, match="sha256"):
            Shards(folder, "val")
    assert hashed == ["val-00000.tar"] * 2


def test_a_cache_folder_that_cannot_be_written_costs_time_only(
    folder: Path, hashed: list[str], own_cache: Path
) -> None:
    own_cache.parent.write_text("a file where the folder should be")
    for _ in range(2):
        assert len(Shards(folder, "val")) == 2
    assert hashed == ["val-00000.tar"] * 2


def test_the_closed_cache_of_another_user_costs_time_only(
    folder: Path, hashed: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `su` or in a container with a user id of its own, where HOME is still that of root."""

    def closed(path: Path) -> bool:
        if own_cache in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os.path.exists(path)

    monkeypatch.setattr(Path, "exists", closed)  # root could look into it
    own_cache.parent.write_text("and nothing can be written there")
    for _ in range(2):
        assert len(Shards(folder, "val")) == 2
    assert hashed == ["val-00000.tar"] * 2
