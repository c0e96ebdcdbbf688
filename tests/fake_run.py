"""Synthetic run directories: the documented files, without training."""

from __future__ import annotations

import json
import math
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pipeline.config.load import dump, load

ATTRIBUTES = ["Bald", "Eyeglasses", "Male", "Smiling"]


def make_run(
    runs_dir: Path,
    name: str = "flow_s0",
    overrides: tuple[str, ...] = (),
    steps: int = 0,
    evals: int = 0,
    **evaluation: Any,
) -> Path:
    """A run directory with `steps` metrics records and `evals` complete evaluations."""
    run_dir = runs_dir / name
    run_dir.mkdir(parents=True)
    config = load([], [f"runs_dir={runs_dir}", "train.images=1000", *overrides])
    (run_dir / "config.yaml").write_text(dump(config))
    (run_dir / "inputs.json").write_text(json.dumps({"shards": "5a" * 32}))
    (run_dir / "train").mkdir()
    if steps:
        add_metrics(run_dir, range(1, steps + 1))
    for number in range(1, evals + 1):
        add_eval(run_dir, number, **evaluation)
    return run_dir


def add_metrics(run_dir: Path, steps: range) -> None:
    """Append training records, and validation records every tenth step."""
    with open(run_dir / "train/metrics.jsonl", "a") as file:
        for step in steps:
            lines = [{"step": step, "time": 1.7e9 + step, "values": train_values(step)}]
            if step % 10 == 0:
                lines.append({"step": step, "time": 1.7e9 + step + 0.5, "values": val_values(step)})
            file.writelines(json.dumps(line) + "\n" for line in lines)


def train_values(step: int) -> dict[str, float]:
    """Numbers that look like a training.

    Step 7 has a non-finite gradient norm, as MetricsLog writes it.
    """
    mse = 0.004 + 0.05 * math.exp(-step / 30)
    nll = -9000 + 8000 * math.exp(-step / 30)
    kl = 120 * (1 - math.exp(-step / 20))
    beta = min(1.0, step / 20)
    values: dict[str, Any] = {
        "loss": nll + beta * kl,
        "nll": nll,
        "kl": kl,
        "mse": mse,
        "sigma": 2 * math.sqrt(mse) * 1.02,
        "bits_per_dim": 4.2 + math.exp(-step / 30),
        "beta": beta,
        "lr": 1e-3,
        "grad_norm": "inf" if step == 7 else 0.1 + math.sin(step) ** 2,
        "images_per_s": 800 + step % 7,
        "data_wait_share": 0.03,
    }
    return {f"train/{name}": value for name, value in values.items()}


def val_values(step: int) -> dict[str, float]:
    """Validation of both sets of weights."""
    t = train_values(step)
    one = {n: t[f"train/{n}"] * 0.99 for n in ("loss", "nll", "kl", "mse", "sigma", "bits_per_dim")}
    one |= {
        "active_units": min(128, 3 * step),
        "log_det_min": -5.0,
        "log_det_mean": 1.0 + step / 50,
        "log_det_max": 9.0,
    }
    return {f"{weights}/{n}": v for weights in ("val_ema", "val_raw") for n, v in one.items()}


ABOUT: dict[str, dict[str, Any]] = {
    "fd_classifier_samples": {
        "direction": "lower",
        "meaning": "distance of samples",
        "unit": "",
        "n": 3000,
        "group": "frechet",
        "ceiling_name": "other real images",
        "floor_name": "the mean training image, repeated",
    },
    "sharpness_samples": {"direction": "none", "meaning": "edges", "n": 3000, "group": "sharpness"},
    "fd_classifier_recon": {"direction": "lower", "meaning": "distance of recon", "unit": "", "n": 3000},
    "attribute_accuracy": {"direction": "higher", "meaning": "found in samples", "unit": "", "n": 3000},
    "attribute_accuracy_read": {
        "direction": "higher",
        "meaning": "found in samples",
        "unit": "",
        "n": 3000,
        "over_read_attributes": True,
    },
    "iw_bits_per_dim": {"direction": "lower", "meaning": "bound", "unit": "bits per pixel value", "n": 500},
    "mse": {"direction": "lower", "meaning": "squared error", "unit": "", "n": 3000},
    "sigma": {"direction": "none", "meaning": "decoder standard deviation", "unit": "", "n": 3000},
    "attribute_accuracy_shuffled": {"direction": "none", "meaning": "floor", "n": 3000, "headline": False},
}


