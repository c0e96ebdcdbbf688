"""Tars behind a URL: fetched ahead into a bounded folder, once per node, verified, named when damaged."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config.load import dump, load
from pipeline.data.encoded.ahead import Ahead
from pipeline.data.encoded.cache import FETCHERS, POLL_S
from pipeline.data.encoded.remote import Remote
from pipeline.data.encoded.room import Room, Wish
from pipeline.data.loader import TrainBatches
from pipeline.data.order import KeyedStream
from pipeline.data.staging import open_shards
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.rundir import layout
from pipeline.rundir.lock import try_lock
from tests.conftest import ROOT
from tests.pipeline.data.bucket import bucket
from tools.dev.benchmarks.store import serving

BATCH = 8


@pytest.fixture(scope="module")
def config(encoded_overrides):
    return load([], encoded_overrides)


@pytest.fixture
def store(config):
    with serving(layout.shards_dir(config)) as store:
        yield store


def remote(config, store, cache_dir, tars=5.0):
    """The same shards behind the store's URL, with room for `tars` tars on this node."""
    entries = open_shards(layout.shards_dir(config), "train", config.data).entries
    largest = max(entry["bytes"] for entry in entries)
    gigabytes = tars * largest / 1e9
    return replace(config.data, tars=store.url, cache_dir=str(cache_dir), cache_gb=gigabytes)


def batches(config, data, rank=0, world=1):
    shards = open_shards(layout.shards_dir(config), "train", data)
    return TrainBatches(shards, data, 0, BATCH, 4, rank, world)


def test_batches_are_those_of_local_tars_and_the_folder_stays_within_its_limit(config, store, tmp_path):
    data = remote(config, store, tmp_path)
    near, far = batches(config, config.data), batches(config, data)
    folder = next((tmp_path / f"cvae-cache-{os.getuid()}").iterdir())
    try:
        for step in range(18):  # three epochs of 48
            ours, theirs = far.at(step), near.at(step)
            assert (ours.indices == theirs.indices).all() and (ours.images == theirs.images).all()
            with far.shards.tars.room.lock():  # no file gets another name meanwhile
                held = sum(file.stat().st_size for file in folder.iterdir())
            assert held <= data.cache_gb * 1e9 + 12 * 30  # and the list of wanted tars
    finally:
        far.shards.close()
    sizes = {entry["file"]: entry["bytes"] for entry in far.shards.entries}
    for name, size in sizes.items():
        assert store.sent[name] % size == 0 and 1 <= store.sent[name] / size <= 4  # whole tars, once an epoch
    assert not list(folder.glob("reader-*"))


def test_a_cache_that_cannot_be_made_names_its_key(config, store, tmp_path):
    (tmp_path / f"cvae-cache-{os.getuid()}").touch()
    with pytest.raises(StorageError, match="^key 'data.cache_dir': .* could not be written"):
        batches(config, remote(config, store, tmp_path))


def test_one_epoch_fetches_each_tar_once(config, store, tmp_path):
    far = batches(config, remote(config, store, tmp_path, tars=20))
    try:
        for step in range(12):
            far.at(step)
    finally:
        far.shards.close()
    assert {entry["file"]: entry["bytes"] for entry in far.shards.entries} == dict(store.sent)


def test_a_bucket_gives_the_batches_of_local_tars(config, store, tmp_path, monkeypatch):
    local = layout.shards_dir(config)
    with bucket(monkeypatch, sorted(local.glob("*.tar")), "hq") as url:
        data = replace(remote(config, store, tmp_path), tars=url)
        near, far = batches(config, config.data), batches(config, data)
        try:
            for step in range(8):
                ours, theirs = far.at(step), near.at(step)
                assert (ours.indices == theirs.indices).all() and (ours.images == theirs.images).all()
        finally:
            far.shards.close()
        few = open_shards(local, "val", data).gather(np.array([4, 0]))[0]  # single images, by ranges
        np.testing.assert_array_equal(few, open_shards(local, "val", config.data).gather(np.array([4, 0]))[0])
        lost = batches(config, replace(data, tars=f"{url}-no", cache_dir=str(tmp_path / "other")))
        with pytest.raises(DataError, match="s3://faces/hq-no/.*tar: is not there"):
            lost.at(0)
        lost.shards.close()


def test_a_store_that_refuses_is_asked_once(store, monkeypatch):
    asked = []

    def refuse(url, **wanted):
        asked.append(url)
        raise PermissionError("Forbidden")

    far = Remote(store.url)
    monkeypatch.setattr(far._files, "cat_file", refuse)
    with pytest.raises(DataError, match=r"may not be read \(Forbidden\); give the jobs a login"):
        far.read("x.tar", 0, 1)
    assert len(asked) == 1


