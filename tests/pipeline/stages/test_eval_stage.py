"""The eval stage as a whole: equal numbers on any number of ranks, its protocol, files and
refusals.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.schema import RunConfig
from pipeline.data.manifest import content_digest
from pipeline.errors import CheckpointError, ConfigError, StorageError
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.reporting.comparison import compare
from pipeline.rundir import layout, record
from pipeline.rundir.files import write_json
from pipeline.runtime.preempt import Stopped
from pipeline.stages import eval as stage
from pipeline.training.checkpoints.store import Checkpoints
from tests.conftest import ROOT, full_disk
from tests.tiny_run import (
    ATTRIBUTES,
    SIZE,
    context,
    make_checkpoint,
    make_classifier,
    make_shards,
    tiny_config,
)
from tests.workers.ranks import run_ranks

WORKER = ROOT / "tests" / "workers" / "evaluation.py"
READ = ["Male", "Heavy_Makeup", "Young", "Smiling"]


@dataclass(frozen=True)
class Site:
    """A folder of runs with shards, a classifier and evaluated runs.

    Tests that write take a run of their own.
    """

    folder: Path

    def evaluated(self, world_size: int) -> Path:
        """A run that this many ranks evaluated; only to be read."""
        return self.folder / f"run{world_size}"

    def new_run(self, name: str, *overrides: str) -> tuple[RunConfig, Path]:
        """Configuration and directory of a run that was not evaluated yet."""
        config, run_dir = tiny_config(self.folder, *overrides), self.folder / name
        make_checkpoint(run_dir, config, READ)
        return config, run_dir


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Runs evaluated by one rank and by three, whose shares are unequal; each computes its own reference."""
    here = Site(tmp_path_factory.mktemp("runs"))
    config = tiny_config(here.folder)
    make_shards(config, train=400, val=80, test=80)
    make_classifier(config)
    for world_size in (1, 3):
        _, run_dir = here.new_run(f"run{world_size}")
        if world_size == 3:
            shutil.rmtree(layout.shared_dir(config) / "reference")
        run_ranks(WORKER, [str(run_dir)], world_size)
    return here


@pytest.fixture
def own_site(site: Site, tmp_path: Path) -> Site:
    """A copy of the shards and the classifier without cached features, for a test that changes or
    counts them.
    """
    for name in ("shards", "classifier"):
        shutil.copytree(site.folder / "_shared" / name, tmp_path / "_shared" / name)
    return Site(tmp_path)


def results(run_dir: Path, number: int = 1) -> dict[str, Any]:
    """metrics.json of one evaluation."""
    return json.loads((run_dir / "eval" / str(number) / "metrics.json").read_text())


