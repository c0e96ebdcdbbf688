"""The stages after train: `tune` fits the decoder alone, `refine` the prior, `steer` the control."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import load as configuration
from pipeline.data.loader import to_float
from pipeline.data.shards import Shards
from pipeline.errors import CheckpointError, ConfigError
from pipeline.rundir import layout
from pipeline.stages import STAGES
from pipeline.training.checkpoints.store import Checkpoints
from pipeline.training.checkpoints.weights import load_model
from pipeline.training.classify.guides import Guides
from pipeline.training.classify.nets import NETS
from pipeline.training.objectives.decoder import DecoderFit
from pipeline.training.objectives.steer import SteerFit
from pipeline.training.phases import last_phase, phase, require_sampling
from tests.conftest import ROOT, run_stage_here
from tests.workers.ranks import run_ranks

WORKER = ROOT / "tests" / "workers" / "train_until.py"
NEVER = "1000000"
LATER = ("tune", "refine", "steer")
RESIDUAL = [
    "model.encoder.name=residual",
    "model.decoder.name=residual",
    "model.residual.channels=[8,16]",
    "model.residual.encoder_blocks=[0,1]",
    "model.residual.decoder_blocks=[0,1]",
    "model.residual.grid=true",
    "model.z_dim=32",
    "model.prior.name=gaussian",
    "train.precision=fp64",
    "train.images=48",
    "train.val_interval=3",
    "train.max_lost_steps=2",
    "tune.images=40",
    "tune.batch_size=8",
    "tune.losses.edges.weight=0.5",
    "tune.code_noise=0.5",
    "refine.images=48",
    "refine.batch_size=8",
    "refine.prior.control=true",
    "refine.prior.anomaly=true",
    "refine.prior.flow_matching.width=16",
    "refine.prior.flow_matching.blocks=1",
    "refine.prior.flow_matching.condition=8",
    "refine.prior.flow_matching.steps=3",
    "refine.prior.flow_matching.draws=2",
    "refine.prior.flow_matching.weak=0.4",
    "steer.images=48",
    "steer.batch_size=8",
    "steer.width=16",
    "steer.guide_epochs=1",
]


@pytest.fixture(scope="module")
def trained(tiny_overrides, tmp_path_factory) -> Path:
    """A run whose train stage is complete."""
    run_dir = tmp_path_factory.mktemp("phases") / "run"
    run_stage_here(configuration.load([], [*tiny_overrides, *RESIDUAL]), run_dir, "train")
    return run_dir


def final(run_dir: Path, stage: str) -> dict[str, torch.Tensor]:
    newest = sorted(layout.checkpoints_dir(run_dir, stage).glob("step_*.safetensors"))[-1]
    return load_file(newest)


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory) -> Path:
    """The run after `tune`, `refine` and `steer` on one rank."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(trained, run_dir)
    for stage in ("tune", "refine", "steer"):
        run_ranks(WORKER, [str(run_dir), NEVER, stage], 1)
    return run_dir


def test_each_phase_moves_only_what_it_fits(trained, alone):
    start, _ = load_model(trained, "best", "ema", torch.device("cpu"), "train")
    before = {f"ema.{name}": value for name, value in start.state_dict().items()}
    tuned, refined = final(alone, "tune"), final(alone, "refine")
    for name in before:
        part = name.split(".")[1]
        if part == "conditional_prior":
            continue  # refine has another prior
        moved = not torch.equal(before[name], tuned[name])
        assert moved == (part == "decoder"), name
        if part != "decoder":  # refine starts from the best of tune, which need not be the last
            assert torch.equal(tuned[name], refined[name]), name
    assert any("velocity" in name for name in refined)
    weak = {name: value for name, value in refined.items() if ".weak." in name}
    for name, value in weak.items():  # raw and averaged models hold the same, which is not the last prior
        assert torch.equal(value, weak[name.replace("model.", "ema.", 1)]), name
    assert not all(torch.equal(value, refined[name.replace(".weak.", ".")]) for name, value in weak.items())
    assert refined["model.control.gain"].abs().sum() > 0
    assert refined["model.anomaly.precision"].abs().sum() > 0
    steered = final(alone, "steer")
    assert any("control.reader" in name for name in steered)
    newest = Checkpoints(layout.checkpoints_dir(alone, "refine"))
    found = newest.read(newest.steps()[-1]).meta["validation"]
    assert found["val_raw/s2"] == found["val_ema/s2"]  # both sets of weights hold the averaged decoder
    for name, value in refined.items():
        if name.startswith(
            "ema."
        ):  # steer starts from the latest of refine and changes nothing that was there
            assert torch.equal(value.float(), steered[name].float()), name


