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
from pipeline.data.manifest import content_digest
from pipeline.errors import ConfigError, exit_code
from pipeline.prepare import ROOT, prepare
from pipeline.rundir import layout
from pipeline.rundir.files import write_json
from pipeline.stages import STAGES
from slurm import announce
from slurm.chain import Run, parse_stages, plan
from slurm.executors import executor_named
from slurm.preflight import chain_checks
from tests.conftest import write_noise_celeba
from tests.fake_run import make_run


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


def test_a_login_node_needs_neither_torch_nor_mlflow(tmp_path):
    code = BLOCK + "import slurm.preflight, slurm.job, slurm.executors.cluster, slurm.overview, tools.status"
    done = python(code.format(blocked={"torch", "mlflow", "matplotlib"}), tmp_path)
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
        (
            ["--stages", "shard", "train"],
            "--stages: stages are joined by commas, without blanks: --stages shard,train",
        ),
        (["--stages", "shard,", "train"], "--stages shard,train\n"),
        (["--stages", "shard train,eval"], "--stages shard,train,eval\n"),
        (["eval"], "--stages eval\n"),
        (["--config", "paper,sharp"], "names are separated by blanks: --config paper sharp"),
        (["--overlay", "demo,gpu"], "names are separated by blanks: --overlay demo gpu"),
        (["paper"], "--config paper"),
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


def test_of_two_overrides_of_a_key_the_later_one_wins():
    """Also if the first one follows a list of names."""
    run = resolve("--config", "sigma_cvae", "seed=1", "--stages", "eval", "seed=2")[0]
    assert run.config.seed == 2
    run = resolve("seed=1", "seed=2", "--config", "sigma_cvae", "seed=1")[0]
    assert run.config.seed == 1


def test_a_word_that_is_given_twice_means_both():
    once = resolve("--config", "sigma_cvae", "paper", "--overlay", "demo", "gpu")
    twice = resolve("--config", "sigma_cvae", "--overlay", "demo", "--config", "paper", "--overlay", "gpu")
    assert once == twice and len(once) == 2


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


def test_other_data_are_refused_before_they_are_made(trained, capsys):
    """Also if the training is finished, so that nothing of it would look at the shards again."""
    finished(trained)
    before = (trained / "config.yaml").read_bytes()
    argv = ["--run-dir", str(trained), "--cluster", "local", "toy.n=9", "shard.seed=4", "eval.n=9"]
    assert exit_code(lambda: launch.main(argv)) == 2
    said = capsys.readouterr().err
    assert "its checkpoints were trained on other data (toy.n: 4000 -> 9; shard.seed: 0 -> 4)" in said
    assert (trained / "config.yaml").read_bytes() == before


def test_the_same_data_may_lie_in_another_place(trained, tmp_path):
    given = tmp_path / "given" / "manifest.json"
    write_json(given, {"content_digest": "5a"})
    moved = resolve("--run-dir", str(trained), f"data.shards={given.parent}")[0].config
    checkpoint = layout.checkpoints_dir(trained) / "step_00000040.json"
    for trained_on in ("", "other"):
        write_json(checkpoint, {"sections": {"shards_content": trained_on}})
        with pytest.raises(ConfigError, match="trained on other data .data.shards: '' -> "):
            launch.require_continuable(trained, moved)
    write_json(checkpoint, {"sections": {"shards_content": "5a"}})
    launch.require_continuable(trained, moved)
    launch.prepare(trained, moved, ["eval"])
    given.unlink()  # the recorded place is gone
    with pytest.raises(ConfigError, match="trained on other data .data.shards: '/"):
        launch.require_continuable(trained, replace(moved, data=replace(moved.data, shards="")))


