"""Metrics of evidence with known answers, also of very few images."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.evaluation.metrics.alignment import AttributeAgreement
from pipeline.evaluation.metrics.base import Value, collect
from pipeline.evaluation.metrics.groups import AttributePairs, RareCombinations
from pipeline.evaluation.metrics.inference import Likelihood, Reconstruction
from pipeline.evaluation.metrics.registry import METRICS
from pipeline.evaluation.metrics.statistics import wilson
from tests.pipeline.evaluation.painter import READ, Painter, evidence, measure
from tests.tiny_run import ATTRIBUTES, SIZE, make_shards, tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with shards in which some pairs of attributes count as rare."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(tiny_config(folder), train=400, val=80, test=80)
    return folder


def test_attributes_of_a_model_that_listens(runs: Path) -> None:
    found = measure(AttributeAgreement, evidence(runs))
    for name in ("attribute_accuracy", "attribute_balanced_accuracy"):
        read, everything, shuffled = (found[name + suffix] for suffix in ("_read", "", "_read_shuffled"))
        assert read.value == read.ceiling == 1.0 and read.interval == (1.0, 1.0) and read.floor < 0.75
        assert everything.value < 1.0 == everything.ceiling  # also those that the model does not read
        low, high = shuffled.interval
        assert shuffled.value == read.floor and low < read.floor < high < 1
    male, bald = found["per_attribute"]["Male"], found["per_attribute"]["Bald"]
    assert male["accuracy"] == 1.0 and male["read_by_model"]
    assert bald["balanced_accuracy"] == 0.5 and not bald["read_by_model"]


def test_attributes_of_a_model_that_does_not_listen(runs: Path) -> None:
    deaf = measure(AttributeAgreement, evidence(runs, listens=False))["attribute_balanced_accuracy_read"]
    assert deaf.value == pytest.approx(0.5) and deaf.ceiling == 1.0


def test_rare_combinations_of_a_model_that_listens_and_of_one_that_does_not(runs: Path) -> None:
    found = measure(RareCombinations, evidence(runs))
    assert found["rare_success"].value == found["rare_success"].ceiling == 1.0
    for row in found["rare"]:
        assert row["train_count"] >= 50 and row["held_out_count"] >= 20 and row["n"] == 10 and row["lift"] < 1
        assert (row["low"], row["high"]) == wilson(10, 10) and not row["showcase"]
    deaf = measure(RareCombinations, evidence(runs, listens=False))
    assert deaf["rare_success"].value == 0.0


def test_pairs_that_the_model_does_not_read_are_missing_in_its_samples(runs: Path) -> None:
    own = evidence(runs)
    pairs = measure(AttributePairs, own)
    found, labels = pairs["attribute_pairs"], own.annotated.astype(float)
    both = labels.T @ labels / len(labels)
    there = {(i, j): both[i, j] for i, j in itertools.combinations(range(len(ATTRIBUTES)), 2)}
    missing = [share for pair, share in there.items() if not set(pair) <= set(READ)]
    assert found.value == pytest.approx(sum(missing) / len(there))
    assert 0 < found.ceiling < found.value
    low, high = found.interval
    assert low < found.value < high
    worst = pairs["attribute_pairs_off"][0]
    assert worst["samples"] == 0 and worst["real"] == pytest.approx(max(missing))


def test_pairs_tell_independent_attributes_from_those_that_belong_together() -> None:
    rng = np.random.default_rng(0)

    def images(together: bool) -> dict[str, np.ndarray]:
        first, second, third = rng.random((3, 2000, 1)) < 0.5
        return {"fd_classifier": np.hstack([first, first if together else second, third])}

    parts = {"real": images(True), "others": images(True), "samples": images(False)}
    judge = SimpleNamespace(attributes=["a", "b", "c"], decide=lambda rows: rows)
    own = SimpleNamespace(classifier=judge, settings=SimpleNamespace(seed=0), parts=parts)
    kind = type("Parts", (SimpleNamespace,), {"__getitem__": lambda self, part: self.parts[part]})
    found = dict(AttributePairs()(kind(**vars(own))))["attribute_pairs"]
    assert found.value == pytest.approx(0.25 / 3, abs=0.02) and found.floor == pytest.approx(
        0.25 / 3, abs=0.02
    )
    assert found.ceiling < 0.02


def test_reconstruction_error_is_on_the_unit_scale(runs: Path) -> None:
    own = evidence(runs)
    found = measure(Reconstruction, own)
    images = own.splits["test"].gather(own.positions("test"))[0] / 255
    decoded = Painter(True).decode(torch.zeros(own.n, 4), torch.from_numpy(own.requested).float())
    painted = ((decoded + 1) / 2).permute(0, 2, 3, 1).numpy()
    mean = (own.splits["train"].gather(own.positions("train"))[0] / 255).mean(0)
    assert found["mse"].value == pytest.approx(np.square(images - painted).mean(), rel=1e-5)
    assert found["mse"].floor == pytest.approx(np.square(images - mean).mean(), rel=1e-5)
    assert found["sigma"].value == 0.5


def test_likelihood_is_the_mean_over_images_in_both_units(runs: Path) -> None:
    own = evidence(runs)
    own.parts["log_likelihood"] = {"iw": np.arange(12, dtype=np.float32)}
    found = measure(Likelihood, own)
    assert found["iw_log_likelihood_nats"].value == 5.5 and found["iw_log_likelihood_nats"].n == 12
    error = np.arange(12).std(ddof=1) / 12**0.5
    assert found["iw_log_likelihood_standard_error"].value == pytest.approx(error)
    bits = found["iw_bits_per_dim"]
    assert bits.value == pytest.approx(-5.5 / (3 * SIZE * SIZE * np.log(2)) + np.log2(127.5))
    assert bits.interval[0] < bits.value < bits.interval[1]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_yields_finite_numbers_and_says_what_they_are(runs: Path, name: str) -> None:
    found = measure(METRICS[name], evidence(runs))
    values = [value for value in found.values() if isinstance(value, Value)]
    assert values or name == "groups"  # none of these few images' groups is large enough
    for value in values:
        assert np.isfinite(value.value) and value.n > 0 and value.meaning
        assert value.direction in ("lower", "higher", "none")
    sections = collect(found)
    assert sections["about"].keys() == sections["metrics"].keys()
    bounded = {*sections["intervals"], *sections["ceilings"], *sections["floors"]}
    assert bounded <= sections["metrics"].keys()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 11, 12])
@pytest.mark.parametrize("name", METRICS)
def test_very_few_images_give_values_without_intervals_instead_of_errors(
    runs: Path, name: str, n: int, recwarn: pytest.WarningsRecorder
) -> None:
    own = evidence(runs, n=n, neighbour_images=n, iw_images=n)
    sections = collect(measure(METRICS[name], own))
    json.dumps(sections, allow_nan=False)
    for low, high in sections["intervals"].values():
        assert np.isfinite([low, high]).all()
    if n == 1:
        spreads = ("fd_", "kid_", "mse", "iw_", "prior_density", "sharpness", "label_structure")
        assert not [k for k in sections["intervals"] if k.startswith(spreads)]
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_what_is_not_finite_becomes_null_and_unknown_bounds_are_left_out() -> None:
    value = Value(
        value=float("nan"),
        direction="lower",
        meaning="m",
        unit="u",
        n=3,
        interval=(0.0, float("inf")),
        floor=1.0,
    )
    sections = collect({"x": value, "table": [1]})
    assert sections["metrics"] == {"x": None} and sections["table"] == [1]
    assert not sections["intervals"] and not sections["ceilings"] and sections["floors"] == {"x": 1.0}
    assert sections["about"]["x"] == {
        "direction": "lower",
        "meaning": "m",
        "unit": "u",
        "n": 3,
        "headline": True,
        "ceiling_name": "real images",
        "floor_name": "knowing nothing",
        "group": "",
        "over_read_attributes": False,
    }
