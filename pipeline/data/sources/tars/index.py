"""What a tar holds: its samples, grouped as WebDataset groups them, and where each image lies."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from pipeline.data.sources.decode import ENDINGS
from pipeline.data.sources.tars.places import Tar, open_tar
from pipeline.errors import DataError

LABELS = ("json", "npy", "cls")  # endings of labels, the first one wins
MOST_LABEL_BYTES = 1 << 20
RECORD = 10_240  # bytes: writers of tars fill up to a multiple of this with zeros
_END = 1024  # zero bytes that end a tar
_BLOCK = 512
_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset skips


class Sample(NamedTuple):
    """One sample of a tar."""

    key: str
    image: str  # ending of the image's member
    start: int  # of the image in the tar, bytes
    length: int
    form: str  # of the label: one of LABELS
    label: bytes


def samples_of(tar: Tar) -> Iterator[Sample]:
    """Yield the samples of a tar in its order. Raises DataError if it is cut, damaged or incomplete.

    A member's content is only read if it is a label. Nothing is unpickled or unpacked.
    """
    try:
        with open_tar(tar) as file:
            members = list(_members(tar, file))
        grouped = list(_group(members))
    except DataError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise _damaged(tar, " ".join(str(error).split())[:160]) from None
    if not grouped:
        raise _damaged(tar, "it holds no sample")
    for sample in grouped:
        yield _sample(tar, sample)


def _group(members: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Group members by WebDataset's own rule. Its safe mode is on: no pickles, no shell."""
    os.environ["WDS_SECURE"] = "1"  # read when the library is imported
    from webdataset import tariterators, utils

    utils.enforce_security = True  # another part may have imported the library before
    yield from tariterators.group_by_keys(members)


def _members(tar: Tar, file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield each file with its place, and a label's content. Raises DataError if the end is missing."""
    start = file.read(_BLOCK)
    if start.startswith(b"\x1f\x8b"):
        raise DataError(
            f"{tar.url}: is packed by gzip, so single images cannot be read; unpack it with gunzip"
        )
    file.seek(0)
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as opened:
        for member in opened:
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            if not member.isreg() or _META.match(member.name):
                continue
            place: dict[str, Any] = {"start": member.offset_data, "length": member.size, "content": b""}
            ending = member.name.rsplit(".", 1)[-1].lower()
            if ending in LABELS:
                place["content"] = _content(tar, opened, member)
            yield {"fname": member.name, "data": place, "__url__": tar.url}
    _check_end(tar, file, end)


def _content(tar: Tar, opened: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MOST_LABEL_BYTES:
        raise _damaged(tar, f"label {member.name} has {member.size} bytes, more than {MOST_LABEL_BYTES}")
    stream = opened.extractfile(member)
    content = b"" if stream is None else stream.read()
    if len(content) != member.size:
        raise _damaged(tar, f"it ends within {member.name}")
    return content


def _check_end(tar: Tar, file: IO[bytes], end: int) -> None:
    """Raise DataError if a tar does not end as tars do. Its reader would leave out the rest in silence."""
    file.seek(0, os.SEEK_END)
    left = file.tell() - end
    file.seek(end)
    rest = file.read(min(left, RECORD + _END + 1)) if left > 0 else b""
    if any(rest):
        raise _damaged(tar, f"the header at byte {end} is broken")
    if left < _END:
        raise _damaged(tar, f"it is cut off at byte {end + max(0, left)}: the end mark is missing")
    if left > RECORD + _END:
        raise _damaged(tar, f"it holds only zeros from byte {end} on")


def _damaged(tar: Tar, reason: str) -> DataError:
    return DataError(f"{tar.url}: {reason}; copy or pack this tar again")


def _sample(tar: Tar, grouped: dict[str, Any]) -> Sample:
    """Return one sample. Raises DataError unless it has one image and a label."""
    key = grouped["__key__"]
    parts = {ending: place for ending, place in grouped.items() if isinstance(place, dict)}
    images = [ending for ending in parts if f".{ending.rsplit('.', 1)[-1]}" in ENDINGS]
    there = ", ".join(sorted(parts))
    if len(images) != 1:
        said = "no image" if not images else f"{len(images)} images"
        raise DataError(
            f"{tar.url}: sample {key!r:.100} has {said} ({there}); expected one of {', '.join(ENDINGS)}"
        )
    for form in LABELS:
        labels = [ending for ending in parts if ending.rsplit(".", 1)[-1] == form]
        if len(labels) > 1:
            raise DataError(f"{tar.url}: sample {key!r:.100} has {len(labels)} labels ({', '.join(labels)})")
        if labels:
            place = parts[images[0]]
            return Sample(key, images[0], place["start"], place["length"], form, parts[labels[0]]["content"])
    raise DataError(
        f"{tar.url}: sample {key!r:.100} has no label ({there}); expected one of .{', .'.join(LABELS)}"
    )
