"""Write toy faces into a folder in CelebA's official layout."""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Generator
from concurrent.futures import as_completed
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.data.sources.toy.attributes import NAMES, sample_attributes
from pipeline.data.sources.toy.faces import draw_face
from pipeline.data.sources.toy.style import sample_style
from pipeline.errors import ConfigError, DataError
from pipeline.rundir.files import naming
from pipeline.runtime.logs import progress
from pipeline.runtime.preempt import StopFlag, Stopped, serve_parent, worker_pool
from pipeline.runtime.split import ceil_div

ANNOTATIONS, PARTITION, IMAGES = "list_attr_celeba.txt", "list_eval_partition.txt", "img_align_celeba"
CHUNK = 50  # faces that a process draws at a time
WHAT = f"toy faces (chunks of {CHUNK})"
QUALITY = 90  # of the JPEG files


def make_toy_celeba(
    out: Path,
    n: int,
    seed: int,
    processes: int = 1,
    logger: logging.Logger | None = None,
    stop: StopFlag | None = None,
) -> None:
    """Draw `n` faces into the new folder `out`. A complete one of the same `n` and `seed` is left alone.

    Face i is a pure function of (seed, i): neither `n` nor `processes` changes it. The folder appears
    by one rename. Raises ConfigError for an impossible `n`, DataError if `out` holds anything else, and
    Stopped soon after a stop request; nothing is then left.
    """
    if not 1 <= n <= 999_999:
        raise ConfigError(f"key 'toy.n': got {n}, expected 1 to 999999 faces")
    annotations = _annotations(n, seed)
    if _already_there(out, n, annotations):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial_out = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with naming(out):
            (partial_out / IMAGES).mkdir(parents=True)
            log = logger or logging.getLogger("cvae.toy")
            with closing(_draw_all(partial_out / IMAGES, n, seed, processes)) as drawn:
                for _ in progress(drawn, ceil_div(n, CHUNK), WHAT, log):
                    if stop and stop.requested:
                        raise Stopped("asked to stop; the next start draws the toy faces again")
            _write(partial_out / PARTITION, "".join(f"{file_name(i)} {split(i)}\n" for i in range(n)))
            _write(partial_out / ANNOTATIONS, annotations)
            _publish(partial_out, out, n, annotations)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)


def file_name(index: int) -> str:
    """Return the official name of an image; names count from 1."""
    return f"{index + 1:06d}.jpg"


def split(index: int) -> int:
    """Return the split of an image: 0 (train), 1 (val) or 2 (test), in 8, 1 and 1 of every ten."""
    return max(0, index % 10 - 7)


def _stream(seed: int, index: int) -> tuple[np.random.Generator, np.ndarray]:
    """Return the random numbers of one face; their first 40 are the noise of its attributes."""
    rng = np.random.default_rng([seed, index])
    return rng, rng.standard_normal(len(NAMES))


def _annotations(n: int, seed: int) -> str:
    """Return list_attr_celeba.txt: the count, the names, and one row of -1 and 1 per image."""
    present = sample_attributes(np.stack([_stream(seed, i)[1] for i in range(n)]))
    lines = [f"{n}\n", f"{' '.join(NAMES)} \n"]
    for i, row in enumerate(present.tolist()):
        values = " ".join(" 1" if holds else "-1" for holds in row)
        lines.append(f"{file_name(i)} {values}\n")
    return "".join(lines)


def _draw_all(folder: Path, n: int, seed: int, processes: int) -> Generator[None, None, None]:
    """Draw all faces and yield after each chunk. To close it ends the workers."""
    draw = partial(_draw_chunk, folder, n, seed)
    chunks = range(0, n, CHUNK)
    pool = worker_pool(min(processes, len(chunks)), serve_parent)
    if pool is None:
        yield from map(draw, chunks)
        return
    try:
        for future in as_completed([pool.submit(draw, start) for start in chunks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_chunk(folder: Path, n: int, seed: int, start: int) -> None:
    for index in range(start, min(start + CHUNK, n)):
        rng, noise = _stream(seed, index)
        present = sample_attributes(noise[None])[0]
        names = frozenset(name for name, there in zip(NAMES, present, strict=True) if there)
        draw_face(names, sample_style(rng)).save(folder / file_name(index), quality=QUALITY)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="ascii", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _publish(partial_out: Path, out: Path, n: int, annotations: str) -> None:
    try:
        os.replace(partial_out, out)
    except OSError:  # another process may have been faster; its folder is as good
        if not _already_there(out, n, annotations):
            raise


def _already_there(out: Path, n: int, annotations: str) -> bool:
    """Return whether `out` is complete. Raises DataError if it is not absent, empty or complete."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    file = out / ANNOTATIONS
    same = file.is_file() and file.read_text(encoding="utf-8") == annotations
    if same and sum(1 for _ in (out / IMAGES).glob("*.jpg")) == n:
        return True
    raise DataError(
        f"{out}: expected an absent folder or the {n} toy faces of this seed, but it holds something else; "
        "remove it or name another one"
    )