def test_two_ranks_fetch_each_tar_once(config, store, tmp_path):
    data = remote(config, store, tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(dump(replace(config, data=data)))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    ranks = []
    for rank in range(2):
        command = [sys.executable, str(ROOT / "tests/workers/read_batches.py"), str(file), str(rank)]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
    try:
        for _ in range(6):
            for rank in ranks:
                assert rank.stdout.readline()
            for rank in ranks:
                rank.stdin.write("\n")
                rank.stdin.flush()
        assert [rank.wait(240) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    again = []
    for entry in open_shards(layout.shards_dir(config), "train", config.data).entries:
        times = store.sent[entry["file"]] / entry["bytes"]
        # The next epoch may have begun, with as many tars as the folder holds. The end of a rank cuts its
        # fetch of such a tar, and the other rank may fetch it then.
        assert 1 <= times < 3
        again.append(times > 1)
    assert sum(again) <= 5


def test_single_images_are_read_alone_and_remembered(config, store, tmp_path):
    shards = open_shards(layout.shards_dir(config), "val", remote(config, store, tmp_path))
    local = open_shards(layout.shards_dir(config), "val", config.data)
    chosen = np.array([4, 0])
    np.testing.assert_array_equal(shards.gather(chosen)[0], local.gather(chosen)[0])
    sent = sum(store.sent.values())
    shards.gather(chosen)
    assert sum(store.sent.values()) == sent < sum(entry["bytes"] for entry in shards.entries)


def first_tar(config, data) -> str:
    """The tar that the first batch needs first."""
    near = batches(config, config.data)
    return near.shards.entries[next(iter(Ahead(near.stream, [1] * 12, 12).at(0)))]["file"]


def test_a_tar_that_is_cut_while_it_streams_is_named(config, store, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.data.encoded.remote.FIRST_WAIT_S", 0.001)
    name = first_tar(config, config.data)
    store.cut_after[name] = 5000
    far = batches(config, remote(config, store, tmp_path))
    with pytest.raises(DataError, match=rf"{store.url}/{name}: bytes 0 to \d+ cannot be read"):
        far.at(0)
    far.shards.close()
    assert not list(tmp_path.rglob(".*.tmp"))


def test_a_tar_that_differs_from_the_manifest_is_named(config, tmp_path):
    name = first_tar(config, config.data)
    copy = tmp_path / "store"
    copy.mkdir()
    for file in layout.shards_dir(config).glob("*.tar"):
        (copy / file.name).write_bytes(file.read_bytes())
    content = bytearray((copy / name).read_bytes())
    content[600] ^= 1
    (copy / name).write_bytes(content)
    with serving(copy) as store:
        far = batches(config, remote(config, store, tmp_path / "cache"))
        with pytest.raises(DataError, match=f"{name}: its sha256 differs"):
            far.at(0)
        far.shards.close()


def test_a_tar_that_something_changed_in_the_folder_is_fetched_again(config, store, tmp_path):
    data = remote(config, store, tmp_path, tars=20)
    far = batches(config, data)
    far.at(0)
    far.shards.close()
    name = first_tar(config, data)
    file = next(tmp_path.rglob(name))
    file.write_bytes(file.read_bytes()[:-512])
    again = batches(config, data)
    assert (again.at(0).images == batches(config, config.data).at(0).images).all()
    again.shards.close()


def test_what_a_killed_process_left_is_removed(config, store, tmp_path):
    data = remote(config, store, tmp_path)
    folder = open_shards(layout.shards_dir(config), "train", data).tars.folder
    name = first_tar(config, data)
    (folder / f".{name}.tmp").write_bytes(bytes(100))
    (folder / ".val-00000.tar.tmp").write_bytes(bytes(int(data.cache_gb * 1e9)))  # nobody fetches this one
    (folder / "reader-1-dead.json").write_text(json.dumps([name]))
    far = batches(config, data)
    far.at(0)
    far.shards.close()
    assert not (folder / "reader-1-dead.json").exists() and not list(folder.glob(".*.tmp"))


def test_nobody_can_delete_a_tar_before_it_is_noted(config, store, tmp_path, monkeypatch):
    held = []

    def noting(file, digest):
        lock = file.with_name("room.lock")
        with lock.open("a+") as opened:
            held.append(not try_lock(opened.fileno(), lock))

    monkeypatch.setattr("pipeline.data.encoded.cache.remember", noting)
    far = batches(config, remote(config, store, tmp_path))
    far.at(0)
    far.shards.close()
    assert held and all(held)


def wishes(**places):
    """Tars of ten bytes, and where each is read first."""
    return {tar: Wish(place, 10) for tar, place in places.items()}


def ready(room, tar):
    """Fetch a tar, if there is room."""
    if not room.reserve(tar, 10):
        return False
    room.temporary(tar).rename(room.folder / tar)
    return True


def test_a_tar_that_is_not_wanted_any_more_is_not_fetched(tmp_path):
    room = Room(tmp_path, 100)
    room.name(wishes(a=0, b=1))
    assert room.reserve("a", 10)
    room.name(wishes(b=1))
    assert not room.reserve("a", 10) and room.reserve("b", 10)
    assert not room.reserve("b", 101)
    room.leave()


@pytest.fixture
def two_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    rooms = Room(tmp_path, 30), Room(tmp_path, 30)
    yield rooms
    for room in rooms:
        room.leave()


def test_the_tar_of_the_slowest_rank_goes_before_those_of_the_fast_one(two_ranks, tmp_path):
    """A rank that starts late finds the folder full of what the other reads later."""
    fast, slow = two_ranks
    fast.name(wishes(**{"b.tar": 4, "c.tar": 8, "d.tar": 12}))
    assert all(ready(fast, tar) for tar in ("b.tar", "c.tar", "d.tar"))
    slow.name(wishes(**{"a.tar": 0, "b.tar": 4, "c.tar": 8}))
    assert ready(slow, "a.tar")
    assert {file.name for file in tmp_path.glob("*.tar")} == {"a.tar", "b.tar", "c.tar"}
    assert not ready(fast, "d.tar")  # its turn comes when the slow rank has left the first one
    slow.name(wishes(**{"b.tar": 4, "c.tar": 8, "d.tar": 12}))
    assert ready(fast, "d.tar") and not (tmp_path / "a.tar").exists()


def test_a_tar_takes_no_place_that_an_earlier_one_needs(two_ranks):
    """The rank that fetches the earlier one may hold its lock without having reserved its place."""
    fast, slow = two_ranks
    slow.name(wishes(**{"a.tar": 0, "b.tar": 4, "c.tar": 8}))
    assert ready(slow, "a.tar") and ready(slow, "b.tar")
    fast.name(wishes(**{"b.tar": 4, "c.tar": 8, "d.tar": 12}))
    assert not ready(fast, "d.tar")
    assert ready(slow, "c.tar")


def test_another_run_keeps_what_it_reads_soon(two_ranks, tmp_path, monkeypatch):
    ours, _ = two_ranks
    ours.name(wishes(**{"a.tar": 900, "b.tar": 904}))
    assert ready(ours, "a.tar") and ready(ours, "b.tar")
    monkeypatch.setenv("MASTER_PORT", "29501")
    other = Room(tmp_path, 30)
    other.name(wishes(**{"c.tar": 0, "d.tar": 4}))
    assert ready(other, "c.tar") and not ready(other, "d.tar")
    other.leave()


def test_threads_that_wait_for_room_leave_the_folder_to_others(config, store, tmp_path, monkeypatch):
    """They woke each other without end: a rank could hardly get the lock to say what it needs."""
    monkeypatch.setattr("pipeline.data.encoded.cache.PATIENCE_S", 1.0)
    tried = []
    monkeypatch.setattr(Room, "reserve", lambda room, tar, needed: tried.append(tar))
    far = batches(config, remote(config, store, tmp_path))
    begun = time.monotonic()
    far.at(0)
    tries, took_s = len(tried), time.monotonic() - begun
    far.shards.close()
    assert took_s >= 1.0 and tries <= FETCHERS * (1 + took_s / POLL_S)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_tar_without_room_is_waited_for_once(config, store, tmp_path, monkeypatch, caplog, threads):
    """Every batch waited anew. With one thread, the tars behind the first one were waited for without end."""
    monkeypatch.setattr("pipeline.data.encoded.cache.PATIENCE_S", 0.0)
    monkeypatch.setattr("pipeline.data.encoded.cache.FETCHERS", threads)
    data = remote(config, store, tmp_path)
    far, near = batches(config, data), batches(config, config.data)
    (far.shards.tars.folder / "other.tar").write_bytes(bytes(int(data.cache_gb * 1e9)))
    monkeypatch.setattr(Room, "_wishes", lambda room: (room._named, {"other.tar"}))
    for step in range(3):
        assert (far.at(step).images == near.at(step).images).all()
    far.shards.close()
    told = [record.getMessage() for record in caplog.records if "no room for" in record.getMessage()]
    assert told and len(told) == len(set(told))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cache_gb": 1e-6}, "data.cache_gb"),
        ({"cache_dir": ""}, "data.cache_dir"),
        ({"cache_dir": "$NOT_SET_ANYWHERE/x"}, "data.cache_dir"),
        ({"tars": "ftp://host/x"}, "data.tars"),
    ],
)
def test_settings_that_cannot_work_name_their_key(config, store, tmp_path, change, message):
    data = replace(remote(config, store, tmp_path), **change)
    with pytest.raises((ConfigError, DataError), match=message):
        batches(config, data).at(0)


def test_the_shards_ahead_are_those_of_the_stream(config):
    bounds = np.arange(0, 49, 4)
    stream = KeyedStream(bounds, 0, 2, 8)
    ahead = Ahead(stream, [1] * 12, 5)
    for position in range(0, 200, 8):
        listed = ahead.at(position)
        needed = np.searchsorted(bounds, stream.indices(range(position, position + 8)), side="right") - 1
        assert set(needed.tolist()) <= set(listed) and len(listed) == 5
        assert list(listed.values()) == sorted(listed.values())
    assert Ahead(stream, [1] * 12, 5).at(96) == Ahead(KeyedStream(bounds, 0, 2, 8), [1] * 12, 5).at(96)
