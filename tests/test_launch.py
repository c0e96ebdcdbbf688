"""The command line: what it refuses, what it continues, and one real stage through the local executor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import launch
from pipeline.config import load as configuration
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError, exit_code
from pipeline.prepare import ROOT, prepare
from pipeline.stages import STAGES
from slurm.chain import Run


def resolve(*argv: str) -> list[Run]:
    return launch.resolve(launch.arguments(list(argv)))


def python(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
import launch
"""


def test_import_needs_no_heavy_package(tmp_path):
    done = python(BLOCK.format(blocked={"torch", "submitit", "mlflow", "matplotlib"}), tmp_path)
    assert done.returncode == 0, done.stderr


def test_dry_run_needs_neither_torch_nor_slurm_and_writes_nothing(tmp_path):
    code = (
        BLOCK.format(blocked={"torch", "mlflow"})
        + "launch.main(['--cluster', 'slurm', '--dry-run', 'runs_dir=runs', 'eval.block=7'])"
    )
    done = python(code, tmp_path, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert (
        "#SBATCH --dependency='afterok:<sigma_cvae-classifier>,aftercorr:<sigma_cvae-train>'" in done.stdout
    )
    assert f"runs_dir: {tmp_path}/runs" in done.stdout and "block: 7" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cluster", "slrum"], "did you mean 'slurm'"),
        (["--config", "sigma_cvea"], "did you mean 'sigma_cvae'"),
        (["--overlay", "dmo"], "did you mean 'demo'"),
        (["--stages", "shard,trian"], "did you mean 'train'"),
        (["train.batch_sise=3"], "did you mean 'train.batch_size'"),
        (["--config", "sigma_cvae", "train.batch_size=many"], "train.batch_size"),
        (["train.batch_size"], "expected key=value"),
        (["--run-dir", "no/such/run"], "no config.yaml"),
        (["--run-dir", "one"], "no config.yaml"),
        (["--config", "sigma_cvae", "sigma_cvae_nf", "--run-dir", "one"], "it holds one run"),
        (["name=same"], "share"),
        (["cluster.nodes=3"], "cluster.nodes"),
        (["--cluster", "slurm"], "no sbatch"),
    ],
)
def test_mistakes_are_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert exit_code(lambda: launch.main(argv)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert out == "" and list(tmp_path.iterdir()) == []


def test_overrides_may_stand_anywhere(tmp_path):
    argv = [
        "eval.n=1",
        "--config",
        "sigma_cvae",
        "seed=3",
        "--overlay",
        "demo",
        "toy.n=9",
        "--stages",
        "eval",
        f"runs_dir={tmp_path}",
    ]
    run = resolve(*argv)[0]
    assert (run.config.eval.n, run.config.seed, run.config.toy.n) == (1, 3, 9)
    assert run.run_dir == tmp_path / "sigma_cvae"


def test_the_default_is_the_demo():
    runs = resolve()
    assert [run.config.name for run in runs] == launch.DEMO_CONFIGS
    assert {run.config.cluster.executor for run in runs} == {"local"}
    assert runs[0].config.train.images < RunConfig().train.images


def test_paths_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = resolve("--config", "sigma_cvae", "shard.source=celeba", "runs_dir=here", "--run-dir", "there")[0]
    assert run.config.shard.source == str(tmp_path / "celeba")
    assert run.config.runs_dir == str(tmp_path / "here")
    assert run.run_dir == tmp_path / "there"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run directory with a checkpoint, launched on a cluster."""
    run = resolve(
        "--cluster",
        "slurm",
        "--config",
        "sigma_cvae",
        f"runs_dir={tmp_path}",
        "cluster.partition=gpu",
        "train.images=1000",
    )[0]
    launch.prepare(run.run_dir, run.config, ["train"])
    checkpoints = run.run_dir / "train" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000040.json").write_text("{}")
    return run.run_dir


def test_run_dir_alone_brings_its_configuration(trained):
    run = resolve("--run-dir", str(trained), "eval.n=12")[0]
    assert run.config.train.images == 1000 and run.config.eval.n == 12
    assert run.config.cluster.partition == "gpu"
    here = resolve("--run-dir", str(trained), "--cluster", "local")[0]
    assert here.config.cluster == resolve()[0].config.cluster  # nothing is left of the other cluster
    assert here.config.train == resolve("--run-dir", str(trained))[0].config.train


def test_checkpoints_are_continued_only_with_the_settings_that_made_them(trained):
    other = resolve("--run-dir", str(trained), "model.z_dim=7", "data.flip=false", "train.images=9")[0]
    with pytest.raises(ConfigError) as refused:
        launch.require_continuable(trained, other.config)
    for text in ("model.z_dim: 128 -> 7", "data.flip: True -> False", "init_from"):
        assert text in str(refused.value)
    assert "train.images" not in str(refused.value)


def test_refused_launch_changes_nothing(trained, capsys):
    before = (trained / "config.yaml").read_text()
    assert exit_code(lambda: launch.main(["--run-dir", str(trained), "--cluster", "local", "seed=4"])) == 2
    assert "seed: 0 -> 4" in capsys.readouterr().err
    assert (trained / "config.yaml").read_text() == before
    assert len((trained / "config_history.jsonl").read_text().splitlines()) == 1


def test_what_may_change_is_recorded(trained):
    longer = resolve(
        "--run-dir", str(trained), "--cluster", "local", "train.images=2000", "data.verify=always"
    )[0]
    launch.require_continuable(trained, longer.config)
    launch.prepare(trained, longer.config, ["train"])
    first, second = [json.loads(line) for line in (trained / "config_history.jsonl").read_text().splitlines()]
    assert first["changed"] == {} and first["step"] == 0
    assert second["changed"]["train.images"] == [1000, 2000]
    assert second["changed"]["cluster.executor"] == ["slurm", "local"]
    assert second["step"] == 40 and second["stages"] == ["train"]
    assert configuration.load([trained / "config.yaml"]) == longer.config


def test_without_checkpoints_everything_may_change(tmp_path):
    argv = ["--config", "sigma_cvae", f"runs_dir={tmp_path}"]
    launch.prepare(tmp_path / "sigma_cvae", resolve(*argv)[0].config, ["shard"])
    other = resolve(*argv, "model.z_dim=7")[0]
    launch.require_continuable(other.run_dir, other.config)  # does not raise
    launch.prepare(other.run_dir, other.config, ["shard"])
    assert launch.recorded(other.run_dir).model.z_dim == 7


def test_a_real_stage_here(tmp_path, monkeypatch, capsys):
    """`shard` runs as a local job from another working directory; a second launch finds it complete."""
    monkeypatch.chdir(tmp_path)
    argv = [
        "--config",
        "sigma_cvae",
        "toy.n=12",
        "shard.samples_per_shard=4",
        "tracking.enabled=false",
        "--stages",
        "shard",
    ]
    launch.main(argv)
    out = capsys.readouterr().out
    assert "sigma_cvae-shard: job" in out and "shard[0] I" in out
    run = resolve(*argv)[0]
    assert STAGES["shard"].complete(run.config, run.run_dir)
    assert "shard: complete, not submitted" in launch.plan([run], ["shard"], explicit=False).notes[0]


def test_a_stages_mistake_ends_the_launch_with_its_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "sigma_cvae", "shard.source=nowhere", "tracking.enabled=false", "--stages", "shard"]
    assert exit_code(lambda: launch.main(argv)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and str(tmp_path / "nowhere") in message
    assert json.loads((tmp_path / "runs/sigma_cvae/logs/shard/error.json").read_text())["user"] is True


def test_the_password_of_a_tracking_server_is_printed_and_recorded_nowhere_but_in_the_configuration(tmp_path):
    words = ["--config", "sigma_cvae", f"runs_dir={tmp_path}", "tracking.uri=http://me:hush@server"]
    done = python(f"import launch; launch.main({[*words, '--dry-run']!r})", tmp_path)
    assert done.returncode == 0 and "server" in done.stdout and "hush" not in done.stdout + done.stderr
    runs = launch.resolve(launch.arguments(words))
    for uri in ("http://me:hush@server", "http://me:hush2@server"):
        config = replace(runs[0].config, tracking=replace(runs[0].config.tracking, uri=uri))
        prepare(runs[0].run_dir, config, ["train"])
    assert "hush" not in (runs[0].run_dir / "config_history.jsonl").read_text()
