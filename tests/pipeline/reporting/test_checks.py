"""Verdicts on the variance and the prior: each can come out either way."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from cvae.config import ModelConfig
from pipeline.config.load import load
from pipeline.reporting.checks import checks, rank_correlation
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import evaluations
from tests.fake_run import add_eval, make_run


def model(*overrides: str) -> ModelConfig:
    return load([], list(overrides)).model


def training(
    sigma_of_mse=lambda mse: 2 * mse**0.5, log_det: float = 50.0, held_out=lambda mse: mse
) -> list[dict]:
    """Records of ten validations while the error falls."""
    errors = [0.05 / (step + 1) for step in range(10)]
    values = [
        {
            "train/sigma": sigma_of_mse(m),
            "train/mse": m,
            "val_ema/sigma": sigma_of_mse(m),
            "val_ema/mse": held_out(m),
        }
        | {"val_ema/log_det_min": -log_det, "val_ema/log_det_max": log_det}
        for m in errors
    ]
    return [{"step": step, "values": v} for step, v in enumerate(values)]


def test_the_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    for n in (3, 10, 50):
        a = rng.integers(0, 6, n).astype(float)  # some are equal
        b = a + rng.normal(size=n).round()
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(np.ones(3), np.arange(3)) == 0


def verdicts(*args) -> dict[str, str]:
    return {c.question.split()[1] + " " + c.question.split()[2]: c.verdict for c in checks(*args)}


def test_a_sound_training():
    assert verdicts(model(), training(), None) == {"σ*² the": "yes", "σ* follow": "yes", "the flow's": "yes"}


def test_a_variance_that_does_not_follow_the_error_and_a_saturated_flow():
    assert verdicts(model(), training(lambda m: 0.3), None)["σ*² the"] == "no"
    assert verdicts(model(), training(held_out=lambda m: 0.1 - m), None)["σ* follow"] == "no"
    assert verdicts(model(), training(log_det=900.0), None)["the flow's"] == "no"  # beyond half of 8 x 2 x 64


def test_what_a_variant_does_not_have_is_not_asked():
    assert not checks(model("model.variance.name=unit", "model.prior.name=standard"), training(), None)


@pytest.mark.parametrize(
    "low, high, gap, p, wanted", [(0.6, 0.7, (-1.0, 2.0), 0.4, "yes"), (0.49, 0.52, (3.0, 9.0), 0.001, "no")]
)
def test_the_prior(tmp_path, low, high, gap, p, wanted):
    run = make_run(tmp_path, steps=20)
    file = add_eval(run, 1) / "metrics.json"
    tree = json.loads(file.read_text())
    tree["metrics"] |= {
        "label_structure_prior": 0.6,
        "label_structure_encoded": 0.7,
        "prior_density_gap": 1.0,
        "prior_mmd_p_value": p,
    }
    tree["metrics"]["flow_curvature_nats"] = 8.0 if wanted == "yes" else 0.01
    tree["intervals"] |= {"label_structure_prior": [low, high], "prior_density_gap": gap}
    file.write_text(json.dumps(tree))
    found = verdicts(model(), read_metrics(run / "train/metrics.jsonl"), evaluations(run)[0])
    assert {found[key] for key in ("z drawn", "the prior", "the average")} == {wanted}
