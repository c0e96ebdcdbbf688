"""A small folder in CelebA's official layout for tests: smooth random pictures, random attributes."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import simplejpeg

from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES


def jpeg(seed: int, width: int = 178, height: int = 218) -> bytes:
    """A JPEG of smooth noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    pixels = np.ascontiguousarray(coarse.repeat(16, 0).repeat(16, 1)[:height, :width])
    return simplejpeg.encode_jpeg(pixels, quality=90)


def make_source(
    folder: Path, train: int = 7, val: int = 2, test: int = 2, archive: bool = False, csv: bool = False
) -> Path:
    """Write images 000001.jpg ... (train first, then val, test) and both annotations; returns `folder`."""
    n = train + val + test
    names = [f"{i:06d}.jpg" for i in range(1, n + 1)]
    values = np.random.default_rng(n).choice([-1, 1], (n, 40))
    partition = [0] * train + [1] * val + [2] * test
    folder.mkdir(parents=True)
    write_images(folder, {name: jpeg(i) for i, name in enumerate(names)}, archive)
    if csv:
        rows = [",".join([name, *map(str, row)]) for name, row in zip(names, values, strict=True)]
        (folder / "list_attr_celeba.csv").write_text(
            "\n".join([",".join(["image_id", *CELEBA_ATTRIBUTES]), *rows]) + "\n"
        )
        rows = [f"{name},{p}" for name, p in zip(names, partition, strict=True)]
        (folder / "list_eval_partition.csv").write_text("\n".join(["image_id,partition", *rows]) + "\n")
    else:
        rows = [
            f"{name} " + " ".join(f"{v:2d}" for v in row) for name, row in zip(names, values, strict=True)
        ]
        (folder / "list_attr_celeba.txt").write_text(
            "\n".join([str(n), " ".join(CELEBA_ATTRIBUTES) + " ", *rows]) + "\n"
        )
        (folder / "list_eval_partition.txt").write_text(
            "".join(f"{name} {p}\n" for name, p in zip(names, partition, strict=True))
        )
    return folder


def write_images(folder: Path, images: dict[str, bytes], archive: bool) -> None:
    """Write `images` by name as img_align_celeba.zip or into img_align_celeba/."""
    if archive:
        with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as zipped:
            for name, content in images.items():
                zipped.writestr(f"img_align_celeba/{name}", content)
    else:
        (folder / "img_align_celeba").mkdir(exist_ok=True)
        for name, content in images.items():
            (folder / "img_align_celeba" / name).write_bytes(content)
