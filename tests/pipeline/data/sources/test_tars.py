"""Tars that others made: on disk, behind real HTTP and S3 servers, through a program; cut ones."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.sources.base import ImageError
from pipeline.data.sources.celeba import Celeba
from pipeline.data.sources.tars.places import find_tars
from pipeline.data.sources.tars.source import Tars
from pipeline.errors import DataError
from tests.celeba_source import jpeg, make_source
from tests.pipeline.data.bucket import bucket
from tests.pipeline.data.sources.layouts import add, make_manifest, refusal, write_tars


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.fixture(scope="module")
def celeba(tmp_path_factory: pytest.TempPathFactory) -> Celeba:
    return Celeba.open(make_source(tmp_path_factory.mktemp("official") / "celeba"))


@pytest.fixture
def tars(celeba: Celeba, tmp_path: Path) -> list[Path]:
    """train-000 to 002, validation-000 and test-000."""
    return write_tars(celeba, tmp_path / "tars")


def same(found: object, celeba: Celeba) -> None:
    """Assert that a source holds CelebA's labels, splits and images."""
    assert isinstance(found, Tars)
    assert found.keys == celeba.keys
    np.testing.assert_array_equal(found.labels, celeba.labels)
    np.testing.assert_array_equal(found.splits, celeba.splits)
    for name, original in list(zip(found.names, celeba.names, strict=True))[::5]:
        assert found.images.read_bytes(name) == celeba.images.read_bytes(original)  # type: ignore[attr-defined]


class Ranged(SimpleHTTPRequestHandler):
    """Serves files, and parts of them if asked."""

    parts = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Serve a file, or `Range: bytes=A-B` of it."""
        asked = self.headers.get("Range", "")
        if not asked or not self.parts:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last or len(content)) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)


class Whole(Ranged):
    """Serves whole files only, like `python -m http.server`."""

    parts = False


@pytest.fixture(params=[Ranged, Whole])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    handler = partial(request.param, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


PATTERN = "{train-{000..002},validation-000,test-000}.tar"


def test_http(server: str, tars: list[Path], celeba: Celeba) -> None:
    same(Tars.open_all(f"{server}/tars/{PATTERN}", False), celeba)
    with pytest.raises(DataError, match="train-009.tar: cannot be read .FileNotFoundError"):
        Tars.open_all(f"{server}/tars/train-{{009..010}}.tar", False)


def test_s3(tars: list[Path], celeba: Celeba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bucket(monkeypatch, tars, "v1") as url:
        found = make_manifest(f"{url}/{PATTERN}", tmp_path / "runs")
        local = make_manifest(tmp_path / "tars", tmp_path / "runs")
        assert found["content_digest"] == local["content_digest"]
        with pytest.raises(DataError, match="s3://faces/v2/a.tar: cannot be read"):
            Tars.open_all("s3://faces/v2/a.tar", False)


def test_a_program_runs_only_if_allowed_and_never_in_a_shell(
    tars: list[Path], celeba: Celeba, tmp_path: Path
) -> None:
    pattern = f"pipe:cat {tmp_path}/tars/{PATTERN}"
    with pytest.raises(DataError, match="would start a program; set shard.allow_pipe=true"):
        Tars.open_all(pattern, False)
    same(Tars.open_all(pattern, True), celeba)
    with pytest.raises(DataError, match="ended with exit code 1"):
        Tars.open_all(f"pipe:cat {tars[0]} ; touch {tmp_path}/harm", True)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://host/a.tar", "ftp is not known here"),
        ("https://me:word@host/a.tar", "https://...: the URL holds a user or a query"),
        ("https://host/a.tar?X-Amz-Signature=1", "https://...: the URL holds a user or a query"),
        ("/nowhere/{0..2}.tar", "/nowhere/0.tar: no such file"),
    ],
)
def test_places_that_cannot_be_used(place: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_tars(place, False)
    assert "word" not in str(caught.value) and "Signature" not in str(caught.value)


# ---- labels


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


@pytest.mark.parametrize("name", ["a {b} c", "a{b,c}", "a}b", "a::b", "a.tar"])
def test_any_name_of_a_folder(name: str, tmp_path: Path) -> None:
    """Braces and `::` mean something in the name of a tar only, and a folder's name may end in .tar."""
    folder = tmp_path / name
    folder.mkdir()
    tars = [folder / f"{split}-0.tar" for split in ("test", "train")]
    for tar in tars:
        tar.touch()
    for place in (folder, folder / "{test,train}-0.tar", f"{tars[0]}::{tars[1]}"):
        found = find_tars(str(place), allow_pipe=False)
        assert [found_tar.local for found_tar in found] == [str(tar) for tar in tars]


