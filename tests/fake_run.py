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
            file.write(json.dumps({"step": step, "time": 1.7e9 + step, "values": train_values(step)}) + "\n")
            if step % 10 == 0:
                file.write(
                    json.dumps({"step": step, "time": 1.7e9 + step + 0.5, "values": val_values(step)}) + "\n"
                )


def train_values(step: int) -> dict[str, float]:
    """Numbers that look like a training; step 7 has a non-finite gradient norm, as written by MetricsLog."""
    mse = 0.004 + 0.05 * math.exp(-step / 30)
    nll, kl = -9000 + 8000 * math.exp(-step / 30), 120 * (1 - math.exp(-step / 20))
    names = [
        "loss",
        "nll",
        "kl",
        "mse",
        "sigma",
        "bits_per_dim",
        "beta",
        "lr",
        "grad_norm",
        "images_per_s",
        "data_wait_share",
    ]
    grad = "inf" if step == 7 else 0.1 + math.sin(step) ** 2
    beta = min(1.0, step / 20)
    values = [
        nll + beta * kl,
        nll,
        kl,
        mse,
        2 * math.sqrt(mse) * 1.02,
        4.2 + math.exp(-step / 30),
        beta,
        1e-3,
        grad,
        800 + step % 7,
        0.03,
    ]
    return {f"train/{n}": v for n, v in zip(names, values, strict=True)}  # type: ignore[misc]


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


def add_eval(
    run_dir: Path, number: int, step: int = 90, fd: float = 21.5, unread: str = "", **protocol: Any
) -> Path:
    """A complete evaluation; `protocol` overrides entries of the protocol, attribute `unread` is not read by the model."""
    folder = run_dir / "eval" / str(number)
    (folder / "samples").mkdir(parents=True)
    for name in ("random", "reconstructions"):
        (folder / "samples" / f"{name}.png").write_bytes(png(number))
    base = {"n": 3000, "split": "test", "size": 64, "crop": 148, "weights": "ema", "step": step, "images": step * 128, "seed": 0,
            "shards_digest": "5a" * 32, "classifier_digest": "c1" * 32, "reference_digest": "4e" * 32, "features": "classifier",
            "torch": "2.13.0", "iw_images": 500, "iw_samples": 50}  # fmt: skip
    accuracy = {
        a: {"accuracy": 0.9, "real_accuracy": 0.95, "shuffled_accuracy": 0.6, "read_by_model": a != unread}
        for a in ATTRIBUTES
    }
    metrics = {
        "fd_classifier_samples": fd,
        "fd_classifier_recon": 9.25,
        "attribute_accuracy": 0.9,
        "iw_bits_per_dim": 4.4,
        "mse": 0.0041,
    }
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
        "metrics": metrics,
        "intervals": {"fd_classifier_samples": [fd - 0.5, fd + 0.5], "attribute_accuracy": [0.89, 0.91]},
        "ceilings": {"fd_classifier_samples": 1.2, "attribute_accuracy": 0.95},
        "floors": {"fd_classifier_samples": 300.0, "attribute_accuracy": 0.6},
        "per_attribute": accuracy,
        "rare": [pair],
        "seconds": {"frechet": 12.5},
    }
    (folder / "metrics.json").write_text(json.dumps(tree))
    return folder


def sources_and_tags(page: str) -> tuple[set[str], set[str]]:
    """What an HTML page refers to (first five characters each), and the kinds of elements in it, as a browser would see them."""
    sources, tags = set(), set()

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            sources.update(
                str(value)[:5]
                for key, value in attrs
                if key in ("src", "href", "srcset", "data", "action") or key.startswith("on")
            )

    Reader().feed(page)
    return sources, tags


def png(shade: int, size: int = 16) -> bytes:
    """A grey PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes([40 * shade % 256]) * size) * size
    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
