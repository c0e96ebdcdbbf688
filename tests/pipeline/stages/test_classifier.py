"""The attribute classifier: training on any number of ranks, thresholds from val alone, safe
loading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.load import dump
from pipeline.data.shards import Shards
from pipeline.errors import CheckpointError, ConfigError
from pipeline.evaluation import classifier
from pipeline.evaluation.metrics.statistics import balanced_accuracy, best_threshold
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.rundir.lock import locked
from pipeline.runtime.context import WAITING, Context, alone
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.preempt import StopFlag, Stopped
from pipeline.stages import classifier as stage
from pipeline.training.classify import guides, supervised
from tests.conftest import ROOT
from tests.tiny_run import ATTRIBUTES, context, make_classifier, make_shards, tiny_config
from tests.workers.ranks import run_ranks

WORKER = ROOT / "tests" / "workers" / "classifier.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with shards."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(tiny_config(folder))
    return folder


@pytest.fixture(scope="module")
def notes(runs: Path) -> dict[int, Path]:
    """Folders of 1 rank and 3 ranks with the raw gradients of rank 0 and a file per stopped rank."""
    (runs / "config.yaml").write_text(dump(tiny_config(runs, "classifier.seed=5")))
    folders = {world_size: runs / f"group{world_size}" for world_size in (1, 3)}
    for world_size, folder in folders.items():
        folder.mkdir()
        run_ranks(WORKER, [str(runs), str(folder)], world_size)
    return folders


def test_raw_gradients_do_not_depend_on_the_ranks(notes: dict[int, Path]) -> None:
    expected = torch.load(notes[1] / "gradients.pt", weights_only=True)
    found = torch.load(notes[3] / "gradients.pt", weights_only=True)
    assert found.keys() == expected.keys() and len(found) > 60
    for name, gradient in expected.items():  # Adam would hide a wrong scale; shares are unequal
        assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_all_ranks_stop_when_one_is_asked_to(runs: Path, notes: dict[int, Path]) -> None:
    for world_size, folder in notes.items():
        assert sorted(p.name for p in folder.glob("stopped*")) == [f"stopped{r}" for r in range(world_size)]
    assert not layout.classifier_dir(tiny_config(runs, "classifier.seed=5")).exists()


def test_stage_learns_and_writes_what_load_reads(runs: Path) -> None:
    config = tiny_config(runs, "classifier.epochs=6")
    stage.run(config, context(runs))
    folder = layout.classifier_dir(config)
    scores = json.loads((folder / "metrics.json").read_text())
    trained = classifier.load(folder, torch.device("cpu"))
    assert scores["test"]["balanced_accuracy"] > 0.65 > 0.6 > classifier_at_random(runs)
    assert trained.attributes == ATTRIBUTES and list(scores["val"]["per_attribute"]) == ATTRIBUTES
    logits = {
        name: supervised.predict(trained.net, Shards(layout.shards_dir(config), name), Ranks())
        for name in ("val", "test")
    }
    labels = {name: Shards(layout.shards_dir(config), name).attributes().astype(bool) for name in logits}
    thresholds = [best_threshold(logits["val"][:, i], labels["val"][:, i]) for i in range(len(ATTRIBUTES))]
    np.testing.assert_allclose(trained.thresholds, thresholds)  # nothing of the test split is in them
    for name in logits:
        own = scores[name]["per_attribute"]
        np.testing.assert_allclose(
            [own[a]["accuracy"] for a in ATTRIBUTES], ((logits[name] > 0) == labels[name]).mean(0)
        )
        expected = balanced_accuracy(logits[name] > np.array(thresholds), labels[name])
        np.testing.assert_allclose([own[a]["balanced_accuracy"] for a in ATTRIBUTES], expected)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    stage.run(config, context(runs))  # other runs use it: it is made once
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@contextmanager
def made_meanwhile(lock: Path, runs: Path, make: Callable[[], object]) -> Iterator[Context]:
    """The context of a stage that finds `lock` held by another launch, which makes its files and ends."""
    with ExitStack() as other:
        other.enter_context(locked(lock))

        class Waiting(StopFlag):
            requested = property(lambda self: bool(make() and other.close()), lambda self, value: None)

        yield replace(context(runs), stop=Waiting())


def test_a_classifier_that_another_launch_makes_is_waited_for_and_kept(runs, monkeypatch) -> None:
    config = tiny_config(runs, "classifier.seed=11")
    folder = layout.classifier_dir(config)
    monkeypatch.setattr(stage, "train", None)
    with made_meanwhile(folder.with_suffix(".lock"), runs, lambda: make_classifier(config) or True) as ours:
        stage.run(config, ours)
    assert classifier.load(folder, torch.device("cpu")).attributes == ATTRIBUTES


def test_guides_that_another_launch_makes_are_waited_for_and_kept(runs, monkeypatch) -> None:
    config = tiny_config(runs, "classifier.seed=12")
    folders = [layout.guide_dir(config, name) for name in guides.NETS]

    def make() -> bool:
        for folder in folders:
            write_json(folder / "model.json", {})
        return True

    monkeypatch.setattr(guides, "_train_guide", None)
    with made_meanwhile(folders[0].with_suffix(".lock"), runs, make) as ours:
        guides.train_guides(config, ours)
    assert all((folder / "model.json").exists() for folder in folders)


class FollowingRank(Ranks):
    """Rank 1, which hears these texts from rank 0."""

    def __init__(self, *texts: str) -> None:
        super().__init__(1, 2)
        self.texts = list(texts)

    def text_from_main(self, text: str) -> str:
        return self.texts.pop(0)


def test_other_ranks_wait_with_rank_0_in_short_steps(tmp_path) -> None:
    ranks = FollowingRank(WAITING, WAITING, "")
    with alone(tmp_path / "x.lock", context(tmp_path, ranks)):
        assert not ranks.texts
    with pytest.raises(Stopped, match="^asked to stop$"):
        with alone(tmp_path / "x.lock", context(tmp_path, FollowingRank(WAITING, "asked to stop"))):
            pass
    assert not (tmp_path / "x.lock").exists()


def classifier_at_random(runs: Path) -> float:
    """Balanced accuracy of untrained weights on the test split, at thresholds fixed on it: even so
    it knows nothing.
    """
    torch.manual_seed(0)
    shards = Shards(layout.shards_dir(tiny_config(runs)), "test")
    logits = supervised.predict(classifier.AttributeNet(len(ATTRIBUTES)), shards, Ranks())
    return float(balanced_accuracy(logits > np.median(logits, 0), shards.attributes()).mean())


def test_two_trainings_are_bitwise_equal(runs: Path) -> None:
    nets = [
        stage.train(tiny_config(runs).classifier, *splits(runs), context(runs)).state_dict() for _ in range(2)
    ]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


def splits(runs: Path) -> tuple[Shards, Shards]:
    """Train and validation images."""
    folder = layout.shards_dir(tiny_config(runs))
    return Shards(folder, "train"), Shards(folder, "val")


def test_score_of_an_image_does_not_depend_on_its_neighbours() -> None:
    net, x = classifier.AttributeNet(4).double(), torch.randn(5, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-10, atol=1e-10)
    assert not [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_logits_from_features_are_those_of_the_net(runs: Path) -> None:
    config = tiny_config(runs, "classifier.seed=8")
    make_classifier(config)
    trained = classifier.load(layout.classifier_dir(config), torch.device("cpu"))
    x = torch.rand(3, 3, 32, 32)
    from_features = trained.logits(trained.net.features(x).numpy())
    np.testing.assert_allclose(from_features, trained.net(x).numpy(), rtol=1e-4, atol=1e-5)


def test_damaged_or_missing_files_are_named(runs: Path) -> None:
    config = tiny_config(runs, "classifier.seed=9")
    folder = layout.classifier_dir(config)
    with pytest.raises(CheckpointError, match="model.json.*classifier. stage"):
        classifier.load(folder, torch.device("cpu"))
    make_classifier(config)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        classifier.load(folder, torch.device("cpu"))


def test_fewer_images_than_ranks_is_an_error(runs: Path) -> None:
    config = tiny_config(runs, "classifier.batch_size=2")
    with pytest.raises(ConfigError, match="classifier.batch_size.*3 ranks"):
        stage.train(config.classifier, *splits(runs), context(runs, Ranks(0, 3)))


@pytest.mark.parametrize(("size", "dtype"), [(16, torch.float32), (32, torch.bfloat16)])
def test_a_last_level_of_one_pixel_is_computed_in_fp32(size: int, dtype: torch.dtype) -> None:
    """Its bf16 gradient reads memory that nobody wrote, on CPUs with instructions for bf16."""
    net, seen = classifier.AttributeNet(4), []
    net.body.layer4[0].conv1.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.zeros(2, 3, size, size))
    assert seen == [dtype]