def test_a_tar_whose_own_name_has_braces(tmp_path: Path) -> None:
    tar = tmp_path / "a{b,c}.tar"
    tar.touch()
    assert [found.local for found in find_tars(str(tar), allow_pipe=False)] == [str(tar)]


def test_vectors_and_classes(celeba: Celeba, tmp_path: Path) -> None:
    write_tars(celeba, tmp_path / "npy", npy, "attrs.npy")
    vectors = Tars.open(tmp_path / "npy")
    assert vectors.attributes[:2] == ("attribute_00", "attribute_01")
    np.testing.assert_array_equal(vectors.labels, celeba.labels)

    write_tars(celeba, tmp_path / "cls", lambda labels: str(int(labels[0] + labels[1])).encode(), "cls")
    classes = Tars.open(tmp_path / "cls")
    assert classes.attributes == ("class_0", "class_1", "class_2") == classes.info.exclusive[0]
    np.testing.assert_array_equal(classes.labels.argmax(1), celeba.labels[:, 0] + celeba.labels[:, 1])


def test_tars_that_count_from_zero_each(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for split in ("train", "val", "test"):
        with tarfile.open(tmp_path / "tars" / f"{split}.tar", "w") as tar:
            for i in range(2):
                add(tar, f"{i:04d}.PNG", jpeg(i, 20, 20))
                add(tar, f"{i:04d}.json", json.dumps({"attributes": {"red": i}, "size": 2}).encode())
    found = Tars.open(tmp_path / "tars")
    assert found.keys == ["test-0000", "test-0001", "train-0000", "train-0001", "val-0000", "val-0001"]
    assert found.labels[:, 0].tolist() == [0, 1] * 3 and found.attributes == ("red",)


def write_labels(folder: Path, labels: dict[str, list[dict[str, object]]]) -> Path:
    """Write tars of these JSON labels, counted from 0000 in each."""
    for name, trees in labels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / name, "w") as tar:
            for i, tree in enumerate(trees):
                add(tar, f"{i:04d}.png", jpeg(i, 20, 20))
                add(tar, f"{i:04d}.json", json.dumps(tree).encode())
    return folder


def test_tars_of_one_name_in_a_folder_for_each_split(tmp_path: Path) -> None:
    labels = {f"{split}/000.tar": [{"red": 1}] for split in ("train", "val", "test")}
    found = Tars.open(write_labels(tmp_path / "tars", labels))
    assert found.keys == ["test-000-0000", "train-000-0000", "val-000-0000"]


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    labels = {f"{split}/ä.tar": [{"red": 1}] for split in ("train", "val", "test")}
    for tar in write_labels(tmp_path / "tars", labels).rglob("*.tar"):
        with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as again:
            add(again, f"{tar.parent.name} ü.png", jpeg(1, 20, 20))
            add(again, f"{tar.parent.name} ü.json", b'{"red": 1}')
    keys = Tars.open(tmp_path / "tars").keys
    assert [key.split("_")[0] for key in keys] == ["test", "train", "val"]


def test_all_samples_tell_what_is_an_attribute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = {"red": 0, "faces": 1, "age": 30}, {"red": 1, "faces": 2, "age": 0}
    labels = {f"{split}.tar": [first, second] for split in ("train", "val", "test")}
    found = Tars.open(write_labels(tmp_path / "tars", labels))
    assert found.attributes == ("red",)
    assert "not binary, so no attributes: faces (2), age (30)" in caplog.text
    labels["train.tar"] = [{"red": 0}, {"red": 1, "round": 1}]
    with pytest.raises(DataError, match="sample '0000' has no key 'round', unlike others"):
        Tars.open(write_labels(tmp_path / "partial", labels))


