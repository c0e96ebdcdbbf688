"""Statistics with known answers, what metrics make of evidence with known answers, and the features behind them."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from cvae.distributions import DiagonalGaussian
from pipeline.config.schema import EvalConfig
from pipeline.data.loader import to_float
from pipeline.data.pixels import to_uint8
from pipeline.data.shards import Shards
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import features as features_module
from pipeline.evaluation import vision
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.features import FEATURES, InceptionFeatures
from pipeline.evaluation.metrics.alignment import AttributeAgreement, RareCombinations
from pipeline.evaluation.metrics.inference import Likelihood, Reconstruction
from pipeline.evaluation.metrics.registry import METRICS, Value, collect
from pipeline.evaluation.metrics.statistics import (
    Moments,
    average_precision,
    balanced_accuracy,
    best_threshold,
    bootstrap,
    frechet_distance,
    moments,
    wilson,
)
from pipeline.evaluation.rare import Combination, Counts, requests
from pipeline.evaluation.reference import reference_features, reference_key
from pipeline.rundir import layout
from pipeline.runtime.blocks import map_blocks
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.split import spread
from tests.tiny_run import ATTRIBUTES, SIZE, make_shards, tiny_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with shards in which some pairs of attributes are common enough to count as rare."""
    folder = tmp_path_factory.mktemp("runs")
    make_shards(tiny_config(folder), train=400, val=80, test=80)
    return folder


# ---- statistics


def test_frechet_distance_of_gaussians_that_commute() -> None:
    a, b = (
        Moments(np.array([1.0, 2, 3]), np.diag([1.0, 4, 9])),
        Moments(np.array([1.0, 0, 3]), np.diag([4.0, 4, 1])),
    )
    assert frechet_distance(a, b) == pytest.approx(
        4 + 1 + 0 + 4, abs=1e-12
    )  # |d mu|^2 + sum (sigma_a - sigma_b)^2


@pytest.mark.parametrize("images", [500, 20])  # 20: fewer images than features, a singular covariance
def test_frechet_distance_agrees_with_the_matrix_root(images: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (
        moments(rng.standard_normal((images, 32)) @ rng.standard_normal((32, 32)) + shift)
        for shift in (0.0, 0.5)
    )
    cross = np.trace(scipy.linalg.sqrtm(a.covariance @ b.covariance)).real
    expected = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9 if images == 500 else 1e-5)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_and_to_one_repeated_image() -> None:
    rows = moments(np.random.default_rng(1).standard_normal((300, 16)).astype(np.float32))
    assert abs(frechet_distance(rows, rows)) < 1e-10 * np.trace(rows.covariance)
    point = moments(np.full((1, 16), 2.0))
    expected = np.square(rows.mean - 2).sum() + np.trace(rows.covariance)
    assert frechet_distance(point, rows) == pytest.approx(expected, rel=1e-12)


def test_moments_are_numpys_in_float64() -> None:
    rows = (np.random.default_rng(2).standard_normal((1000, 3)) + 1e4).astype(
        np.float32
    )  # float32 sums would lose the spread
    np.testing.assert_allclose(
        moments(rows).covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9
    )


@pytest.mark.parametrize(
    "scores, labels, expected",
    [
        ([0.9, 0.8, 0.7, 0.1], [1, 1, 0, 0], 1.0),
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.5 * 1 + 0.5 * 2 / 3),  # scikit-learn's own example: 0.83
        ([0.9, 0.8, 0.7], [0, 0, 1], 1 / 3),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 1], 0.5),  # ties count together: the order within them is no merit
        ([1.0, 0.5, 0.5, 0.0], [1, 0, 1, 1], 1 / 3 + 1 / 3 * 2 / 3 + 1 / 3 * 3 / 4),
    ],
)
def test_average_precision(scores: list[float], labels: list[int], expected: float) -> None:
    assert average_precision(np.array(scores), np.array(labels)) == pytest.approx(expected)
    assert np.isnan(average_precision(np.array(scores), np.zeros(len(scores))))


def test_balanced_accuracy_and_reweighting() -> None:
    wanted = np.array([[1, 1], [1, 1], [1, 1], [0, 1]])
    decided = np.array([[1, 1], [1, 0], [0, 1], [0, 1]])
    own = balanced_accuracy(decided, wanted)
    assert own[0] == pytest.approx((2 / 3 + 1) / 2) and np.isnan(
        own[1]
    )  # the second attribute is never absent
    weights = np.array([[1, 1, 0, 1], [2, 1, 1, 0]])
    drawn = balanced_accuracy(decided, wanted, weights)
    assert drawn[0, 0] == 1.0 and np.isnan(drawn[1, 0])
    np.testing.assert_allclose(balanced_accuracy(decided, wanted, np.ones((1, 4)))[0], own)


