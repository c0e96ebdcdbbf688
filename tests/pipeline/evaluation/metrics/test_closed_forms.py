"""Metrics of hand-made rows, against closed forms."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cvae.distributions import DiagonalGaussian
from pipeline.evaluation.metrics.distances import (
    KernelDistance,
    Memorisation,
    Sharpness,
    kernel_error,
    kernel_subset,
)
from pipeline.evaluation.metrics.groups import Groups
from pipeline.evaluation.metrics.inference import LatentStructure, PriorMatch, Units
from pipeline.evaluation.metrics.statistics import wilson
from tests.pipeline.evaluation.painter import given


def on_a_line(distances: list[float]) -> np.ndarray:
    """Features [n, 2] at these distances from the origin."""
    return np.array([[d, 0.0] for d in distances], np.float32)


def test_memorised_is_the_share_closer_than_the_closest_percent_of_real_images() -> None:
    real = on_a_line([1.0 + i for i in range(101)])  # 1, 2, ..., 101: the 1 % quantile is 2, the median 51
    samples = on_a_line([1.5, 20.0, 25.5, 30.0])
    memory = np.array([[-500.0, 0.0], [0.0, 0.0]], np.float32)
    parts = {"real": {"fd_x": real}, "samples": {"fd_x": samples}, "memory": {"fd_x": memory}}
    found = dict(Memorisation()(given(parts)))
    assert found["memorised"].value == 0.25 and found["memorised"].ceiling == 0.01
    assert found["neighbour_distance_ratio"].value == pytest.approx(22.75 / 51)
    assert found["neighbours"][0] == {"sample": 0, "training_image": 1, "distance": 1.5}
    assert [row["sample"] for row in found["neighbours"]] == [0, 1, 2, 3]
    low, high = found["memorised"].interval  # the limit is uncertain too: it may be 1, 2 or 3
    assert low == 0 and high >= 0.5


def test_no_copy_among_few_samples_is_no_certainty() -> None:
    real = on_a_line([1.0 + i for i in range(101)])
    parts = {
        "real": {"fd_x": real},
        "samples": {"fd_x": on_a_line([50.0] * 400)},
        "memory": {"fd_x": np.zeros((2, 2), np.float32)},
    }
    found = dict(Memorisation()(given(parts)))
    assert found["memorised"].value == 0.0
    assert found["memorised"].interval == (0.0, pytest.approx(wilson(0, 400)[1]))


def test_sharpness_is_the_edge_energy_over_that_of_real_images() -> None:
    parts = {
        "reconstructions": {"edges": np.array([1.0, 3.0]), "real_edges": np.array([3.0, 5.0])},
        "samples": {"edges": np.array([4.0, 4.0])},
    }
    found = dict(Sharpness()(given(parts)))
    assert found["sharpness_recon"].value == 0.5 and found["sharpness_samples"].value == 1.0
    # The error of a ratio of means: that of edges - ratio * real edges, over the mean of the real ones.
    half = 1.959964 * np.std([-0.5, 0.5], ddof=1) / 2**0.5 / 4
    assert found["sharpness_recon"].interval == pytest.approx((0.5 - half, 0.5 + half))
    half = 1.959964 * np.std([1.0, -1.0], ddof=1) / 2**0.5 / 4
    assert found["sharpness_samples"].interval == pytest.approx((1 - half, 1 + half))


def test_groups_of_scaled_and_moved_features() -> None:
    """With samples = mean + 2 (real - mean) + shift, FD = |shift|^2 + tr(C), and diversity is 2."""
    rng = np.random.default_rng(0)
    real = rng.standard_normal((600, 3))
    requested = np.zeros((600, 2), np.uint8)
    requested[:300, 0] = 1
    requested[:199, 1] = 1  # one image too few to count
    samples = real.copy()
    group = real[:300]
    samples[:300] = group.mean(0) + 2 * (group - group.mean(0)) + [3.0, 4.0, 0.0]
    parts = {name: {"fd_classifier": real} for name in ("real", "others")}
    parts["samples"] = {"fd_classifier": samples}
    parts["others"] = {"fd_classifier": real + rng.standard_normal(real.shape) / 10}
    own = given(parts, requested)
    own.__dict__.update(labels=lambda split: requested, positions=lambda split: np.arange(600))
    found = dict(Groups()(own))
    assert [(row["attribute"], row["n"]) for row in found["groups"]] == [("attribute 0", 300)]
    assert found["group_fd"].value == pytest.approx(25 + np.trace(np.cov(group.T)))
    assert found["group_diversity"].value == pytest.approx(2.0)
    assert 0 < found["group_fd"].ceiling < 1


def test_units_of_a_silent_and_of_a_telling_posterior() -> None:
    """Unit 0 never moves. Unit 1 is at +-1 with variance v: its information is 1/2 ln((v + 1) / v)."""
    n, v = 10, 0.25
    mean = np.zeros((n, 2), np.float32)
    mean[:, 1] = [1, -1] * (n // 2)
    variance = np.tile(np.array([1.0, v], np.float32), (n, 1))
    own = given({"reconstructions": {"mean": mean, "variance": variance}}, np.zeros((n, 1), np.uint8))
    standard = DiagonalGaussian(torch.zeros(n, 2), torch.zeros(n, 2))
    own.model.prior = lambda y: standard  # type: ignore[method-assign]
    found = dict(Units()(own))
    information = 0.5 * np.log((v + 1) / v)
    assert found["active_units"].value == 1 and found["active_units"].ceiling == own.model.z_dim
    assert found["unit_information_nats"].value == pytest.approx(information)
    silent, telling = found["units"]
    assert silent == {"information": pytest.approx(0.0), "kl": pytest.approx(0.0)}
    assert telling == {
        "information": pytest.approx(information),
        "kl": pytest.approx(0.5 * (v + 1 - 1 - np.log(v))),
    }
    flow = SimpleNamespace(kl_per_unit=lambda q: None)
    own.model.prior = lambda y: flow  # type: ignore[method-assign]
    assert all(unit["kl"] is None for unit in dict(Units()(own))["units"])


def test_the_prior_matches_only_what_is_encoded_alike() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((200, 4))
    log_p = {"log_p_drawn": np.full(200, -1.0), "log_p_encoded": np.full(200, -3.5)}
    apart = dict(PriorMatch()(given({"latents": {"drawn": drawn, "encoded": drawn + 5, **log_p}})))
    assert apart["prior_density_gap"].value == 2.5 and apart["prior_density_gap"].interval == (2.5, 2.5)
    assert apart["prior_density_drawn"].value == -1.0 and apart["prior_density_encoded"].value == -3.5
    assert apart["prior_mmd"].value > 0.5 and apart["prior_mmd_p_value"].value == pytest.approx(1 / 201)
    alike = rng.standard_normal((200, 4))
    same = dict(PriorMatch()(given({"latents": {"drawn": drawn, "encoded": alike, **log_p}})))
    assert abs(same["prior_mmd"].value) < 0.05 and same["prior_mmd_p_value"].value > 0.05


def test_labels_in_the_latents_are_read_and_labels_elsewhere_are_not() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 3)) < 0.5).astype(np.uint8)
    telling = np.concatenate([2.0 * labels, rng.standard_normal((400, 2))], 1)
    silent = rng.standard_normal((400, 5))
    # An affine function of the labels, and noise of standard deviation 2 that no label explains.
    rest = rng.standard_normal(400)
    design = np.column_stack([np.ones(400), labels])
    rest -= design @ np.linalg.lstsq(design, rest, rcond=None)[0]
    log_det = labels @ [1.0, -4.0, 2.0] + 7.0 + 2 * rest / rest.std()
    own = given({"latents": {"drawn": telling, "encoded": silent, "log_det": log_det}}, labels)
    found = dict(LatentStructure()(own))
    assert found["label_structure_prior"].value == 1.0 and found["label_structure_prior"].interval == (
        1.0,
        1.0,
    )
    assert found["label_structure_encoded"].value == pytest.approx(0.5, abs=0.06)
    assert found["flow_curvature_nats"].value == pytest.approx(2.0)
    affine = given({"latents": {"drawn": telling, "encoded": silent, "log_det": 3.0 * labels[:, 1]}}, labels)
    assert dict(LatentStructure()(affine))["flow_curvature_nats"].value == pytest.approx(0.0, abs=1e-9)
    without = given({"latents": {"drawn": telling, "encoded": silent, "log_det": np.zeros(400)}}, labels)
    assert "flow_curvature_nats" not in dict(LatentStructure()(without))  # no flow, no verdict on it


def test_kernel_distance_has_an_interval_of_some_width_for_few_images_too() -> None:
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((60, 4)).astype(np.float32) for name in ("a", "b", "c")}
    parts = {
        "real": {"fd_x": rows["a"]},
        "samples": {"fd_x": rows["b"]},
        "reconstructions": {"fd_x": rows["c"]},
        "others": {"fd_x": rows["c"]},
    }
    found = dict(KernelDistance()(given(parts)))["kid_x_samples"]  # subsets of 1000 would hold all 60 images
    assert "subsets of 30" in found.meaning
    assert found.interval[0] < found.value < found.interval[1] and np.isfinite(found.ceiling)
    assert [kernel_subset(1000, n) for n in (2, 60, 1000, 1001)] == [2, 30, 500, 1000]
    assert np.isnan(kernel_error(0.1, subsets=1, size=10, n=60))
    assert kernel_error(0.3, subsets=9, size=10, n=50) == pytest.approx(0.3 * (10 / 40 + 1 / 9) ** 0.5)