# ---- damage


def cut_at(position: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: position if position > 0 else len(content) + position])

    return damage


def boundary(file: Path) -> int:
    """The byte at which the second sample's image begins its header."""
    with tarfile.open(file) as tar:
        return tar.getmembers()[2].offset


def cut_between_members(file: Path) -> None:
    cut_at(boundary(file))(file)


def zeroed_tail(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[boundary(file) :] = bytes(len(content) - boundary(file) + 10_240)
    file.write_bytes(content)


def broken_header(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[boundary(file) + 150] ^= 1  # the header's checksum
    file.write_bytes(content)


def without_label(file: Path) -> None:
    with tarfile.open(file, "a") as tar:
        add(tar, "lonely.jpg", jpeg(1))


def without_image(file: Path) -> None:
    with tarfile.open(file, "a") as tar:
        add(tar, "lonely.json", b"{}")


def label_of(content: bytes, ending: str = "json") -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with tarfile.open(file, "a") as tar:
            add(tar, "odd.jpg", jpeg(1))
            add(tar, f"odd.{ending}", content)

    return damage


def gzipped(file: Path) -> None:
    import gzip

    file.write_bytes(gzip.compress(file.read_bytes()))


DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "within a member": (cut_at(3000), "train-001.tar: unexpected end of data"),
    "between members": (cut_between_members, "train-001.tar: it is cut off at byte .*end mark is missing"),
    "zeroed": (zeroed_tail, "train-001.tar: it holds only zeros from byte"),
    "header": (broken_header, "train-001.tar: the header at byte .* is broken"),
    "empty": (lambda file: file.write_bytes(b""), "train-001.tar: "),
    "html": (lambda file: file.write_bytes(b"<html>quota</html>" * 99), "train-001.tar: "),
    "gzip": (gzipped, "train-001.tar: is packed by gzip"),
    "no label": (without_label, "train-001.tar: sample 'lonely' has no label .jpg."),
    "no image": (without_image, "train-001.tar: sample 'lonely' has no image .json."),
    "no json": (label_of(b"{"), "train-001.tar: the label of sample 'odd' is no JSON"),
    "no key": (label_of(b'{"Male": 1}'), "sample 'odd' has no key '5_o_Clock_Shadow'"),
    "other form": (label_of(b"3", "cls"), "sample 'odd' is .cls, but the first one is .json"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tar_is_named(
    case: str, tars: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGED[case]
    damage(tars[1])
    assert re.search(message, refusal(tars[0].parent, tmp_path / "runs", capsys))


class Harm:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("ending", ["npy", "pkl", "pth", "pyd"])
def test_pickles_are_never_loaded(ending: str, celeba: Celeba, tmp_path: Path) -> None:
    trace = tmp_path / "harm"
    content = pickle.dumps(Harm(str(trace)))
    if ending == "npy":
        content = npy(np.array([Harm(str(trace))], dtype=object))
    write_tars(celeba, tmp_path / "tars", lambda _: content, ending)
    with pytest.raises(DataError, match="has no label|is no .npy array of numbers"):
        Tars.open(tmp_path / "tars")
    assert not trace.exists()


def test_a_damaged_image_is_named_with_its_tar(tars: list[Path], tmp_path: Path) -> None:
    content = bytearray(tars[0].read_bytes())
    content[700:900] = bytes(200)
    tars[0].write_bytes(content)
    with pytest.raises(DataError, match=r"train-000.tar, image at byte 512: is a damaged or truncated JPEG"):
        make_manifest(tars[0].parent, tmp_path / "runs")
    skipped = make_manifest(tars[0].parent, tmp_path / "runs", "shard.skip_damaged=true")
    assert skipped["counts"]["skipped"] == 1
    found = Tars.open(tars[0].parent)
    with pytest.raises(ImageError):
        found.images.read(found.names[found.keys.index("000001")])