@pytest.mark.parametrize("stage", ["tune", "refine", "steer"])
def test_two_ranks_and_a_stop_follow_the_same_trajectory(trained, alone, tmp_path, stage):
    """Two ranks equal one in double precision; stopped and resumed they equal themselves bitwise."""
    for name in ("whole", "parts"):
        shutil.copytree(trained if stage == "tune" else alone, tmp_path / name)
        shutil.rmtree(layout.train_dir(tmp_path / name, stage), ignore_errors=True)
    run_ranks(WORKER, [str(tmp_path / "whole"), NEVER, stage], 2)
    stopped = run_ranks(WORKER, [str(tmp_path / "parts"), "2", stage], 2)
    assert all("stopped: by a signal, saved at step" in process.stdout for process in stopped)
    run_ranks(WORKER, [str(tmp_path / "parts"), NEVER, stage], 2)
    one, two, resumed = (final(folder, stage) for folder in (alone, tmp_path / "whole", tmp_path / "parts"))
    for name in two:
        assert torch.equal(two[name], resumed[name]), name
        scale = one[name].double().norm().clamp(min=1e-6)
        assert float((one[name] - two[name]).double().norm() / scale) < 1e-9, name


def test_the_weak_prior_is_the_averaged_one_of_its_step(trained, tiny_overrides, tmp_path):
    """48 images in steps of 8: a share of 0.4 ends with step 2."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    kept = ["tune.images=0", "train.keep_every=2", "train.max_lost_steps=4"]
    config = configuration.load([], [*tiny_overrides, *RESIDUAL, *kept])
    run_stage_here(config, run_dir, "refine")
    files = sorted(layout.checkpoints_dir(run_dir, "refine").glob("step_*.safetensors"))
    at_two, last = load_file(files[0]), load_file(files[-1])
    assert files[0].stem == "step_00000002"
    weak = {name: value for name, value in last.items() if name.startswith("ema.conditional_prior.weak.")}
    assert any(not torch.equal(value, last[name.replace(".weak.", ".")]) for name, value in weak.items())
    for name, value in weak.items():
        assert torch.equal(value, at_two[name.replace(".weak.", ".")]), name


def test_a_longer_training_makes_the_later_phases_begin_again(alone, tiny_overrides, tmp_path):
    """Tuned and refined weights of an earlier encoder are never taken for those of the new one."""
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    config = configuration.load([], [*tiny_overrides, *RESIDUAL, "train.images=96"])
    as_before = configuration.load([], [*tiny_overrides, *RESIDUAL])
    assert all(STAGES[stage].complete(as_before, run_dir) for stage in LATER)
    run_stage_here(config, run_dir, "train")
    assert not any(STAGES[stage].complete(config, run_dir) for stage in LATER)
    before = final(run_dir, "tune")
    run_stage_here(config, run_dir, "tune")
    after = final(run_dir, "tune")
    assert not torch.equal(before["ema.encoder.downs.0.weight"], after["ema.encoder.downs.0.weight"])
    assert (run_dir / "tune" / "checkpoints.replaced1").exists()
    assert STAGES["tune"].complete(config, run_dir) and not STAGES["refine"].complete(config, run_dir)


def test_the_last_phase_is_what_is_loaded(alone):
    model, info = load_model(alone, "best", "ema", torch.device("cpu"))
    assert info.file.is_relative_to(alone / "steer") and info.s2 > 0
    earlier, info = load_model(alone, "best", "ema", torch.device("cpu"), "train")
    assert info.file.is_relative_to(alone / "train")
    assert type(model.conditional_prior) is not type(earlier.conditional_prior)


def test_a_phase_of_length_0_is_refused_by_its_key():
    config = configuration.load([], [])
    assert last_phase(config) == "train"
    with pytest.raises(ConfigError, match="refine.images"):
        phase("refine", config)


def test_the_decoder_learns_on_shifted_codes_and_the_codes_own_noise(trained):
    model, _ = load_model(trained, "best", "ema", torch.device("cpu"), "train")
    spread = torch.linspace(0.1, 1.0, model.z_dim)
    fit = DecoderFit(model, spread)
    x = torch.rand(2, 3, model.image_size, model.image_size)
    y = torch.ones(2, model.n_attributes)
    noise = torch.randn(2, fit.noise_width)
    own, extra, share = noise.split((model.z_dim, model.z_dim, 1), dim=1)
    z = model.encode(x, y).sample(own) + torch.special.ndtr(share) * spread * extra
    expected = (x - model.decode(z, y)).square().sum()
    torch.testing.assert_close(fit.sums(x, y, noise)["sse"], expected)


@pytest.mark.parametrize("part", ["control", "anomaly"])
def test_what_only_refine_fits_belongs_to_refine(part):
    with pytest.raises(ConfigError, match=f"model.prior.{part}.*refine.prior.{part}=true"):
        configuration.load([], [f"model.prior.{part}=true"])


def test_the_anomaly_score_knows_the_maps_of_training_images(alone):
    """Their mean is 0, and other codes are above it."""
    model, _ = load_model(alone, "latest", "ema", torch.device("cpu"), "refine")
    shards = Shards(layout.shards_dir(configuration.load([alone / "config.yaml"])), "train")
    images, labels = shards.gather(np.arange(len(shards)))
    x, y = to_float(torch.from_numpy(images)), torch.from_numpy(labels).float()
    with torch.no_grad():
        maps = model.middle(model.encode(x, y).mean, y)
        found = model.anomaly(maps).mean().item()
        odd = model.anomaly(model.middle(4 * torch.randn(len(x), model.z_dim), y)).mean().item()
    assert found == pytest.approx(0.0, abs=1e-3)
    assert odd > 0.2 * maps.shape[1]


def test_a_run_without_steering_trains_no_guide(trained, tiny_overrides, tmp_path):
    config = configuration.load([], [*tiny_overrides, *RESIDUAL, f"runs_dir={tmp_path}", "steer.images=0"])
    with pytest.raises(ConfigError, match="steer.images"):
        run_stage_here(config, tmp_path / "run", "steer")
    assert not (tmp_path / "_shared" / "guides").exists()


@pytest.mark.parametrize(
    "words,said",
    [
        (["eval.guidance=1.5"], "eval.guidance.: got 1.5, expected 1, because the prior .flow. of the stage"),
        (["eval.margin=3"], "eval.margin.: got 3.0, expected 0"),
        (["eval.tries=4"], "eval.tries.: got 4, expected 1.*refine.prior.anomaly=true"),
        (["eval.edit_strength=2"], "eval.edit_strength.: got 2.0.*refine.prior.control=true"),
        (["refine.images=64", "eval.stage=train", "eval.guidance=1.5"], "of the stage train cannot do it"),
        (["eval.stage=refine"], "refine.images.: is 0"),
    ],
)
def test_an_evaluation_that_the_prior_cannot_serve_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        require_sampling(configuration.load([], words))


def test_a_refined_prior_serves_guidance():
    require_sampling(
        configuration.load([], ["refine.images=64", "eval.guidance=1.5", "eval.edit_strength=2"])
    )


def test_steering_needs_a_control_of_refine():
    with pytest.raises(ConfigError, match="steer.images.*refine.prior.control=true"):
        configuration.load([], ["steer.images=100", "refine.images=100"])
    with pytest.raises(ConfigError, match="refine.prior.reader.*steer.width"):
        configuration.load([], ["refine.prior.reader=16"])


def test_steering_learns_from_codes_left_alone_edited_and_shifted(alone):
    """Each kind is decoded as the guides will see it; only edits change the attributes."""
    model, _ = load_model(alone, "best", "ema", torch.device("cpu"))
    fit = SteerFit(model, guides=None)
    torch.manual_seed(0)
    z, y = torch.randn(4, model.z_dim), torch.ones(4, model.n_attributes)
    noise = torch.zeros(4, fit.noise_width)
    noise[:, model.z_dim] = torch.special.ndtri(torch.tensor([0.1, 0.4, 0.6, 0.9]))  # one of each kind
    noise[:, -2] = -9.0  # the smallest strength
    noise[:, -1] = 9.0  # the largest shift
    noise[:, 0] = 1.0
    varied, shown = fit._varied(z, y, noise)
    after = y.clone()
    after[2:, model.n_attributes // 2] = 0
    assert torch.equal(shown, after)
    assert torch.equal(varied[0], z[0])
    torch.testing.assert_close(varied[1], z[1] + 0.5 * model.control.factor[:, 0])
    torch.testing.assert_close(varied[2], model.control.edit_linearly(z, y, after, 1.0)[2])
    torch.testing.assert_close(varied[3], model.control.edit(z, y, after, 0.5)[3])
    assert not torch.allclose(varied[3], model.control.edit_linearly(z, y, after, 0.5)[3])


def test_guides_are_trained_once_and_a_damaged_one_is_named(alone, tiny_overrides, tmp_path):
    config = configuration.load([], [*tiny_overrides, *RESIDUAL])
    files = {name: layout.guide_dir(config, name) / "model.safetensors" for name in NETS}
    made = {name: file.stat().st_mtime_ns for name, file in files.items()}
    run_dir = tmp_path / "run"
    shutil.copytree(alone, run_dir)
    shutil.rmtree(run_dir / "steer")
    bytes_before = files["patches"].read_bytes()
    try:
        files["patches"].write_bytes(b"x" + bytes_before[1:])
        with pytest.raises(CheckpointError, match="model.safetensors: damaged.*`steer` stage again"):
            run_stage_here(config, run_dir, "steer")
    finally:
        files["patches"].write_bytes(bytes_before)
    del made["patches"]
    assert made == {name: files[name].stat().st_mtime_ns for name in made}


def test_a_guide_is_undecided_where_as_many_images_are_above_as_have_the_attribute():
    torch.manual_seed(0)
    guides = Guides([torch.nn.Flatten()], [0, 2], ["digest"])
    logits, labels = torch.randn(1000, 1, 2), (torch.rand(1000, 2) < torch.tensor([0.1, 0.6])).float()
    guides.calibrate(logits, labels)
    above = (logits[:, 0] > guides.thresholds[0]).float().mean(0)
    torch.testing.assert_close(above, labels.mean(0), atol=2e-3, rtol=0)
    x = torch.randn(4, 3, 1, 1)
    expected = (x[:, [0, 2], 0, 0] - guides.thresholds[0]) / logits[:, 0].std(0)
    torch.testing.assert_close(guides(x), expected)