GRID = {"side": 16, "gap": 2, "columns": 4, "labels": []}
PICTURES = {  # of grids of 8 images
    "samples": {**GRID, "title": "Samples", "caption": "as asked for", "stack": 1, "count": 8},
    "reconstructions": {**GRID, "title": "Reconstructions", "caption": "pairs", "stack": 2, "count": 8},
}


def add_eval(
    run_dir: Path, number: int, step: int = 90, fd: float = 21.5, unread: str = "", **protocol: Any
) -> Path:
    """A complete evaluation.

    `protocol` overrides its protocol, and the model does not read attribute `unread`.
    """
    folder = run_dir / "eval" / str(number)
    (folder / "samples").mkdir(parents=True)
    for name in ("samples", "reconstructions"):
        (folder / "samples" / f"{name}.png").write_bytes(png(40 * number))
    (folder / "samples/pictures.json").write_text(json.dumps(PICTURES))
    base = {
        "n": 3000,
        "split": "test",
        "size": 64,
        "crop": 148,
        "weights": "ema",
        "step": step,
        "images": step * 128,
        "seed": 0,
        "shards_digest": "5a" * 32,
        "classifier_digest": "c1" * 32,
        "reference_digest": "4e" * 32,
        "features": "classifier",
        "torch": "2.13.0",
        "iw_images": 500,
        "iw_samples": 50,
    }
    accuracy = {"accuracy": 0.9, "real_accuracy": 0.95, "shuffled_accuracy": 0.6}
    pair = {
        "attributes": ["Bald", "Eyeglasses"],
        "train_count": 12,
        "held_out_count": 2,
        "success": 0.4,
        "low": 0.36,
        "high": 0.44,
        "n": 500,
    }
    tree = {
        "protocol": base | protocol,
        "metrics": {
            "fd_classifier_samples": fd,
            "sharpness_samples": 0.4,
            "fd_classifier_recon": 9.25,
            "attribute_accuracy": 0.9,
            "attribute_accuracy_read": 0.91,
            "attribute_accuracy_shuffled": 0.6,
            "iw_bits_per_dim": 4.4,
            "mse": 0.0041,
            "sigma": 0.13,
        },
        "about": ABOUT,
        "intervals": {"fd_classifier_samples": [fd - 0.5, fd + 0.5], "attribute_accuracy": [0.89, 0.91]},
        "ceilings": {"fd_classifier_samples": 1.2, "attribute_accuracy": 0.95, "sharpness_samples": 1.0},
        "floors": {"fd_classifier_samples": 300.0, "attribute_accuracy": 0.6, "sharpness_samples": 0.0},
        "per_attribute": {name: {**accuracy, "read_by_model": name != unread} for name in ATTRIBUTES},
        "rare": [pair],
        "seconds": {"frechet": 12.5},
    }
    (folder / "metrics.json").write_text(json.dumps(tree))
    return folder


def sources_and_tags(page: str) -> tuple[set[str], set[str]]:
    """References (first five characters each) and kinds of elements of an HTML page."""
    sources, tags = set(), set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            for key, value in attrs:
                if key in ("src", "href", "srcset", "data", "action") or key.startswith("on"):
                    sources.add(str(value)[:5])

    Reader().feed(page)
    return sources, tags


def png(shade: int, size: int = 74) -> bytes:
    """A grey PNG, as large as a grid of 4 x 4 images of 16 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    rows = (b"\0" + bytes([shade % 256]) * size) * size
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