def test_a_later_phase_holds_its_settings_too(trained):
    """Else it would count as complete, and config.yaml would tell what was never trained."""
    asked = ("--run-dir", str(trained), "refine.images=64")
    launch.prepare(trained, resolve(*asked)[0].config, ["refine"])
    other = resolve(*asked, "refine.attribute_dropout=0.5", "refine.images=128")[0]
    launch.require_continuable(trained, other.config)  # the stage has not begun
    (trained / "refine/checkpoints").mkdir(parents=True)
    (trained / "refine/checkpoints/step_00000001.json").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        launch.require_continuable(trained, other.config)
    for text in ("of the stage refine", "refine.attribute_dropout: 0.1 -> 0.5", f"remove {trained}/refine"):
        assert text in str(refused.value)
    assert "refine.images" not in str(refused.value)
    launch.require_continuable(trained, resolve(*asked, "refine.images=128")[0].config)


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
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data: 12 faces drawn by this project (shard.source is empty), seed 0, 64 pixels"
    assert lines[1].startswith("training on ") and lines[1].endswith(" on this machine")
    assert lines[2].startswith("tracking: nowhere")
    assert lines[-1].startswith("[1/1] sigma_cvae shard: done in ") and len(lines) < 9
    run = resolve(*argv)[0]
    assert STAGES["shard"].complete(run.config, run.run_dir)
    jobs = (run.run_dir / "jobs.json").read_bytes()
    launch.main(argv)
    out = capsys.readouterr().out
    assert "sigma_cvae: shard: complete already\njobs: none" in out and "[1/" not in out
    assert (run.run_dir / "jobs.json").read_bytes() == jobs  # no job was started to learn that


