"""Variants over seeds: mean and deviation per variant, a table for each protocol."""

import statistics

import numpy as np
from scipy.stats import ttest_1samp

from pipeline.reporting.entries import read_entries
from pipeline.reporting.seeds import by_variant, paired_t, seed_table, variant_differences
from tests.fake_run import add_eval, make_run, sources_and_tags


def test_rows_are_variants_with_mean_and_deviation(tmp_path):
    runs = []
    for name, values in {"flow": (20.0, 22.0, 24.0), "plain": (30.0,)}.items():
        for seed, value in enumerate(values):
            runs.append(make_run(tmp_path, f"{name}-s{seed}", (f"name={name}-s{seed}", f"seed={seed}")))
            add_eval(runs[-1], 1, fd=value)
    files = seed_table(runs, tmp_path / "table")
    assert [file.name for file in files] == ["table.md", "table.html"]
    lines = files[0].read_text().splitlines()
    head = next(line for line in lines if line.startswith("| variant"))
    column = [cell.strip() for cell in head.split("|")].index("fd_classifier_samples ↓")
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")]
        for line in lines
        if line.startswith(("| flow", "| plain"))
    }
    assert cells["flow"][2] == "3" and cells["plain"][2] == "1"
    assert cells["flow"][column] == f"22 ± {statistics.stdev([20, 22, 24]):.2g}"
    assert cells["plain"][column] == "30"
    sources, _ = sources_and_tags(files[1].read_text())
    assert sources <= {"data:"}


def test_runs_of_one_name_and_two_configurations_are_two_variants(tmp_path):
    runs = []
    for folder, z_dim in (("z64", 64), ("z128", 128)):
        for seed in (0, 1):
            overrides = ("name=flow", f"seed={seed}", f"model.z_dim={z_dim}")
            runs.append(make_run(tmp_path, f"{folder}-{seed}", overrides))
            add_eval(runs[-1], 1, fd=20.0 + seed)
    found = by_variant(read_entries(runs))
    assert [len(entries) for entries in found.values()] == [2, 1, 1]
    assert list(found) == ["flow", "flow (z128-0)", "flow (z128-1)"]


def test_numbers_over_different_attributes_are_not_tested(tmp_path):
    runs = []
    for name, unread in (("all", ""), ("some", "Bald")):
        for seed in (0, 1):
            runs.append(make_run(tmp_path, f"{name}-s{seed}", (f"name={name}-s{seed}", f"seed={seed}")))
            add_eval(runs[-1], 1, fd=20.0 + seed, unread=unread)
    metrics = {difference.metric for difference in variant_differences(read_entries(runs))}
    assert "attribute_accuracy" in metrics and "attribute_accuracy_read" not in metrics


def test_numbers_of_two_protocols_never_share_a_row(tmp_path):
    runs = [make_run(tmp_path, f"flow-s{seed}", (f"name=flow-s{seed}", f"seed={seed}")) for seed in (0, 1)]
    add_eval(runs[0], 1, n=3000)
    add_eval(runs[1], 1, n=500)
    text = seed_table(runs, tmp_path)[0].read_text()
    assert text.count("| variant") == 2 and text.count("| flow | 1 |") == 2


def test_differences_are_paired_by_seed_and_significant_only_when_they_are(tmp_path):
    """A seed moves both variants alike, so a difference is sure although their values overlap."""
    luck = (0.0, 10.0, -10.0)
    runs = []
    for name, shift, noise in (("flow", 0.0, 0.0), ("plain", 3.0, 0.05), ("other", 0.1, 5.0)):
        for seed, value in enumerate(luck):
            runs.append(make_run(tmp_path, f"{name}-s{seed}", (f"name={name}-s{seed}", f"seed={seed}")))
            add_eval(runs[-1], 1, fd=20 + value + shift + noise * (-1) ** seed)
    found = {
        (d.a, d.b): d for d in variant_differences(read_entries(runs)) if d.metric == "fd_classifier_samples"
    }
    sure, unsure = found["flow", "plain"], found["flow", "other"]
    assert sure.n == 3 and abs(sure.mean + 3) < 0.1 and sure.low < -3 < sure.high < 0 and sure.p < 0.01
    assert unsure.p > 0.5 and unsure.low < 0 < unsure.high
    text = seed_table(runs, tmp_path / "table")[0].read_text()
    (line,) = [
        line for line in text.splitlines() if line.startswith("| fd_classifier_samples ↓ | flow - plain")
    ]
    assert line.endswith("| flow |")
    assert any(line.endswith("| – |") for line in text.splitlines() if "flow - other" in line)


def test_paired_t_and_its_correction():
    mean, low, high, p = paired_t(np.array([1.0, 2.0, 3.0, 4.0]))
    theirs = ttest_1samp([1.0, 2.0, 3.0, 4.0], 0.0)
    interval = theirs.confidence_interval(0.95)
    assert np.allclose([mean, low, high, p], [2.5, interval.low, interval.high, theirs.pvalue])
    assert paired_t(np.zeros(3)) == (0.0, 0.0, 0.0, 1.0) and paired_t(np.ones(3))[3] == 0.0


def test_one_seed_each_tests_nothing(tmp_path):
    runs = [make_run(tmp_path, f"{name}-s0", (f"name={name}-s0",), evals=1) for name in ("a", "b")]
    assert (
        not variant_differences(read_entries(runs))
        and "Student" not in seed_table(runs, tmp_path / "t")[0].read_text()
    )