def test_best_threshold_maximises_balanced_accuracy() -> None:
    assert best_threshold(np.array([3.0, 2.0, 1.0, 0.0]), np.array([1, 1, 0, 0])) == 1.5
    assert best_threshold(np.array([1.0, 2.0]), np.array([1, 1])) == 0.0  # one class: nothing to choose
    rng = np.random.default_rng(3)
    labels = rng.random(200) < 0.1
    scores = rng.standard_normal(200) + 2 * labels
    best = balanced_accuracy((scores > best_threshold(scores, labels))[:, None], labels[:, None])[0]
    assert best == max(balanced_accuracy((scores > t - 1e-12)[:, None], labels[:, None])[0] for t in scores)


@pytest.mark.parametrize(
    "k, n, low, high",
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)  # Newcombe (1998), table I, for 81 of 263
    assert wilson(0, 0) == (0.0, 1.0)


def test_bootstrap_is_deterministic_and_of_the_right_width() -> None:
    x = np.random.default_rng(4).standard_normal(400)
    low, high = bootstrap(lambda weights: weights @ x / len(x), len(x), seed=1)
    assert (low, high) == bootstrap(lambda weights: weights @ x / len(x), len(x), seed=1)
    assert (low, high) != bootstrap(lambda weights: weights @ x / len(x), len(x), seed=2)
    error = x.std() / len(x) ** 0.5
    assert low < x.mean() < high and (high - low) == pytest.approx(2 * 1.96 * error, rel=0.15)


# ---- images and blocks


def test_uint8_conversion_is_the_inverse_of_to_float_and_rounds_and_clamps() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    x = torch.tensor([-1.4, -1.0, 0.0, 0.0 + 0.6 / 127.5, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]  # 127.5 rounds to even


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_blocks_are_the_same_on_any_rank(world_size: int) -> None:
    blocks: list[list[int]] = []
    parts = []
    for rank in range(world_size):
        ranks = SimpleNamespace(rank=rank, world_size=world_size, gather_rows=lambda x: x)
        parts.append(
            map_blocks(lambda i: blocks.append(i.tolist()) or {"x": torch.from_numpy(i)}, 11, 4, ranks)["x"]
        )  # type: ignore[arg-type, func-returns-value]
    assert np.concatenate(parts).tolist() == list(range(11))
    assert {tuple(block) for block in blocks} == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)}