def numbers(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries and lists, without the times."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[str, Any] = {}
    for key, value in items:
        if key != "seconds":
            found |= numbers(value, f"{path}/{key}")
    return found


def reference_files(folder: Path) -> set[Path]:
    """Cached features in a folder of runs."""
    return set((folder / "_shared/reference").glob("*/features.safetensors"))


def test_numbers_do_not_depend_on_the_ranks(site: Site) -> None:
    alone = numbers(results(site.evaluated(1)))
    together = numbers(results(site.evaluated(3)))
    assert alone.keys() == together.keys()
    for path, value in alone.items():
        expected = pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value
        assert together[path] == expected, path


def test_everything_that_was_promised_is_there(site: Site) -> None:
    found = results(site.evaluated(1))
    promised = {
        "fd_classifier_recon",
        "fd_classifier_samples",
        "attribute_accuracy",
        "attribute_balanced_accuracy",
        "rare_success",
        "mse",
        "sigma",
        "iw_log_likelihood_nats",
        "iw_bits_per_dim",
        "active_units",
    }
    assert promised <= found["metrics"].keys()
    assert found["metrics"]["sigma"] == pytest.approx(0.2**0.5)
    for section in ("ceilings", "floors"):
        assert {"fd_classifier_samples", "attribute_accuracy"} <= found[section].keys()
    assert found["about"].keys() == found["metrics"].keys()
    about = found["about"]["fd_classifier_samples"]
    assert (about["direction"], about["group"]) == ("lower", "frechet")
    assert found["about"]["iw_log_likelihood_nats"]["n"] == 6
    read = [name for name in ATTRIBUTES if found["per_attribute"][name]["read_by_model"]]
    assert read == sorted(READ)
    assert found["rare"] and all(set(row["attributes"]) <= set(READ) for row in found["rare"])
    assert found["seconds"].keys() >= {*METRICS, "gathering", "pictures", "images: samples"}


def test_the_protocol_says_how_it_was_measured(site: Site) -> None:
    protocol = results(site.evaluated(1))["protocol"]
    expected = {"n": 40, "split": "test", "step": 10, "weights": "ema", "size": SIZE, "seed": 0}
    assert {key: protocol[key] for key in expected} == expected
    digests = {"classifier_digest", "shards_digest", "reference_digest", "checkpoint_digest"}
    assert digests | {"torch", "numpy"} <= protocol.keys()
    assert all(isinstance(value, str | int | float) for value in protocol.values())


def test_pictures_and_report(site: Site) -> None:
    run_dir = site.evaluated(1)
    folder = run_dir / "eval/1/samples"
    assert {file.stem for file in folder.iterdir()} == {
        "attribute_flip",
        "best",
        "heavy_makeup_male",
        "interpolation",
        "neighbours",
        "one_attribute",
        "pictures",
        "rare",
        "reconstructions",
        "samples",
        "worst",
    }
    samples = np.asarray(Image.open(folder / "samples.png"))
    assert samples.shape == (5 * (SIZE + 2) + 2, 8 * (SIZE + 2) + 2, 3)  # 40 images in rows of 8
    assert (samples[:2] == 255).all() and samples[2 : SIZE + 2, 2 : SIZE + 2].std() > 0
    pairs = np.asarray(Image.open(folder / "reconstructions.png"))
    assert pairs.shape[0] == 3 * 4 * (SIZE + 2) + 2  # 32 images in 4 strips of three rows
    assert {file.name for file in (run_dir / "eval/1/plots").iterdir()} == {"tsne.svg", "units.svg"}
    flips = json.loads((folder / "pictures.json").read_text())["attribute_flip"]
    toggled = np.asarray(Image.open(folder / "attribute_flip.png"))
    assert sorted(flips["labels"]) == sorted(READ) and flips["stack"] == 2  # before and after, 8 faces each
    assert toggled.shape[:2] == (2 * len(READ) * (SIZE + 2) + 2, 8 * (SIZE + 2) + 2)
    page = (run_dir / "report.html").read_text()
    assert "do z drawn from p(z|y) carry the labels?" in page and "t-SNE" in page


@pytest.mark.parametrize("n", [1, 2, 11])
def test_a_very_small_evaluation_reports_what_it_can(site: Site, n: int) -> None:
    config, run_dir = site.new_run(f"tiny{n}", f"eval.n={n}", "eval.iw_images=1", "eval.rare_samples=2")
    stage.run(config, context(run_dir))
    found = results(run_dir)
    assert found["protocol"]["n"] == n
    assert np.isfinite(found["metrics"]["mse"]) and np.isfinite(found["metrics"]["fd_classifier_samples"])
    assert ("kid_classifier_samples" in found["intervals"]) == (n > 2)
    assert ("mse" in found["intervals"]) == (n > 1)
    assert "mse ↓" in (run_dir / "report.html").read_text() and "mse" in compare([run_dir])


def test_an_unknown_checkpoint_is_named_with_what_is_there(site: Site) -> None:
    config, run_dir = site.new_run("unknown", "eval.checkpoint=bset")
    with pytest.raises(
        ConfigError,
        match=r"'bset', expected best, latest, all or the step of a checkpoint that is kept \(10\)",
    ):
        stage.run(config, context(run_dir))


def test_a_rerun_gets_its_own_folder_the_same_numbers_and_the_same_reference(own_site: Site) -> None:
    _, run_dir = own_site.new_run("run", "eval.metrics=[frechet,memorisation,attributes]")
    run_ranks(WORKER, [str(run_dir)], 1)
    before = {file: file.stat().st_mtime_ns for file in reference_files(own_site.folder)}
    assert (
        len(before) == 4
    )  # the split's, as many of the other split's and of training, and those among which copies are searched
    run_ranks(WORKER, [str(run_dir)], 1)
    assert {file: file.stat().st_mtime_ns for file in reference_files(own_site.folder)} == before
    assert numbers(results(run_dir, 1)) == numbers(results(run_dir, 2))  # to the last bit


@pytest.mark.slow  # two evaluations more
def test_a_shared_folder_that_is_read_only_stays_as_it_is(
    own_site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = own_site.folder / "_shared"
    _, other = own_site.new_run("other", "eval.metrics=[frechet]")
    run_ranks(WORKER, [str(other)], 1)  # its features of real images may be used too
    cached = reference_files(own_site.folder)
    for lock in shared.rglob("*.lock"):
        lock.unlink()
    before = {file: file.stat().st_mtime_ns for file in shared.rglob("*")}
    monkeypatch.setattr(layout, "_writable", lambda folder: not folder.is_relative_to(shared))
    for metrics, computed in (("[frechet]", 0), ("[]", 1)):
        config, run_dir = own_site.new_run(f"mine{computed}", f"eval.metrics={metrics}")
        stage.run(config, context(run_dir))
        own = list((own_site.folder / "_own/reference").glob("*/features.safetensors"))
        assert len(own) == computed
    assert len(cached) == 3
    assert {file: file.stat().st_mtime_ns for file in shared.rglob("*")} == before


@pytest.mark.slow  # the reference of all splits once more; test_reference.py has the short form
def test_one_changed_image_in_the_shards_never_hits_the_cache(own_site: Site) -> None:
    config, run_dir = own_site.new_run("run", "eval.metrics=[frechet]")
    stage.run(config, context(run_dir))
    before = reference_files(own_site.folder)
    folder = layout.shards_dir(config)
    tar = folder / "test-00000.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1  # one level of one pixel
    tar.write_bytes(content)
    # The manifest is written anew, as the shard stage would.
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["splits"]["test"]["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
    manifest["content_digest"] = content_digest(entries)
    write_json(folder / "manifest.json", manifest)
    stage.run(config, context(run_dir))
    made = reference_files(own_site.folder) - before
    assert len(made) == len(before) == 3  # everything was computed from the images as they are now


@pytest.mark.slow  # half a minute
def test_two_evaluations_at_a_time_share_one_computation(own_site: Site) -> None:
    runs = [own_site.new_run(name, "eval.metrics=[frechet]")[1] for name in ("first", "second")]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run_dir: run_ranks(WORKER, [str(run_dir)], 1), runs))
    assert numbers(results(runs[0])) == numbers(results(runs[1]))
    assert len(reference_files(own_site.folder)) == 3
    assert not list((own_site.folder / "_shared/reference").rglob("*.tmp"))


def test_some_metrics_on_several_ranks_leave_the_headline_to_the_complete_evaluation(site: Site) -> None:
    """Pictures of rank 0 may not need parts of the evidence that only all ranks together can
    compute.
    """
    _, run_dir = site.new_run("partial", "eval.metrics=[likelihood]")
    run_ranks(WORKER, [str(run_dir)], 2)
    (complete,), (partial,) = record.evaluations(site.evaluated(3)), record.evaluations(run_dir)
    assert complete.complete and not partial.complete
    assert "frechet" in partial.protocol["left_out"].split(",")
    bound = "iw_log_likelihood_nats"
    assert partial.metrics[bound] == pytest.approx(complete.metrics[bound], rel=1e-12)
    assert record.headline([complete, partial]) is complete and record.headline([partial]) is partial
    assert not (partial.folder / "plots").exists()
    assert {file.stem for file in partial.pictures} >= {"samples", "reconstructions"}


def test_a_stopped_evaluation_leaves_no_numbers(site: Site) -> None:
    config, run_dir = site.new_run("stopped")
    asked = context(run_dir)
    asked.stop.requested = True
    with pytest.raises(Stopped):
        stage.run(config, asked)
    assert not layout.eval_dirs(run_dir)


def test_a_full_disk_leaves_no_half_evaluation(site: Site) -> None:
    """Numbers and pictures appear together."""
    config, run_dir = site.new_run("full", "eval.metrics=[sharpness]")
    with full_disk(30_000), pytest.raises(StorageError, match="eval/1/samples/.*could not be written"):
        stage.run(config, context(run_dir))
    assert not layout.eval_dirs(run_dir)


def test_a_number_is_never_given_twice(tmp_path: Path) -> None:
    def number() -> str:
        with stage.next_folder(tmp_path) as folder:
            return folder.name

    assert [number() for _ in range(3)] == ["1", "2", "3"]
    shutil.rmtree(tmp_path / "eval" / "2")
    assert number() == "4"


def test_a_model_of_other_attributes_is_refused(site: Site) -> None:
    config, run_dir = tiny_config(site.folder), site.folder / "other"
    make_checkpoint(run_dir, config, ["Male", "Moustache"])
    with pytest.raises(CheckpointError, match="step_00000010.safetensors.*Moustache.*train on these shards"):
        stage.run(config, context(run_dir))


def test_chosen_metrics_of_every_checkpoint_the_best_last(site: Site) -> None:
    config, run_dir = site.new_run("all", "eval.checkpoint=all", "eval.metrics=[reconstruction]")
    store = Checkpoints(layout.checkpoints_dir(run_dir), keep=3)
    kept = store.read(10)
    tensors = kept.tensors("")
    meta = {key: kept.meta[key] for key in ("images", "size", "attributes", "sections", "scaler", "seconds")}
    worse = {**kept.meta["validation"], "val_ema/loss": 5.0}
    store.save(20, tensors, {**meta, "validation": worse})
    store.save(30, tensors, {**meta, "validation": None})  # saved by a stop signal: without a variance
    stage.run(config, context(run_dir))
    found = [results(run_dir, number) for number in (1, 2)]
    assert [tree["protocol"]["step"] for tree in found] == [20, 10] and len(layout.eval_dirs(run_dir)) == 2
    assert all(tree["metrics"].keys() == {"mse", "sigma"} for tree in found)


def test_an_unknown_metric_is_named_with_the_nearest(site: Site) -> None:
    config, run_dir = site.new_run("misspelt", "eval.metrics=[frechett]")
    with pytest.raises(ConfigError, match="unknown metric 'frechett'.*did you mean 'frechet'"):
        stage.run(config, context(run_dir))


def test_images_of_damaged_tars_that_are_left_out_stand_in_the_protocol():
    whole, damaged = SimpleNamespace(excluded={}), SimpleNamespace(excluded={"test-00001.tar": 40, "b": 2})
    evidence = SimpleNamespace(splits={"train": whole, "val": whole, "test": damaged})
    assert stage._excluded(evidence) == {"excluded_test": 42}
