"""tools/compare.py: one protocol, one table; what cannot be compared is kept apart."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, DataError, UserError
from pipeline.reporting.comparison import compare
from pipeline.reporting.text import text_table
from pipeline.tracking.sync import tracker_of
from tests.conftest import ROOT
from tests.fake_run import add_eval, make_run, sources_and_tags
from tools.compare import main


def line_of(text: str, start: str) -> str:
    """The only line that starts with a word."""
    (line,) = [line for line in text.splitlines() if re.match(rf"{re.escape(start)}\s", line)]
    return line


def test_one_protocol_one_table_with_the_best_marked(tmp_path: Path) -> None:
    worse = make_run(
        tmp_path, "gaussian", ("name=gaussian", "seed=1"), steps=12, evals=1, fd=30.0, images=64000
    )
    better = make_run(tmp_path, "flow", ("name=flow",), steps=12, evals=1, fd=21.5, step=80)
    (better / "train/done.json").write_text('{"step": 80, "images": 11520, "seconds": 5012.0}')
    for phase, images, seconds in (("tune", 500, 30.0), ("refine", 7000, 600.0)):
        (worse / phase).mkdir()
        done = {"step": 5, "images": images, "seconds": seconds}
        (worse / phase / "done.json").write_text(json.dumps(done))
    file = worse / "eval/1/metrics.json"
    tree = json.loads(file.read_text())
    tree["protocol"] |= {"stage": "tune", "images": 400}  # a checkpoint before the end; refine came later
    file.write_text(json.dumps(tree))
    (worse / "train/done.json").write_text('{"step": 500, "images": 64000, "seconds": 60.0}')
    text = compare([worse, better])
    assert (
        "protocols" not in text
        and "test split, N = 3000, 64 px (crop 148), ema weights" in text
        and "classifier c1c1c1c1" in text
    )
    first = text.split("\n\n")[1]
    head = first.partition("---")[0].split()
    assert head == ["metric", "gaussian", "flow", "bad", "reference", "good", "reference"]
    assert re.search(r"images seen +64,000 \+ 400 +10,240", first)
    assert re.search(r"training +1 min 30 s +1 h 23 min", first)
    assert re.search(r"distance to real images ↓ +30 ±0.5 +21.5 ±0.5\* +300 +1.2", first)
    assert first.count("*") == 1  # equal values: none is the best
    said = "distance to real images: flow (21.5 ±0.5) is better than gaussian (30 ±0.5)."
    assert said in text and "No difference beyond luck: attributes as asked." in text
    assert "Each variant was trained once" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_difference_within_the_noise_gets_no_star(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a", evals=1, fd=21.5), make_run(tmp_path, "b", evals=1, fd=22.1)]
    text = compare(runs)  # intervals of half width 0.5: a difference needs 0.707
    assert "21.5 ±0.5 " in text and "*" not in text.split("\n\n")[1]
    assert "No difference beyond luck: distance to real images" in text


def test_a_difference_without_an_interval_is_not_judged(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "a", evals=1), make_run(tmp_path, "b", evals=1)]
    file = runs[0] / "eval/1/metrics.json"
    tree = json.loads(file.read_text())
    tree["metrics"]["attribute_accuracy"] = 0.99
    del tree["intervals"]["attribute_accuracy"]
    file.write_text(json.dumps(tree))
    assert "Not judged, because there is no interval: attributes as asked." in compare(runs)


def test_variants_over_seeds_are_one_column_each_and_the_paired_test_gives_the_star(tmp_path: Path) -> None:
    runs = []
    for name, shift in (("flow", 0.0), ("plain", 3.0)):
        for seed, luck in enumerate((0.0, 10.0, -10.0)):
            overrides = (f"name={name}-s{seed}", f"seed={seed}")
            noise = 0.01 * seed
            run = make_run(tmp_path, f"{name}-s{seed}", overrides)
            add_eval(run, 1, fd=20 + luck + shift + (noise if name == "flow" else 0.0))
            runs.append(run)
    text = compare(runs)
    (row,) = [line for line in text.splitlines() if line.startswith("distance to real images ↓")]
    assert re.search(r"20.01 ±10\* +23 ±10 ", row)
    assert "flow (20.01 ±10) is better than plain (23 ±10)" in text and "paired differences" in text


def test_the_page_tells_the_keys_in_which_the_variants_differ(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "a", ("name=a", "model.prior.name=flow"), evals=1),
        make_run(tmp_path, "b", ("name=b", "model.prior.name=standard"), evals=1),
    ]
    compare(runs, tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    (row,) = re.findall(r"<tr><td[^>]*>model.prior.name</td>.*?</tr>", page)
    assert re.findall(r"<td[^>]*>(.*?)</td>", row)[1:] == ["flow", "standard"]
    assert ">name</td>" not in page and ">model.z_dim</td>" not in page


def test_newest_complete_evaluation_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path, "flow")
    for number, fd in ((2, 22.0), (10, 20.25)):
        add_eval(run, number, fd=fd)
    (run / "eval/11").mkdir()
    assert "20.25" in compare([run]) and "22 " not in compare([run])


def test_an_evaluation_of_some_metrics_is_not_the_headline(tmp_path: Path) -> None:
    run = make_run(tmp_path, "flow", evals=1, fd=20.25)
    add_eval(run, 2, fd=99.0, left_out="kernel,rare")
    assert "20.25" in compare([run]) and "99" not in compare([run])
    assert "99" in compare(
        [make_run(tmp_path, "partial", evals=1, fd=99.0, left_out="kernel")]
    )  # nothing better is there


def test_an_evaluation_can_be_named_by_its_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path, "flow", evals=1, fd=20.25)
    add_eval(run, 2, fd=22.5)
    table = compare([run / "eval/1", run / "eval/2"]).split("\n\n")[1]
    assert re.search(r"^metric +flow/eval/1 +flow/eval/2 ", table)
    assert re.search(r"distance to real images ↓ +20.25 ±0.5\* +22.5 ±0.5 ", table)
    with pytest.raises(DataError, match="eval/7: no finished evaluation; there are: 1, 2"):
        compare([run / "eval/7"])


@pytest.mark.usefixtures("with_store")
def test_runs_by_their_tag_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, fd) in enumerate({"flow-s0": 20.25, "flow-s1": 21.5, "plain-s0": 30.0}.items()):
        run = make_run(
            tmp_path,
            name,
            (f"name={name}", f"seed={seed % 2}", "tracking.experiment=tags"),
            steps=2,
            evals=1,
            fd=fd,
        )
        tracker_of(run).push()
    where = ["--uri", f"sqlite:///{tmp_path}/mlflow.db", "--experiment", "tags"]

    main([*where, "--tag", "seed=0", "--tag", "headline.complete=True"])
    found = capsys.readouterr().out
    assert "flow-s0" in found and "plain-s0" in found and "flow-s1" not in found
    main([*where, "--tag", "variant=flow"])  # all its seeds
    found = capsys.readouterr().out
    assert "± standard deviation over seeds" in found and "plain" not in found
    for wrong, message in (
        ("seed=7", "no run in experiment 'tags'"),
        ("seed", "expected KEY=VALUE"),
        ("a=' or", "without quotes"),
    ):
        with pytest.raises(UserError, match=message):
            main([*where, "--tag", wrong])


@pytest.mark.parametrize(
    "key, value",
    [
        ("n", 500),
        ("split", "val"),
        ("classifier_digest", "ff" * 32),
        ("shards_digest", "ee" * 32),
        ("seed", 7),
    ],
)
def test_other_protocols_get_tables_of_their_own(tmp_path: Path, key: str, value: object) -> None:
    runs = [
        make_run(tmp_path, "a", evals=1, fd=30.0),
        make_run(tmp_path, "b", evals=1, fd=20.0),
        make_run(tmp_path, "c", evals=1, **{key: value}),
    ]
    text = compare(runs)
    assert text.startswith("2 protocols: numbers of different tables cannot be compared")
    assert re.search(
        rf"^  {key}: .* \| {str(value)[:16]}$", text, re.MULTILINE
    ) and "split:" not in text.replace(f"  {key}:", "")
    tables = [
        part
        for part in text.split("\n\n")
        if part.lstrip().startswith(("metric", "good", "bad")) or "images seen" in part
    ]
    heads = [" ".join(part.split("---")[0].split()) for part in tables if "images seen" in part]
    assert len(heads) == 2 and " a b " in f" {heads[0]} " and " c " in f" {heads[1]} "
    assert "*" not in tables[-1]


def test_attributes_that_are_not_read_are_marked(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "all", evals=1), make_run(tmp_path, "some", evals=1, unread="Bald")]
    text = compare(runs)
    assert re.search(r"Bald +0.9 +0.9 \(not read\) +0.95", line_of(text, "Bald"))
    assert "not read" not in line_of(text, "Male")
    assert "(all 4, some 3), so they are not comparable here: attribute_accuracy_read." in " ".join(
        text.split()
    )


def test_numbers_over_different_attributes_have_no_best(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "all", evals=1), make_run(tmp_path, "some", evals=1, unread="Bald")]
    for run, value in zip(runs, (0.9, 0.8), strict=True):
        file = run / "eval/1/metrics.json"
        tree = json.loads(file.read_text())
        tree["metrics"] |= {"attribute_accuracy": value, "attribute_accuracy_read": value + 0.05}
        file.write_text(json.dumps(tree))
    text = compare(runs)
    assert "0.9 ±0.01*" in text and "0.95 " in text and "0.95*" not in text
    assert "attribute_accuracy_read" in text.split("so they are not comparable here")[1]


def test_many_runs_and_metrics_stay_within_the_terminal(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, f"a_rather_long_name_of_a_variant_{i}", evals=1) for i in range(6)]
    text = compare(runs)
    table = [part for part in text.split("\n\n") if "-----" in part]
    assert max(len(line) for part in table for line in part.splitlines()) <= 120
    assert text.count("variant_5") >= 2


def test_runs_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    text = compare([make_run(tmp_path / "one", "flow", evals=1), make_run(tmp_path / "two", "flow", evals=1)])
    assert "one/flow" in text and "two/flow" in text


def test_long_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    end = "with_a_very_long_end_of_its_name"
    runs = [make_run(tmp_path, f"{start}_{end}", evals=1, fd=fd) for start, fd in (("a", 30.0), ("b", 20.0))]
    text = compare(runs)
    assert f"a_{end}" in text and f"b_{end}" in text
    line = line_of(text, "distance to real images ↓")
    assert line.count("*") == 1 and "20 ±0.5*" in line


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "<script>alert(1)<", steps=30, evals=1),
        make_run(tmp_path, "b", steps=30, evals=1, weights="<img src=x>"),
    ]
    out = tmp_path / "new folder" / "comparison.html"
    text = compare(runs, out)
    page = out.read_text()
    sources, tags = sources_and_tags(page)
    assert (
        sources == {"data:"}
        and "script" not in tags
        and "&lt;script&gt;alert(1)&lt;" in page
        and "&lt;img src=x&gt;" in page
    )
    assert page.count("data:image/webp;base64,") == 2 * (8 + 4)
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "<script>alert(1)<" in text


def test_run_without_evaluation_names_the_command(tmp_path: Path) -> None:
    run = make_run(tmp_path, "flow", steps=2)
    with pytest.raises(DataError, match=f"launch.py --run-dir {run} --stages eval"):
        compare([run])
    with pytest.raises(ConfigError, match="not a run directory"):
        compare([tmp_path])


def test_command_line(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path, "good", evals=1), make_run(tmp_path, "bad")
    done = subprocess.run(
        [sys.executable, "tools/compare.py", good, "--out", tmp_path / "c.html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "21.5" in done.stdout and (tmp_path / "c.html").exists()
    failed = subprocess.run(
        [sys.executable, "tools/compare.py", good, bad], cwd=ROOT, capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, "good", evals=1)
    process = subprocess.Popen(
        [sys.executable, "tools/compare.py", run],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    process.stdout.close()  # as `| head` does
    assert process.wait(timeout=120) == 141 and process.stderr.read() == ""
    process.stderr.close()


def test_columns_break_into_blocks_that_repeat_the_first() -> None:
    text = text_table(["name", "a_long_heading_here", "b"], [["x", "1", "2"]], width=20)
    assert text.splitlines() == [
        "           a_long_",
        "name  heading_here",
        "----  ------------",
        "x                1",
        "",
        "name  b",
        "----  -",
        "x     2",
    ]