@pytest.mark.parametrize("n, total", [(1, 1), (3, 7), (7, 7), (100, 20_000)])
def test_spread_positions_are_distinct_and_reach_over_the_whole_split(n: int, total: int) -> None:
    positions = spread(n, total)
    assert len(set(positions)) == n and positions[0] == 0 and total - positions[-1] <= -(-total // n)


# ---- rare pairs


def rarest(labels: np.ndarray, held_out: np.ndarray, names: list[str], size: int = 2) -> list[Combination]:
    counts = Counts(labels, labels, held_out, names)
    return [counts.of(chosen) for chosen in counts.rare(size)]


def test_rare_pairs_are_frequent_enough_and_avoid_each_other() -> None:
    labels = np.zeros((1000, 3), np.uint8)
    labels[:500, 0] = labels[440:, 1] = labels[::2, 2] = (
        1  # a and b meet 60 times where 280 are expected; c is independent
    )
    pairs = rarest(labels, labels[300:600], ["a", "b", "c"])
    assert (
        pairs[0].attributes == ("a", "b")
        and pairs[0].annotated_count == pairs[0].train_count == pairs[0].held_out_count == 60
    )
    assert pairs[0].lift == pytest.approx(60 * 1000 / (500 * 560))
    assert not rarest(labels, labels[:100], ["a", "b", "c"])  # held out: they never meet
    asked = requests(labels, ["a", "b", "c"], ("a", "b"), 50, seed=0)
    assert asked[:, :2].all() and 0 < asked[:, 2].mean() < 1 and len(asked) == 50
    assert not labels[600:, 0].any()  # the labels themselves are left alone


def test_contradictions_are_neither_chosen_nor_asked_for() -> None:
    labels = np.zeros((1000, 3), np.uint8)
    labels[:500, 0] = labels[440:, 1] = labels[::2, 2] = 1
    names = ["Straight_Hair", "Wavy_Hair", "Male"]
    assert ("Straight_Hair", "Wavy_Hair") not in [pair.attributes for pair in rarest(labels, labels, names)]
    asked = requests(labels, names, ("Wavy_Hair", "Male"), 50, seed=0)
    assert asked[:, 1:].all() and not asked[:, 0].any()


# ---- metrics of evidence with known answers


class Painter:
    """A model that paints what it is asked for (or always the same), in the cells of `tiny_images`."""

    z_dim, pixels = 4, 3 * SIZE * SIZE

    def __init__(self, listens: bool) -> None:
        self.listens = listens

    def encode(self, x: torch.Tensor, y: torch.Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(x.flatten(1)[:, :4], torch.zeros(len(x), 4))

    def prior(self, y: torch.Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(torch.zeros(len(y), 4), torch.zeros(len(y), 4))

    def decode(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        y = y if self.listens else torch.zeros_like(y)
        shown = torch.zeros(len(y), len(ATTRIBUTES))
        shown[:, READ] = y
        cells = shown.view(-1, 1, 2, 3).repeat_interleave(16, 2).repeat_interleave(11, 3)[..., :SIZE]
        return (cells * 120 + 60).expand(-1, 3, -1, -1) / 127.5 - 1


READ = [3, 2, 5]  # the model reads Male, Heavy_Makeup, Young, in this order


class Cells:
    """Features: mean brightness of every cell; a perfect judge of these images."""

    metric, digest = "fd_classifier", "cells"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.float().mean(-1)
        return torch.stack(
            [
                x[:, 16 * r : 16 * r + 16, 11 * c : 11 * c + 10].mean((1, 2))
                for r in range(2)
                for c in range(3)
            ],
            1,
        )


def evidence(runs: Path, listens: bool = True, **overrides: Any) -> Evidence:
    """Evidence of a Painter before the perfect judge."""
    config = tiny_config(runs)
    splits = {name: Shards(layout.shards_dir(config), name) for name in ("train", "val", "test")}
    judge = SimpleNamespace(
        attributes=ATTRIBUTES, digest="cells", decide=lambda x: x > 120, judge=lambda x: (x, x > 120)
    )
    info = SimpleNamespace(attributes=[ATTRIBUTES[i] for i in READ], s2=0.25, s2_fit=0.2)
    settings = dataclasses.replace(config.eval, **overrides)
    painter: Any = Painter(listens)
    return Evidence(painter, info, judge, [Cells()], settings, splits, Ranks(), runs / "reference", 148)  # type: ignore[arg-type]


def test_attributes_of_a_model_that_listens_and_of_one_that_does_not(runs: Path) -> None:
    found = dict(AttributeAgreement()(evidence(runs)))
    for name in ("attribute_accuracy", "attribute_balanced_accuracy"):
        value, everything, shuffled = (found[name + suffix] for suffix in ("_read", "", "_read_shuffled"))
        assert value.value == value.ceiling == 1.0 and value.interval == (1.0, 1.0) and value.floor < 0.75
        assert everything.value < 1.0 == everything.ceiling  # also those that the model does not read
        assert shuffled.value == value.floor and shuffled.interval[0] < value.floor < shuffled.interval[1] < 1
    assert (
        found["per_attribute"]["Male"]["accuracy"] == 1.0 and found["per_attribute"]["Male"]["read_by_model"]
    )
    assert (
        found["per_attribute"]["Bald"]["balanced_accuracy"] == 0.5
        and not found["per_attribute"]["Bald"]["read_by_model"]
    )
    deaf = dict(AttributeAgreement()(evidence(runs, listens=False)))["attribute_balanced_accuracy_read"]
    assert deaf.value == pytest.approx(0.5) and deaf.ceiling == 1.0


def test_rare_combinations_of_a_model_that_listens_and_of_one_that_does_not(runs: Path) -> None:
    found, deaf = (dict(RareCombinations()(evidence(runs, listens))) for listens in (True, False))
    assert (
        found["rare_success"].value == found["rare_success"].ceiling == 1.0
        and deaf["rare_success"].value == 0.0
    )
    for row in found["rare"]:
        assert row["train_count"] >= 50 and row["held_out_count"] >= 20 and row["n"] == 10 and row["lift"] < 1
        assert (row["low"], row["high"]) == wilson(10, 10) and not row["figure_5"]


def test_reconstruction_error_is_on_the_unit_scale(runs: Path) -> None:
    own = evidence(runs)
    found = dict(Reconstruction()(own))
    images = own.splits["test"].gather(own.positions("test"))[0] / 255
    painted = (
        ((Painter(True).decode(torch.zeros(own.n, 4), torch.from_numpy(own.requested).float()) + 1) / 2)
        .permute(0, 2, 3, 1)
        .numpy()
    )
    mean = (own.splits["train"].gather(own.positions("train"))[0] / 255).mean(0)
    assert found["mse"].value == pytest.approx(np.square(images - painted).mean(), rel=1e-5)
    assert found["mse"].floor == pytest.approx(np.square(images - mean).mean(), rel=1e-5)
    assert found["sigma"].value == 0.5


def test_likelihood_is_the_mean_over_images_in_both_units(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = evidence(runs, n=20, iw_images=12, iw_samples=3)
    monkeypatch.setitem(own.__dict__, "log_likelihood", {"iw": np.arange(12, dtype=np.float32)})
    found = dict(Likelihood()(own))
    assert found["iw_log_likelihood_nats"].value == 5.5
    error = np.arange(12).std(ddof=1) / 12**0.5
    assert found["iw_log_likelihood_standard_error"].value == pytest.approx(error)
    assert found["iw_bits_per_dim"].value == pytest.approx(
        -5.5 / (3 * SIZE * SIZE * np.log(2)) + np.log2(127.5)
    )
    low, high = found["iw_bits_per_dim"].interval or (0, 0)
    assert low < found["iw_bits_per_dim"].value < high
    rows = own.__class__.log_likelihood.func(own)  # type: ignore[attr-defined]
    assert {name: row.shape for name, row in rows.items()} == {
        "iw": (12,),
        "iw_fitted": (12,),
    }  # s2 and s2_fit differ here


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_yields_finite_numbers_and_needs_what_evidence_has(runs: Path, name: str) -> None:
    own, metric = evidence(runs), METRICS[name]()
    assert metric.needs and all(hasattr(Evidence, need) for need in metric.needs)
    found = dict(metric(own))
    values = [value for value in found.values() if isinstance(value, Value)]
    assert found and all(np.isfinite(value.value) for value in values)
    assert values or name == "groups"  # none of these few images' groups is large enough
    sections = collect(found)
    assert set(sections["intervals"]) | set(sections["ceilings"]) | set(sections["floors"]) <= set(
        sections["metrics"]
    )


# ---- features and their cache


def test_reference_cache_is_hit_only_by_the_same_images_and_features(runs: Path, tmp_path: Path) -> None:
    shards = Shards(layout.shards_dir(tiny_config(runs)), "test")
    calls = []

    class Counting(Cells):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            calls.append(len(images))
            return super().__call__(images)

    def ask(n: int = 20, crop: int = 148, digest: str = "a", content: str = "", block: int = 8) -> np.ndarray:
        extractor, given = Counting(), shards
        extractor.digest = digest
        if content:
            given = Shards.__new__(Shards)
            given.__dict__.update(shards.__dict__ | {"content_digest": content})
        calls.clear()
        return reference_features(
            tmp_path, given, reference_key(given, "test", n, block, extractor, crop), extractor, Ranks()
        )

    first = ask()
    assert calls == [8, 8, 4]
    assert np.array_equal(ask(), first) and not calls
    for change in ({"n": 16}, {"crop": 140}, {"digest": "b"}, {"content": "0" * 64}, {"block": 10}):
        ask(**change)  # type: ignore[arg-type]
        assert calls, change
    file = next(tmp_path.glob("*/features.safetensors"))
    for file in tmp_path.glob("*/features.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match="features.safetensors: damaged.*delete it"):
        ask()


def test_inception_features_only_from_the_official_file(
    inception_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, judge = torch.device("cpu"), SimpleNamespace()
    with pytest.raises(DataError, match="expected 6726825d"):
        InceptionFeatures(judge, EvalConfig(inception_weights=str(inception_file)), cpu)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eval.inception_weights.*No such file"):
        InceptionFeatures(judge, EvalConfig(inception_weights="/nowhere/weights.pth"), cpu)  # type: ignore[arg-type]
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", digest[:8])
    extractor = InceptionFeatures(judge, EvalConfig(inception_weights=str(inception_file)), cpu)  # type: ignore[arg-type]
    images = torch.randint(0, 256, (2, SIZE, SIZE, 3), dtype=torch.uint8)
    rows = extractor(images)
    assert rows.shape == (2, 2048) and rows.dtype == torch.float32 and extractor.digest == digest
    assert torch.equal(rows, vision.inception(inception_file)(images.permute(0, 3, 1, 2))[0])
    assert extractor.metric == "fid_inception" and set(FEATURES) == {"classifier", "inception", "network"}


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.file,)


def test_code_in_a_weights_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": Bomb(tmp_path / "exploded")}, tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(features_module, "INCEPTION_SHA256", digest[:8])
    with pytest.raises(pickle.UnpicklingError):
        InceptionFeatures(
            SimpleNamespace(),
            EvalConfig(inception_weights=str(tmp_path / "weights.pth")),
            torch.device("cpu"),
        )  # type: ignore[arg-type]
    assert not (tmp_path / "exploded").exists()
