"""Variants over seeds: mean and deviation per variant, a table for each protocol."""

import statistics

from pipeline.evaluation.seeds import seed_table
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
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines if line.startswith(("| flow", "| plain"))
    }
    assert cells["flow"][2] == "3" and cells["plain"][2] == "1"
    assert cells["flow"][column] == f"22 ± {statistics.stdev([20, 22, 24]):.2g}"
    assert cells["plain"][column] == "30"
    sources, _ = sources_and_tags(files[1].read_text())
    assert sources <= {"data:"}


def test_numbers_of_two_protocols_never_share_a_row(tmp_path):
    runs = [make_run(tmp_path, f"flow-s{seed}", (f"name=flow-s{seed}", f"seed={seed}")) for seed in (0, 1)]
    add_eval(runs[0], 1, n=3000)
    add_eval(runs[1], 1, n=500)
    text = seed_table(runs, tmp_path)[0].read_text()
    assert text.count("| variant") == 2 and text.count("| flow | 1 |") == 2
