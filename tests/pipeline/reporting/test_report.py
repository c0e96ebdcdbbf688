"""report.html: complete, self-contained, escaped, and made from whatever there is."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.reporting.plots import series, training_panels
from pipeline.reporting.report import write_report
from pipeline.reporting.sections.verdicts import verdicts
from pipeline.reporting.text import duration, number
from pipeline.rundir.metrics_log import read_metrics
from pipeline.rundir.record import evaluations
from tests.fake_run import add_eval, make_run, sources_and_tags


def drawings(page: str) -> list[str]:
    """The decoded SVG drawings of a page."""
    return [
        base64.b64decode(text).decode() for text in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    ]


def test_full_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=("name=paper", "seed=4"), steps=40, evals=1, unread="Bald")
    (run / "config_history.jsonl").write_text(
        json.dumps({"commit": "abc123", "step": 20, "changed": {"train.images": [10, 1000]}}) + "\n"
    )
    attempt = {"hosts": ["node7"], "started": 1.7e9, "ended": 1.7e9 + 200, "state": "REQUEUED"}
    (run / "jobs.json").write_text(
        json.dumps([{"stage": "train", "id": "4711", "state": "COMPLETED", "attempts": [attempt]}])
    )
    (run / "train/done.json").write_text('{"step": 90, "images": 11520, "seconds": 3900}')
    file = write_report(run)
    assert file == run / "report.html"
    page = file.read_text()
    assert "<title>paper, seed 4</title>" in page
    text = re.sub(r"<[^>]+>", " ", page)
    for words in (
        "step 90",
        "11,520",
        "1 h 05 min",
        "abc123",
        "train.images: 10 → 1000",
        "4711",
        "node7",
        "3 min 20 s",
        "5a5a5a",
        "2.13.0",
    ):
        assert words in text, words
    (row,) = re.findall(r"<tr><td data-label=\"metric\">fd_classifier_samples ↓.*?</tr>", page)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    small = '<br><span class="soft">{}</span>'.format
    bad, good = "300" + small("the mean training image, repeated"), "1.2" + small("other real images")
    assert cells[1:] == ["21.5", "21 – 22", bad, good, "3,000", ""]
    assert "distance of samples" in cells[0] and "bits per pixel value" in page
    assert ">sigma<br>" in page and "attribute_accuracy_shuffled" not in page
    assert re.search(r'<tr class="off"><td[^>]*>Bald \(not read by the model\)', page)
    assert "Bald + Eyeglasses" in page and "batch_size: 64" in page
    assert page.count("data:image/webp;base64,") == 8 + 4  # 8 faces, 4 stacks of face and reconstruction
    assert page.index("Verdict") < page.index("Pictures") < page.index("Curves") < page.index("All numbers")


def test_the_six_numbers_stand_between_their_references(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, steps=20, evals=1)).read_text()
    top = page[: page.index("Pictures</h2>")]
    titles = re.findall(r'<div class="card"><h3>(.*?)</h3>', top)
    assert titles == ["distance to real images ↓", "sharpness", "attributes as asked ↑"]
    # Roots of squared distances: from 300 (nothing) to 1.2 (other images), 21.5 is at 0.78.
    shares = [float(share) for share in re.findall(r'class="fill" style="width:(.*?)%"', top)]
    assert shares == pytest.approx([78.2, 40.0, 85.7], abs=0.1)
    assert "knowing nothing: 0.6" in top and "other real images: 1.2" in top


@pytest.mark.parametrize(
    "numbers, question, answer",
    [
        ({"sharpness_samples": 0.2}, "Is it sharp?", "No, blurred."),
        ({"sharpness_samples": 0.95}, "Is it sharp?", "Yes."),
        ({"sharpness_samples": 1.6}, "Is it sharp?", "Too sharp."),
        ({"attribute_accuracy": 0.62}, "Does it obey?", "Hardly."),
        ({"attribute_accuracy": 0.94}, "Does it obey?", "Yes."),
        ({"recall_classifier": 0.3}, "Is it diverse?", "No."),
        ({"memorised": 0.004}, "Has it memorised?", "No."),
        ({"memorised": 0.4}, "Has it memorised?", "Yes."),
        ({"sharpness_samples": 0.2}, "What next?", "Sharpen."),
        ({"sharpness_samples": 0.95, "attribute_accuracy": 0.94}, "What next?", "Compare."),
    ],
)
def test_verdicts_follow_the_numbers(
    tmp_path: Path, numbers: dict[str, float], question: str, answer: str
) -> None:
    folder = add_eval(make_run(tmp_path), 1)
    file = folder / "metrics.json"
    tree = json.loads(file.read_text())
    del tree["metrics"]["attribute_accuracy_read"]
    tree["metrics"] |= numbers
    tree["ceilings"] |= {"recall_classifier": 0.9, "memorised": 0.01}
    file.write_text(json.dumps(tree))
    found = {v.question: v.answer for v in verdicts(evaluations(folder.parents[1])[0], [])}
    assert found[question] == answer


def test_a_loss_that_still_falls_asks_for_a_longer_training(tmp_path: Path) -> None:
    (evaluation,) = evaluations(make_run(tmp_path, evals=1))
    falling = [{"step": i, "values": {"val_ema/loss": 100.0 - i}} for i in range(10)]
    flat = [{"step": i, "values": {"val_ema/loss": 2.0**-i}} for i in range(20)]
    assert verdicts(evaluation, falling)[-1].answer == "Train longer."
    assert verdicts(evaluation, flat)[-1].answer != "Train longer."


def test_a_partial_evaluation_shows_its_own_numbers_and_names_the_complete_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, evals=1)
    add_eval(run, 2, fd=33.25, left_out="kernel,rare")
    page = write_report(run).read_text()
    assert "33.25" in page[: page.index("Pictures</h2>")]
    assert "It left out kernel, rare." in page and "Evaluation 1 is complete" in page
    (row,) = re.findall(r"<tr><td[^>]*>eval/1</td>.*?</tr>", page)
    assert "21.5 ±0.5" in row


def test_curves_of_later_phases(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=20)
    (run / "refine").mkdir()
    (run / "refine/metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "time": 1.7e9 + i, "values": {"train/loss": 5.0 / i}}) + "\n"
            for i in (1, 2, 3)
        )
    )
    page = write_report(run).read_text()
    assert "Refining the prior</h3>" in page and "Tuning" not in page
    assert any("loss of the prior" in svg for svg in drawings(page))


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, steps=20, evals=1)).read_text()
    sources, tags = sources_and_tags(page)
    assert (
        sources == {"data:"}
        and not tags & {"script", "link", "iframe", "object"}
        and "@import" not in page
        and "url(" not in page
    )
    assert len(drawings(page)) == 10 and all("<svg" in svg and "<script" not in svg for svg in drawings(page))


def test_what_comes_from_files_is_escaped(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    run = make_run(tmp_path, overrides=("tracking.uri=http://ada:secret@host:5000",))
    folder = add_eval(run, 1, weights=hostile, **{hostile: hostile})
    tree = json.loads((folder / "metrics.json").read_text())
    tree["metrics"][hostile] = 1.0
    tree["per_attribute"][hostile] = {"accuracy": 1.0}
    tree["rare"][0]["attributes"] = [hostile]
    (folder / "metrics.json").write_text(json.dumps(tree))
    (folder / "samples/pictures.json").unlink()  # an old evaluation: its pictures are shown whole
    (folder / "samples/samples.png").rename(folder / "samples/a\"b'<i>.png")
    (run / "inputs.json").write_text(json.dumps({hostile: hostile}))
    (run / "config_history.jsonl").write_text(
        json.dumps({"commit": hostile, "changed": {hostile: hostile}}) + "\n"
    )
    (run / "jobs.json").write_text(json.dumps([{"stage": hostile, "id": hostile, "state": hostile}]))
    page = write_report(run).read_text()
    sources, tags = sources_and_tags(page)
    assert sources == {"data:"} and not tags & {"script", "i"} and "a&quot;b&#x27;&lt;i&gt;" in page
    assert "secret" not in page and "http://***@host:5000" in page


@pytest.mark.parametrize("steps", [0, 1])
def test_report_of_a_run_that_just_began(tmp_path: Path, steps: int) -> None:
    run = make_run(tmp_path, steps=steps)
    (run / "eval/1/samples").mkdir(parents=True)  # not complete
    page = write_report(run).read_text()
    assert f"launch.py --run-dir {run} --stages eval" in page and "Verdict" not in page
    assert bool(drawings(page)) == bool(steps)


def test_report_of_an_evaluation_without_metrics_log(tmp_path: Path) -> None:
    run = make_run(tmp_path, evals=1)
    (run / "inputs.json").unlink()
    page = write_report(run).read_text()
    assert "Verdict</h2>" in page and "Curves</h2>" not in page


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_panels_show_what_there_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=30)
    records = read_metrics(run / "train/metrics.jsonl")
    norms = series(records, "train/grad_norm", "", "")
    assert 7 not in norms.steps and len(norms.steps) == 29  # step 7 was not finite
    captions = [caption for caption, _ in training_panels(records)]
    assert any("log |det" in c for c in captions)
    for record in records:  # a prior without a flow
        record["values"] = {k: 0.0 if "log_det" in k else v for k, v in record["values"].items()}
    assert [c for c, _ in training_panels(records)] == [c for c in captions if "log |det" not in c]
    assert list(training_panels([])) == []


def test_drawings_are_reproducible(tmp_path: Path) -> None:
    records = read_metrics(make_run(tmp_path, steps=12) / "train/metrics.jsonl")
    assert next(training_panels(records)) == next(training_panels(records))


def test_an_evaluation_from_before_metrics_spoke_for_themselves_still_shows(tmp_path: Path) -> None:
    run = make_run(tmp_path, evals=1)
    file = run / "eval/1/metrics.json"
    tree = json.loads(file.read_text())
    del tree["about"]
    file.write_text(json.dumps(tree))
    page = write_report(run).read_text()
    (row,) = re.findall(r"<tr><td[^>]*>fd_classifier_samples</td>.*?</tr>", page)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[1:] == ["21.5", "21 – 22", "300", "1.2", "–", ""]


def test_a_tiny_evaluation_without_intervals_still_shows(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=20, evals=1)
    file = run / "eval/1/metrics.json"
    tree = json.loads(file.read_text())
    tree["metrics"] |= {"label_structure_prior": 0.5, "prior_density_gap": 1.0, "mse": None}
    tree |= {"intervals": {}, "ceilings": {}, "floors": {}, "rare": []}
    file.write_text(json.dumps(tree))
    assert "Verdict</h2>" in write_report(run).read_text()


def test_reading_of_numbers() -> None:
    expected = {None: "–", 0.00412345: "0.004123", 21.5: "21.5", 3000: "3,000", -9123.4: "-9,123"}
    assert {value: number(value) for value in expected} == expected
    assert number(float("inf")) == "inf"
    expected = {None: "–", 4.25: "4.2 s", 200: "3 min 20 s", 3900: "1 h 05 min", float("inf"): "?"}
    assert {value: duration(value) for value in expected} == expected
