"""Every parser of untrusted files: named errors only, no hang, no execution, no other writes.

`FUZZ_INPUTS=10000 pytest -m "slow or not slow" tests/fuzz` is the long form.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import load as configuration
from pipeline.data.manifest import content_digest
from pipeline.data.shards import Shards
from pipeline.data.sources.celeba_annotations import parse_attributes, parse_partition
from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES
from pipeline.errors import UserError
from pipeline.rundir import layout
from pipeline.rundir.files import seal, write_json
from pipeline.rundir.metrics_log import read_metrics
from pipeline.training.checkpoints.store import Checkpoints
from pipeline.training.checkpoints.weights import load_model
from tests.fuzz.mutate import GUARD, mutate
from tests.tiny_run import make_checkpoint, make_shards, tiny_config

SHORT, LONG = 20, 10_000
LIMIT_S = 20.0  # per input


class Target:
    """A parser and a valid input; `read` parses a mutated input."""

    def __init__(self, base: Path) -> None:
        base.mkdir(parents=True)
        self.folder = base

    content = b""

    def read(self, content: bytes) -> object:
        raise NotImplementedError

    def put(self, name: str, content: bytes) -> Path:
        file = self.folder / name
        file.write_bytes(content)
        return file


class Attributes(Target):
    suffix = "txt"

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        rows = "\n".join(
            f"{i:06d}.jpg " + " ".join(["-1", " 1"][(i + j) % 2] for j in range(40)) for i in range(1, 5)
        )
        self.content = f"4\n{' '.join(CELEBA_ATTRIBUTES)}\n{rows}\n".encode()

    def read(self, content: bytes) -> object:
        return parse_attributes(f"a.{self.suffix}", content)


class AttributesCsv(Attributes):
    suffix = "csv"

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        lines = self.content.decode().splitlines()[1:]
        self.content = "\n".join(
            [f"image_id,{','.join(lines[0].split())}", *(",".join(line.split()) for line in lines[1:])]
        ).encode()


class Partition(Target):
    content = b"000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n"

    def read(self, content: bytes) -> object:
        return parse_partition("p.txt", content)


class Manifest(Target):
    def __init__(self, base: Path) -> None:
        super().__init__(base)
        config = tiny_config(base / "runs")
        make_shards(config, train=3, val=2, test=2)
        self.shards = layout.shards_dir(config)
        self.content = (self.shards / "manifest.json").read_bytes()

    def read(self, content: bytes) -> object:
        try:  # half of the damaged inputs get a digest that fits, as an attacker would write it
            if hashlib.sha256(content).digest()[0] % 2:
                tree = json.loads(content)
                entries = [entry for split in tree["splits"].values() for entry in split["shards"]]
                tree = {k: v for k, v in tree.items() if k != "digest"} | {
                    "content_digest": content_digest(entries)
                }
                content = json.dumps(seal(tree)).encode()
        except Exception:
            pass
        (self.shards / "manifest.json").write_bytes(content)
        return [Shards(self.shards, split, "always").attributes() for split in ("train", "val", "test")]


class Shard(Manifest):
    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.manifest = json.loads(self.content)
        self.content = (self.shards / "val-00000.tar").read_bytes()

    def read(self, content: bytes) -> object:
        (self.shards / "val-00000.tar").write_bytes(content)
        entry = self.manifest["splits"]["val"]["shards"][0]
        entry |= {"bytes": max(1, len(content)), "sha256": hashlib.sha256(content).hexdigest()}
        entries = [e for split in self.manifest["splits"].values() for e in split["shards"]]
        write_json(self.shards / "manifest.json", self.manifest | {"content_digest": content_digest(entries)})
        shards = Shards(self.shards, "val", "always")
        return shards.gather(np.arange(len(shards))), shards.keys(np.arange(len(shards)))


class Yaml(Target):
    content = (
        Path("configs/paper_64.yaml").read_bytes()
        if Path("configs/paper_64.yaml").exists()
        else b"train: {images: 5}\n"
    )

    def read(self, content: bytes) -> object:
        return configuration.load([self.put("c.yaml", content)])


class Override(Target):
    content = b"model.net.channels=[8,16]"

    def read(self, content: bytes) -> object:
        return configuration.load([], [content.decode("utf-8", "surrogateescape")])


class CheckpointJson(Target):
    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.run_dir = base / "run"
        make_checkpoint(self.run_dir, tiny_config(base / "runs"), ["Male", "Young"])
        self.store = Checkpoints(layout.checkpoints_dir(self.run_dir))
        self.file = self.store.path(10).with_suffix(".json")
        self.content = self.file.read_bytes()
        shutil.copy(self.file, base / "good.json")

    def read(self, content: bytes) -> object:
        try:
            if hashlib.sha256(content).digest()[0] % 2:
                tree = json.loads(content)
                content = json.dumps(seal({k: v for k, v in tree.items() if k != "digest"})).encode()
        except Exception:
            pass
        self.file.write_bytes(content)
        self.store.best()
        return load_model(self.run_dir, "latest", "ema", torch.device("cpu"))


class CheckpointTensors(CheckpointJson):
    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.meta = json.loads(self.content)
        self.content = self.store.path(10).read_bytes()

    def read(self, content: bytes) -> object:
        self.store.path(10).write_bytes(content)
        meta = {k: v for k, v in self.meta.items() if k != "digest"} | {
            "sha256": hashlib.sha256(content).hexdigest()
        }
        write_json(self.file, seal(meta))
        return load_model(self.run_dir, "10", "ema", torch.device("cpu"))


class Metrics(Target):
    content = b'{"step": 1, "time": 1.5, "values": {"train/loss": 2.0, "train/kl": "nan"}}\n' * 3

    def read(self, content: bytes) -> object:
        return read_metrics(self.put("metrics.jsonl", content))


TARGETS: tuple[Callable[[Path], Target], ...] = (
    Attributes, AttributesCsv, Partition, Manifest, Shard,
    Yaml, Override, CheckpointJson, CheckpointTensors, Metrics,
)  # fmt: skip


def fuzz(make: Callable[[Path], Target], inputs: int, folder: Path) -> dict[str, int]:
    """Return how many inputs were accepted and refused.

    Raises AssertionError for the first that misbehaves.
    """
    target, counts = make(folder / "work"), {"accepted": 0, "refused": 0}
    os.environ["XDG_CACHE_HOME"] = str(folder / "work" / "cache")
    target.read(target.content)  # the valid input is valid
    for number in range(inputs):
        rng = random.Random(f"{type(target).__name__}/{number}")
        if len(target.content) >= 4096:
            rng.random()  # an unused draw that keeps the inputs of earlier campaigns
        content = mutate(target.content, rng)
        is_large = len(target.content) > 4096
        if is_large and rng.random() < 0.6:  # most of the structure of a large file is at its beginning
            head = mutate(target.content[:2048], rng)
            content = head + target.content[2048:]
        GUARD.seen.clear()
        try:
            with GUARD.watching(folder, LIMIT_S):
                target.read(content)
            counts["accepted"] += 1
        except UserError as error:
            counts["refused"] += 1
            assert str(error), number
        except BaseException as error:
            raise AssertionError(
                f"input {number}: {type(error).__name__}: {str(error)[:300]}; begins {content[:300]!r}"
            ) from error
        assert not GUARD.seen, (number, GUARD.seen)
    assert sorted(p.name for p in folder.iterdir()) == ["work"]
    return counts


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.__name__)
def test_mutated_inputs(target, tmp_path):
    inputs = int(os.environ.get("FUZZ_INPUTS", SHORT))
    counts = fuzz(target, inputs, tmp_path)
    print(f"{target.__name__}: {inputs} inputs, {counts['refused']} refused, {counts['accepted']} accepted")
    assert counts["refused"] > inputs // 20


def test_the_guard_sees_what_it_must(tmp_path):
    with GUARD.watching(tmp_path / "in", 5.0):
        os.system("true")
        open(tmp_path / "out", "w").close()
    assert any("os.system" in seen for seen in GUARD.seen) and any("writes" in seen for seen in GUARD.seen)
    GUARD.seen.clear()


def test_tar_members_cannot_lead_outside(tmp_path):
    """Shards are never extracted, so a member called ../../x is only a key that does not fit."""
    config = tiny_config(tmp_path / "runs")
    make_shards(config, train=3, val=2, test=2)
    folder = layout.shards_dir(config)
    with tarfile.open(folder / "val-00000.tar", "w") as tar:
        member = tarfile.TarInfo("../../evil")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UserError):
        Shards(folder, "val")
    assert not list(tmp_path.rglob("evil"))
