"""The whole chain as a user runs it: `launch.py` on two ranks, from drawn faces to MLflow."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import main
from tests.conftest import ROOT

TINY = [
    "toy.n=240",
    "shard.size=32",
    "shard.samples_per_shard=64",
    "model.net.channels=[16,32]",
    "model.z_dim=8",
    "model.prior.flow.layers=2",
    "train.images=512",
    "train.batch_size=32",
    "train.val_interval=8",
    "train.max_lost_steps=8",
    "train.log_interval=4",
    "classifier.epochs=1",
    "eval.n=24",
    "eval.judge=false",
    "eval.flip_images=2",
    "eval.block=8",
    "eval.iw_images=8",
    "eval.iw_samples=4",
    "eval.rare_samples=8",
    "cluster.stages={classifier: {tasks_per_node: 1}, eval: {tasks_per_node: 1}}",
]


def launch(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *args], capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """Two variants in one launch, with the same faces, shards and classifier."""
    runs = tmp_path_factory.mktemp("e2e") / "runs with a space"
    done = launch("--config", "sigma_cvae", "sigma_cvae_nf", f"runs_dir={runs}", *TINY)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return runs, done


def test_it_ends_with_a_table_and_where_to_look(chain):
    runs, done = chain
    page = runs / "_comparisons/comparison_of_sigma_cvae_and_sigma_cvae_nf.html"
    for said in (
        "data: 240 faces drawn by this project (shard.source is empty)",
        "[6/6] sigma_cvae_nf eval: done in ",
        "attributes as asked",
        f"report: {runs}/sigma_cvae/report.html",
        f"comparison: {page}",
        "mlflow ui --backend-store-uri",
        "next:",
    ):
        assert said in done.stdout
    assert len(done.stdout.splitlines()) < 90 and max(map(len, done.stdout.splitlines())) < 200
    assert page.read_text().count("<img") > 0


def test_the_day_in_the_documentation_shows_what_a_launch_prints(chain):
    """Numbers, paths and names of files may differ; the lines and their order may not."""

    def shape(line: str) -> str:
        words = line.partition("  ")[0].partition(": ")[0]  # the label of the line or of its row
        return re.sub(r"\d[\d.,]*", "0", words.strip())

    _, done = chain
    printed = [shape(line) for line in done.stdout.splitlines()]
    page = (ROOT / "docs/operations/day.md").read_text()
    shown = re.findall(r"^```text (?:launch|closing)\n(.*?)^```$", page, re.M | re.S)
    assert len(shown) == 2
    position = 0
    for line in "".join(shown).splitlines():
        if line.startswith("  python") or not shape(line):
            continue
        assert shape(line) in printed[position:], f"{line!r} is not printed, or in another order"
        position = printed.index(shape(line), position)


@pytest.mark.parametrize("name", ["sigma_cvae", "sigma_cvae_nf"])
def test_every_stage_left_its_files(chain, name):
    runs, _ = chain
    done = json.loads((runs / name / "train" / "done.json").read_text())
    assert done["images"] == 512 and done["world_size"] == 2
    result = json.loads((runs / name / "eval" / "1" / "metrics.json").read_text())
    assert {
        "fd_classifier_samples",
        "fd_classifier_recon",
        "attribute_accuracy",
        "mse",
        "iw_log_likelihood_nats",
    } <= result["metrics"].keys()
    assert result["protocol"]["n"] == 24 and result["protocol"]["split"] == "test"
    assert list((runs / name / "eval" / "1" / "samples").glob("*.png"))
    assert "<html" in (runs / name / "report.html").read_text()


def test_shared_outputs_are_made_once(chain):
    runs, done = chain
    for kind in ("toy", "shards", "classifier"):
        assert len([p for p in (runs / "_shared" / kind).iterdir() if p.is_dir()]) == 1
    assert "sigma_cvae_nf: shard: shared with sigma_cvae-shard" in done.stdout


def test_mlflow_has_parents_children_and_every_step_once(chain):
    from mlflow import MlflowClient

    runs, _ = chain
    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("cvae")
    found = client.search_runs([experiment.experiment_id])
    parents = {r.info.run_name: r for r in found if "mlflow.parentRunId" not in r.data.tags}
    assert parents.keys() == {"sigma_cvae", "sigma_cvae_nf"} and len(found) == 4
    for run in parents.values():
        assert run.info.status == "FINISHED"
        assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [4, 8, 12, 16]
        assert "distance" in run.data.metrics and run.data.params["train.images"] == "512"


def test_a_second_launch_finds_everything_complete_and_evaluates_again(chain, capsys):
    """In this process, which has imported what takes most of the time of a rerun this small."""
    runs, _ = chain
    first = (runs / "sigma_cvae" / "eval" / "1" / "metrics.json").read_bytes()
    before = (runs / "sigma_cvae/config.yaml").read_bytes()
    again = ["--stages", "eval", "--run-dir", str(runs / "sigma_cvae"), "eval.metrics=[frechet]"]
    main(["--cluster", "debug", *again])
    printed = capsys.readouterr().out
    assert (runs / "sigma_cvae/config.yaml").read_bytes() == before
    assert f"{runs}/sigma_cvae/eval/2/metrics.json" in printed and "comparison" not in printed
    again = json.loads((runs / "sigma_cvae" / "eval" / "2" / "metrics.json").read_text())
    assert (runs / "sigma_cvae" / "eval" / "1" / "metrics.json").read_bytes() == first
    whole, part = json.loads(first)["metrics"], again["metrics"]
    assert "fd_classifier_samples" in part
    assert part == {name: whole[name] for name in part}  # the same digits


@pytest.mark.slow
def test_a_stage_runs_without_submitit_and_training_goes_on(chain):
    runs, _ = chain
    run_dir = runs / "sigma_cvae"
    done = launch("--stages", "train", "--run-dir", str(run_dir), "train.images=544")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((run_dir / "train" / "done.json").read_text())["step"] == 17
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "pipeline.run",
    ]
    again = subprocess.run(
        [*torchrun, str(run_dir), "train"], capture_output=True, text=True, cwd=ROOT, timeout=200
    )
    assert again.returncode == 0, again.stderr[-3000:]


@pytest.mark.parametrize(
    "args,said",
    [
        (["shard.source=/nowhere"], "/nowhere: no such folder"),
        (["--config", "sigma_cvea"], "did you mean 'sigma_cvae'"),
        (["train.batch=3", "--config", "sigma_cvae"], "unknown key 'train.batch'"),
        (["--cluster", "slrum"], "did you mean 'slurm'"),
    ],
)
def test_mistakes_end_with_code_2_and_one_line(tmp_path, args, said):
    done = launch(f"runs_dir={tmp_path}/runs", *args)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "Traceback" not in done.stderr
