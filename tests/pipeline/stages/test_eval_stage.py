"""The eval stage as a whole: the same numbers on any number of ranks, its protocol, its files, its refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.load import load
from pipeline.data.manifest import content_digest
from pipeline.errors import CheckpointError, ConfigError
from pipeline.rundir import layout, record
from pipeline.rundir.files import write_json
from pipeline.runtime.preempt import Stopped
from pipeline.stages import eval as stage
from pipeline.training.checkpoint import Checkpoints
from tests.conftest import ROOT, run_ranks
from tests.tiny_run import (
    ATTRIBUTES,
    SIZE,
    context,
    make_checkpoint,
    make_classifier,
    make_shards,
    tiny_config,
)

WORKER = ROOT / "tests" / "workers" / "evaluation.py"
READ = ["Male", "Heavy_Makeup", "Young", "Smiling"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run directories, one evaluated by 1 rank, one by 2, one by 4; the last finds the reference features of the second."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder)
    make_shards(config, train=400, val=80, test=80)
    make_classifier(config)
    runs = {world_size: folder / f"run{world_size}" for world_size in (1, 2, 4)}
    for world_size, run_dir in runs.items():
        make_checkpoint(run_dir, config, READ)
        if world_size == 2:
            shutil.rmtree(layout.reference_dir(config))
        run_ranks(WORKER, [str(run_dir)], world_size)
    return runs


def results(run_dir: Path, number: int = 1) -> dict[str, Any]:
    """metrics.json of one evaluation."""
    return json.loads((run_dir / "eval" / str(number) / "metrics.json").read_text())


def numbers(tree: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries and lists, but for the times."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {
        k: v for key, value in items if key != "seconds" for k, v in numbers(value, f"{path}/{key}").items()
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_numbers_do_not_depend_on_the_ranks(evaluated: dict[int, Path], world_size: int) -> None:
    alone, together = (numbers(results(evaluated[w])) for w in (1, world_size))
    assert alone.keys() == together.keys()
    for path, value in alone.items():
        assert together[path] == (
            pytest.approx(value, rel=1e-9, abs=1e-9) if isinstance(value, float) else value
        ), path


def test_everything_that_was_promised_is_there(evaluated: dict[int, Path]) -> None:
    found = results(evaluated[1])
    assert {"fd_classifier_recon", "fd_classifier_samples", "attribute_accuracy", "attribute_balanced_accuracy", "rare_success", "mse",
            "sigma", "iw_log_likelihood_nats", "iw_bits_per_dim", "active_units"} <= set(found["metrics"])  # fmt: skip
    assert found["metrics"]["sigma"] == pytest.approx(0.2**0.5)
    assert (
        found["protocol"] | {"n": 40, "split": "test", "step": 10, "weights": "ema", "size": SIZE, "seed": 0}
        == found["protocol"]
    )
    assert {
        "classifier_digest",
        "shards_digest",
        "reference_digest",
        "checkpoint_digest",
        "torch",
        "numpy",
    } <= set(found["protocol"])
    assert all(isinstance(value, str | int | float) for value in found["protocol"].values())
    for section in ("ceilings", "floors"):
        assert {"fd_classifier_samples", "attribute_accuracy"} <= set(found[section])
    assert [name for name in ATTRIBUTES if found["per_attribute"][name]["read_by_model"]] == sorted(READ)
    assert found["rare"] and found["seconds"].keys() >= stage.METRICS.keys() | {
        "gathering",
        "pictures",
        "images: samples",
    }
    assert all(set(row["attributes"]) <= set(READ) for row in found["rare"])


def test_pictures_and_report(evaluated: dict[int, Path]) -> None:
    folder = evaluated[1] / "eval" / "1" / "samples"
    names = [
        "best",
        "heavy_makeup_male",
        "interpolation",
        "neighbours",
        "one_attribute",
        "rare",
        "reconstructions",
        "samples",
        "worst",
    ]
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.png" for name in names]
    samples = np.asarray(Image.open(folder / "samples.png"))
    assert samples.shape == (5 * (SIZE + 2) + 2, 8 * (SIZE + 2) + 2, 3)  # 40 images in rows of 8
    assert (samples[:2] == 255).all() and samples[2 : SIZE + 2, 2 : SIZE + 2].std() > 0
    pairs = np.asarray(Image.open(folder / "reconstructions.png"))
    assert (
        pairs.shape[0] == 3 * 4 * (SIZE + 2) + 2
    )  # 32 originals, each above its reconstruction and the difference
    assert {p.name for p in (evaluated[1] / "eval" / "1" / "plots").iterdir()} == {"tsne.svg", "units.svg"}
    page = (evaluated[1] / "report.html").read_text()
    assert "do z drawn from p(z|y) carry the labels?" in page and "t-SNE" in page


def test_an_unknown_checkpoint_is_named_with_what_is_there(evaluated: dict[int, Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"'bset', expected best, latest, all or a step that is kept \(10\)"
    ):
        stage.run(load([evaluated[1] / "config.yaml"], ["eval.checkpoint=bset"]), context(evaluated[1]))


def test_a_rerun_gets_its_own_folder_the_same_numbers_and_the_same_reference(
    evaluated: dict[int, Path],
) -> None:
    run_dir = evaluated[1]
    references = layout.reference_dir(load([run_dir / "config.yaml"]))
    before = {p: p.stat().st_mtime_ns for p in references.rglob("*.safetensors")}
    assert (
        len(before) == 3
    )  # the split's, as many training images', and those among which copies are looked for
    run_ranks(WORKER, [str(run_dir)], 1)
    assert before == {p: p.stat().st_mtime_ns for p in references.rglob("*.safetensors")}
    assert numbers(results(run_dir, 1)) == numbers(results(run_dir, 2))  # to the last bit


def test_one_changed_image_in_the_shards_never_hits_the_cache(
    evaluated: dict[int, Path], tmp_path: Path
) -> None:
    old = load([evaluated[1] / "config.yaml"])
    new = tiny_config(tmp_path, "eval.metrics=[frechet]")
    shutil.copytree(layout.shared_dir(old), layout.shared_dir(new))
    tar = layout.shards_dir(new) / "test-00000.tar"
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= (
        1  # one level of one pixel; the manifest is written anew, as the shard stage would
    )
    tar.write_bytes(content)
    manifest = json.loads((layout.shards_dir(new) / "manifest.json").read_bytes())
    manifest["splits"]["test"]["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    manifest["content_digest"] = content_digest(
        [entry for split in manifest["splits"].values() for entry in split["shards"]]
    )
    write_json(layout.shards_dir(new) / "manifest.json", manifest)
    make_checkpoint(tmp_path / "run", new, READ)
    before = set(layout.reference_dir(new).glob("*/features.safetensors"))
    stage.run(new, context(tmp_path / "run"))
    made = set(layout.reference_dir(new).glob("*/features.safetensors")) - before
    assert (
        len(made) == 2 and len(before) == 3
    )  # all that this evaluation needs was computed from the images as they are now


def test_two_evaluations_at_a_time_share_one_computation(evaluated: dict[int, Path]) -> None:
    config = load([evaluated[1] / "config.yaml"])
    shutil.rmtree(layout.reference_dir(config))
    runs = [evaluated[1].with_name(name) for name in ("first", "second")]
    for run_dir in runs:
        make_checkpoint(run_dir, tiny_config(evaluated[1].parent, "eval.metrics=[frechet]"), READ)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run_dir: run_ranks(WORKER, [str(run_dir)], 1), runs))
    assert numbers(results(runs[0])) == numbers(results(runs[1]))
    assert len(list(layout.reference_dir(config).glob("*/features.safetensors"))) == 2
    assert not list(layout.reference_dir(config).rglob("*.tmp"))


def test_some_metrics_on_several_ranks_leave_the_headline_to_the_complete_evaluation(
    evaluated: dict[int, Path],
) -> None:
    """What rank 0 draws may not ask for parts of the evidence that only all ranks together can compute."""
    run_dir = evaluated[2]
    whole = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(whole.replace("metrics: []", "metrics: [likelihood]"))
    try:
        run_ranks(WORKER, [str(run_dir)], 2)
    finally:
        (run_dir / "config.yaml").write_text(whole)
    *_, complete, partial = record.evaluations(run_dir)
    assert complete.complete and not partial.complete and "frechet" in partial.protocol["left_out"].split(",")
    assert partial.metrics["iw_log_likelihood_nats"] == pytest.approx(
        complete.metrics["iw_log_likelihood_nats"], rel=1e-12
    )
    assert record.headline([complete, partial]) is complete and record.headline([partial]) is partial
    assert not (partial.folder / "plots").exists() and {p.stem for p in partial.pictures} >= {
        "samples",
        "reconstructions",
    }
    shutil.rmtree(partial.folder)


def test_a_stopped_evaluation_leaves_no_numbers(evaluated: dict[int, Path]) -> None:
    run_dir = evaluated[2]
    asked = context(run_dir)
    asked.stop.requested = True
    with pytest.raises(Stopped):
        stage.run(load([run_dir / "config.yaml"]), asked)
    assert [p.name for p in layout.eval_dirs(run_dir)] == ["1"]


def test_a_number_is_never_given_twice(tmp_path: Path) -> None:
    assert [stage.next_folder(tmp_path).name for _ in range(3)] == ["1", "2", "3"]
    shutil.rmtree(tmp_path / "eval" / "2")
    assert stage.next_folder(tmp_path).name == "4"


def test_a_model_of_other_attributes_is_refused(evaluated: dict[int, Path]) -> None:
    config, run_dir = load([evaluated[1] / "config.yaml"]), evaluated[1].with_name("other")
    make_checkpoint(run_dir, config, ["Male", "Moustache"])
    with pytest.raises(CheckpointError, match="step_00000010.safetensors.*Moustache.*train on these shards"):
        stage.run(config, context(run_dir))


def test_chosen_metrics_of_every_checkpoint_the_best_last(evaluated: dict[int, Path]) -> None:
    config, run_dir = (
        load([evaluated[1] / "config.yaml"], ["eval.checkpoint=all", "eval.metrics=[reconstruction]"]),
        evaluated[1].parent / "all",
    )
    make_checkpoint(run_dir, config, READ)
    store = Checkpoints(layout.checkpoints_dir(run_dir), keep=3)
    kept = store.read(10)
    tensors = {name: kept.tensors("")[name] for name in kept.tensors("")}
    meta = {key: kept.meta[key] for key in ("images", "size", "attributes", "sections", "scaler", "seconds")}
    store.save(20, tensors, {**meta, "validation": {**kept.meta["validation"], "val_ema/loss": 5.0}})  # worse
    store.save(30, tensors, {**meta, "validation": None})  # saved by a stop signal: without a variance
    stage.run(config, context(run_dir))
    found = [results(run_dir, number) for number in (1, 2)]
    assert [tree["protocol"]["step"] for tree in found] == [20, 10] and len(layout.eval_dirs(run_dir)) == 2
    assert all(tree["metrics"].keys() == {"mse", "sigma"} for tree in found)


def test_an_unknown_metric_is_named_with_the_nearest(evaluated: dict[int, Path]) -> None:
    with pytest.raises(ConfigError, match="unknown metric 'frechett'.*did you mean 'frechet'"):
        stage.run(load([evaluated[1] / "config.yaml"], ["eval.metrics=[frechett]"]), context(evaluated[1]))