def test_a_stages_mistake_ends_the_launch_with_its_message(tmp_path, monkeypatch, capsys):
    """Only the job itself finds out that the annotations name images that are not there."""
    monkeypatch.chdir(tmp_path)
    source = write_noise_celeba(tmp_path / "celeba", 6)
    (source / "img_align_celeba/000003.jpg").unlink()
    argv = ["--config", "sigma_cvae", f"shard.source={source}", "tracking.enabled=false", "--stages", "shard"]
    assert exit_code(lambda: launch.main(argv)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and "annotated images are not there" in message
    assert json.loads((tmp_path / "runs/sigma_cvae/logs/shard/error.json").read_text())["user"] is True


def test_wrong_paths_are_found_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = {
        "shard.source": "nowhere",
        "train.init_from": "gone",
        "eval.network": "no.pth",
        "tune.losses.perceptual.network": "no.pth",
    }
    argv = ["--config", "sigma_cvae", *(f"{key}={path}" for key, path in paths.items())]
    assert exit_code(lambda: launch.main(argv)) == 2
    out, err = capsys.readouterr()
    for key in paths:
        assert f"key '{key}': {tmp_path}" in err
    assert out == "" and list(tmp_path.iterdir()) == []


def test_a_missing_package_is_found_before_hours_of_training(tmp_path, monkeypatch, capsys):
    """`best` needs the weights of the perceptual term in `tune`, after `train`. The judge is a wish only."""
    monkeypatch.setattr("pipeline.config.extras.installed", lambda *packages: False)
    argv = ["--config", "best", f"runs_dir={tmp_path}"]
    assert exit_code(lambda: launch.main(argv)) == 2
    err = capsys.readouterr().err
    assert (
        "key 'tune.losses.perceptual.weight' for stage tune" in err
        and "pip install -e '.[perceptual]'" in err
    )
    assert "eval.judge" not in err and list(tmp_path.iterdir()) == []
    (run,) = resolve("--config", "sigma_cvae", f"runs_dir={tmp_path}")
    chain = plan([run], parse_stages(None))
    (warning,) = executor_named("local").check([run], chain, preflight=True)
    assert "key 'eval.judge'" in warning and "pip install -e '.[judge]'" in warning


GRID = ["refine.prior.name=flow_matching", "refine.prior.flow_matching.net=grid"]
SIDE_3 = "refine.prior.flow_matching.side=3"
CELLS = ["model.encoder.name=residual", "model.decoder.name=residual", "model.residual.grid=true"]


@pytest.mark.parametrize(
    "words,said",
    [
        (["shard.size=16", "model.net.channels=[8,8,8,8]"], "key 'model': model.net.channels: 4 halvings"),
        (["model.encoder.name=residual", "shard.size=60"], "key 'model': model.residual.channels: 3 halv"),
        (["model.prior.net=conv1d"], "key 'model': prior.net=conv1d runs along attribute embeddings"),
        (["refine.images=1", *GRID], "key 'refine.prior': prior.flow_matching.net=grid needs codes"),
        (["refine.images=1", *GRID, *CELLS, "shard.size=128", "model.z_dim=256"], "grid of 16x16 cells"),
        (["refine.images=1", *GRID, *CELLS, "shard.size=24", "model.z_dim=9", SIDE_3], "no grid of 3x3"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_found_before_anything_is_made(
    words, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "sigma_cvae_nf", f"runs_dir={tmp_path}/runs", *words]
    assert exit_code(lambda: launch.main(argv)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def misfits(*words: str) -> list[str]:
    runs = resolve("--config", "sigma_cvae_nf", *words)
    return [found.text for found in chain_checks.model_fits_together(plan(runs, parse_stages(None)))]


def test_a_model_must_fit_the_images_of_shards_that_are_there(tmp_path):
    """Their size counts, whatever `shard.size` says."""
    file = tmp_path / "given" / "manifest.json"
    content = {"format": layout.SHARD_FORMAT, "content_digest": content_digest([]), "size": 4, "splits": {}}
    write_json(file, {**content, "attributes": ["Male"]})
    (said,) = misfits(f"data.shards={file.parent}", f"runs_dir={tmp_path}", "shard.size=64")
    assert "halvings of a 4 pixel image" in said


def test_a_fault_of_the_nets_is_told_once(tmp_path):
    """The prior of `refine` runs on the same nets; only what it adds is told beside them."""
    words = ["shard.size=4", "refine.images=64", "steer.images=64", "refine.prior.control=true"]
    words.append(f"runs_dir={tmp_path}")
    assert [said.split(":")[0] for said in misfits(*words)] == ["key 'model'"]
    both = misfits(*words, *GRID, "model.z_dim=100")
    assert {said.split(":")[0] for said in both} == {"key 'model'", "key 'refine.prior'"}


@pytest.mark.parametrize(
    "stage, refused", [("train", []), ("refine", ["refine"]), ("steer", ["refine", "steer"])]
)
def test_an_evaluation_needs_no_phase_behind_the_one_it_evaluates(stage, refused, tmp_path, monkeypatch):
    begun = {"shard", "classifier", "train", "tune"}
    monkeypatch.setattr(chain_checks, "_begun", lambda run, name: name in begun)
    words = [f"runs_dir={tmp_path}", "refine.images=64", "steer.images=64", "refine.prior.control=true"]
    config = configuration.load([], [*words, f"eval.stage={stage}"])
    alone = plan([Run(config, tmp_path / "run")], ["eval"])
    said = [finding.text for finding in chain_checks.inputs_are_made(alone)]
    assert len(said) == len(refused)
    assert all(f"needs the stage {name}," in text for name, text in zip(refused, sorted(said), strict=True))


def test_a_stage_without_its_input_is_refused(tmp_path, capsys):
    argv = ["--config", "sigma_cvae", f"runs_dir={tmp_path}", "--stages", "eval"]
    assert exit_code(lambda: launch.main(argv)) == 2
    assert "the stage eval needs the stage train, which has not run yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    argv = ["--config", "sigma_cvae", f"runs_dir={tmp_path}", "--stages", "tune"]
    assert exit_code(lambda: launch.main(argv)) == 2
    assert "no run has this stage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        (["--config", "paper"], True),
        (["--config", "paper", "toy.n=100"], False),
        (["--config", "paper", "--overlay", "demo"], False),
        (["--config", "paper", "shard.source=/data"], False),
        ([], False),
    ],
)
def test_a_forgotten_source_is_a_warning(words, warns):
    args = launch.arguments(words)
    found = launch._forgotten_source(args, launch.resolve(args))
    assert bool(found) == warns
    if warns:
        assert "shard.source" in found[0]


def finished(run_dir: Path) -> None:
    """Let the training of a run look finished, with the stages before it."""
    config = launch.recorded(run_dir)
    (run_dir / "train/done.json").write_text(json.dumps({"step": 40, "images": config.train.images}))
    for folder, file in ((layout.shards_dir(config), "manifest"), (layout.classifier_dir(config), "metrics")):
        folder.mkdir(parents=True)
        (folder / f"{file}.json").write_text("{}")


def test_an_evaluation_leaves_the_configuration_as_it_is(trained):
    finished(trained)
    before = (trained / "config.yaml").read_bytes()
    for words in (["--stages", "eval"], []):
        args = launch.arguments(["--run-dir", str(trained), "--cluster", "local", "eval.n=12", *words])
        stages = launch.parse_stages(args.stages)
        run = launch._marked(launch.resolve(args)[0], stages)
        assert run.evaluates_only and run.config.eval.n == 12
        assert [step.stage for step in launch.plan([run], stages).steps] == ["eval"]
        launch.prepare(trained, run.config, stages, keep=run.evaluates_only)
        assert (trained / "config.yaml").read_bytes() == before
    history = (trained / "config_history.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["changed"]["eval.n"][1] == 12
    longer = resolve("--run-dir", str(trained), "train.images=2000", "eval.n=12")[0]
    assert not launch._marked(longer, list(STAGES)).evaluates_only


def test_an_evaluation_with_other_settings_of_the_run_is_refused(trained):
    finished(trained)
    other = resolve("--run-dir", str(trained), "tracking.enabled=false", "eval.n=12")[0]
    with pytest.raises(ConfigError, match="tracking.enabled: True -> False.*--stages eval"):
        launch._marked(other, ["eval"])


def test_a_new_length_says_what_becomes_of_the_learning_rate(trained):
    longer = resolve("--run-dir", str(trained), "train.images=2000")[0]
    said = launch.schedule_note(trained, longer.config)
    assert "the cosine schedule over 2,000 images, no longer over 1,000" in said
    assert launch.schedule_note(trained, resolve("--run-dir", str(trained), "eval.n=3")[0].config) == ""


def test_the_password_of_a_tracking_server_is_printed_and_recorded_nowhere_but_in_the_configuration(tmp_path):
    words = ["--config", "sigma_cvae", f"runs_dir={tmp_path}", "tracking.uri=http://me:hush@server"]
    done = python(f"import launch; launch.main({[*words, '--dry-run']!r})", tmp_path)
    assert done.returncode == 0 and "server" in done.stdout and "hush" not in done.stdout + done.stderr
    runs = launch.resolve(launch.arguments(words))
    for uri in ("http://me:hush@server", "http://me:hush2@server"):
        config = replace(runs[0].config, tracking=replace(runs[0].config.tracking, uri=uri))
        prepare(runs[0].run_dir, config, ["train"])
    assert "hush" not in (runs[0].run_dir / "config_history.jsonl").read_text()


def test_the_next_commands_name_attributes_of_the_data_set(tmp_path):
    run_dir = make_run(tmp_path, "own", evals=1)
    said = announce.closing([run_dir], [], "")
    assert "'Male,!Smiling'" in said and "compare.py" not in said  # one run has nothing to be compared with
    two = [run_dir, make_run(tmp_path, "other", evals=1)]
    assert f"compare.py {two[0]} {two[1]}" in announce.closing(two, [], "")
    file = run_dir / "eval/1/metrics.json"
    record = json.loads(file.read_text())
    record["per_attribute"] = {"Circle": record["per_attribute"]["Male"]}
    file.write_text(json.dumps(record))
    assert "own Circle --n 16" in announce.closing([run_dir], [], "")
