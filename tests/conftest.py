"""Shared by the tests: tiny shards of random images, and several real processes of one group."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: processes of a test share two cores, and spinning threads starve each other

import numpy as np
import pytest

from tests.browser import chromium, open_page  # noqa: F401  # fixtures
from tests.survivors import _nothing_survives  # noqa: F401  # a fixture of every session

ROOT = Path(__file__).resolve().parents[1]
ON_SLURM = ("test_chain_on_slurm.py", "test_faults.py", "test_operate.py", "test_queued.py")
LONG = ("test_chain.py", "test_chaos.py", "test_eval_stage.py", "test_trajectory.py")  # minutes each


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Keep the tests of a file together, and all on a real Slurm, so that one cluster runs at a time."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "slurm" if file.endswith(ON_SLURM) else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=lambda item: (item.path.name not in ON_SLURM, item.path.name not in LONG))


@pytest.fixture(scope="session", autouse=True)
def _private_home(tmp_path_factory):
    """No test leaves anything in the user's cache, and none reaches a real MLflow."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(autouse=True)
def _one_thread():
    """Nets this small gain nothing from threads; a stage that ran in this process may have asked for more."""
    import torch

    torch.set_num_threads(1)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file of this process have more than `room` bytes in the block, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_noise_celeba(folder: Path, n: int, seed: int = 0) -> Path:
    """A folder in CelebA's layout whose images are random colours and gradients: cheap, and no two alike."""
    from PIL import Image

    from pipeline.data.sources.celeba_names import CELEBA_ATTRIBUTES

    rng = np.random.default_rng(seed)
    (folder / "img_align_celeba").mkdir(parents=True)
    ramp = np.linspace(0, 1, 218)[:, None, None]
    rows, parts = [], []
    for i in range(1, n + 1):
        top, bottom = rng.integers(0, 256, (2, 1, 1, 3))
        image = np.broadcast_to(top * (1 - ramp) + bottom * ramp, (218, 178, 3)).astype(np.uint8)
        Image.fromarray(image).save(folder / "img_align_celeba" / f"{i:06d}.jpg", quality=90)
        rows.append(f"{i:06d}.jpg " + " ".join(f"{v:2d}" for v in rng.choice([-1, 1], 40)))
        parts.append(f"{i:06d}.jpg {0 if i % 5 else 1 + (i % 10 == 0)}")
    (folder / "list_attr_celeba.txt").write_text(
        f"{n}\n{' '.join(CELEBA_ATTRIBUTES)}\n" + "\n".join(rows) + "\n"
    )
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return folder


@pytest.fixture(scope="session")
def noise_celeba(tmp_path_factory) -> Path:
    """60 images: 48 train, 6 val, 6 test."""
    return write_noise_celeba(tmp_path_factory.mktemp("celeba") / "noise", 60)


@pytest.fixture(scope="session")
def tiny_overrides(tmp_path_factory, noise_celeba) -> list[str]:
    """Overrides of a configuration that trains on 16-pixel shards in seconds; the shards are written once."""
    from pipeline.config import load as configuration

    overrides = [
        f"shard.source={noise_celeba}",
        f"runs_dir={tmp_path_factory.mktemp('runs')}",
        "shard.size=16",
        "shard.samples_per_shard=20",
        "model.net.channels=[8,16]",
        "model.z_dim=8",
        "model.conditioner.width=8",
        "model.prior.hidden=16",
        "model.prior.flow.layers=2",
        "model.prior.flow.hidden=16",
        "train.batch_size=8",
        "train.threads=1",
        "train.precision=fp32",
        "classifier.precision=fp32",
        "train.timeout_s=60",
        "optim.warmup_images=16",
        "train.kl_warmup_images=64",
        "tracking.enabled=false",
    ]
    config = configuration.load([], overrides)
    run_stage_here(config, Path(config.runs_dir) / "shards", "shard")
    return overrides


@pytest.fixture(scope="session")
def encoded_overrides(tiny_overrides, tmp_path_factory) -> list[str]:
    """The same images in encoded shards: 12 training tars of four samples, mixed in pairs."""
    from pipeline.config import load as configuration

    overrides = [
        *tiny_overrides,
        "shard.format=encoded",
        "shard.samples_per_shard=4",
        "data.shards_at_once=2",
    ]
    run_stage_here(configuration.load([], overrides), tmp_path_factory.mktemp("encoded"), "shard")
    return overrides


def run_stage_here(config, run_dir: Path, stage: str) -> None:
    """One stage in this process, alone."""
    from pipeline.config import load as configuration
    from pipeline.run import run_stage

    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(configuration.dump(config))
    run_stage(run_dir, stage)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An MLflow database without runs: to set one up takes MLflow many seconds."""
    from pipeline.tracking.mlflow.store import open_client

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def with_store(empty_store, tmp_path) -> None:
    """The database of runs in `tmp_path` is set up already."""
    with (
        closing(sqlite3.connect(empty_store)) as there,
        closing(sqlite3.connect(tmp_path / "mlflow.db")) as here,
    ):
        there.backup(here)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Random weights in the official file's form, written by torch-fidelity's own network."""
    import torch

    from pipeline.evaluation import vision

    vision._torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "load_state_dict", lambda self, state: None)
        net = Extractor("random", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    torch.save(net.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"
