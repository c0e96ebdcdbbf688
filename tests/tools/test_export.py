"""An export carries programs, a model card, and a model in MLflow that answers requests with PNG images."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import cvae
from cvae.config import SamplingConfig
from cvae.use import Model
from pipeline.data.loader import to_float
from pipeline.errors import UserError
from pipeline.evaluation.classifier import load as load_classifier
from pipeline.rundir import layout
from pipeline.rundir.record import run_config
from pipeline.runtime.ports import free_port
from tests.cvae.test_use import PRIORS, card_of, config_of, live
from tests.fake_run import add_eval
from tests.pipeline.tracking.in_store import parent_of
from tests.tiny_run import ATTRIBUTES, SIZE, make_checkpoint, make_classifier, make_shards, tiny_config
from tools import export
from tools.parts import programs

WORDS = "Male,!Smiling"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, empty_store) -> Path:
    """A folder with the tracked run sigma_cvae_nf, its shards, and an MLflow store."""
    folder = tmp_path_factory.mktemp("exports") / "runs"
    config = tiny_config(folder, "name=sigma_cvae_nf", "tracking.enabled=true")
    make_shards(config)
    make_classifier(config)
    make_checkpoint(folder / "sigma_cvae_nf", config, ATTRIBUTES)
    shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture
def run_dir(runs) -> Path:
    return runs / "sigma_cvae_nf"


@pytest.mark.parametrize(("evaluated", "step"), [("best", 10), ("latest", 20), ("all", 10), ("20", 20)])
def test_what_was_evaluated_is_exported(tmp_path, evaluated, step):
    settings = ("eval.guidance=2", "eval.margin=3", "eval.edit_strength=2.5", "eval.tries=4")
    config = tiny_config(tmp_path / "runs", f"eval.checkpoint={evaluated}", *settings)
    make_shards(config)
    run_dir = tmp_path / "runs" / config.name
    make_checkpoint(run_dir, config, ATTRIBUTES)
    make_checkpoint(run_dir, config, ATTRIBUTES, step=20, loss=2.0)
    card = cvae.load(export.export(run_dir, tmp_path / "exported")).card
    assert card.provenance["step"] == step
    assert card.sampling == SamplingConfig()  # this prior has neither a velocity nor a control
    able = replace(config.model.prior, name="flow_matching", control=True, anomaly=True)
    able = replace(config, model=replace(config.model, prior=able))
    assert export._sampling(able) == SamplingConfig(guidance=2.0, margin=3.0, strength=2.5, tries=4)


def test_weights_and_stage_of_an_export_are_those_of_the_evaluation(tmp_path):
    config = tiny_config(tmp_path / "runs", "eval.weights=raw", "eval.stage=train", "refine.images=64")
    make_shards(config)
    run_dir = tmp_path / "runs" / config.name
    make_checkpoint(run_dir, config, ATTRIBUTES)  # of the stage train; refine has not run
    found = cvae.load(export.export(run_dir, tmp_path / "exported")).card.provenance
    assert (found["weights"], found["stage"]) == ("raw", "train")


@pytest.mark.parametrize("name", ["all", "newest"])
def test_a_checkpoint_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=f"^--checkpoint: got '{name}', expected best, latest or the step"):
        export.main([str(tmp_path), "--checkpoint", name])


# ---- programs


def small(prior: str) -> Model:
    config = config_of(prior)
    few_steps = replace(config.prior.flow_matching, steps=3)  # each one is unrolled
    config = replace(config, prior=replace(config.prior, flow_matching=few_steps))
    return Model(live(config), card_of(config))


@pytest.mark.parametrize("prior", PRIORS)
def test_programs_equal_the_live_model(tmp_path, prior):
    import onnxruntime

    model = small(prior)
    written = programs.write_programs(model, tmp_path, ["onnx", "pt2"])
    assert sorted(file.relative_to(tmp_path).as_posix() for file in written) == [
        "onnx/decoder.onnx", "onnx/sampler.onnx", "pt2/decoder.pt2", "pt2/sampler.pt2",
    ]  # fmt: skip
    y = torch.rand(1, len(ATTRIBUTES)).round()  # one image: no size of a batch is written into a program
    noise = torch.randn(1, 8)
    with torch.no_grad():
        z = model.net.prior(y).sample(noise)
        image = model.net.decode(z, y)
    run = {}
    for name in ("sampler", "decoder"):
        run[name] = onnxruntime.InferenceSession(tmp_path / f"onnx/{name}.onnx").run
    codes = run["sampler"](["z"], {"attributes": y.numpy(), "noise": noise.numpy()})[0]
    images = run["decoder"](["image"], {"attributes": y.numpy(), "z": codes})[0]
    assert np.abs(codes - z.numpy()).max() < 1e-5 * max(1, float(z.abs().max()))
    assert np.abs(images - image.numpy()).max() < 1e-5


def test_without_a_format_nothing_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_traced", lambda *parts: pytest.fail("it was traced"))
    assert programs.write_programs(small("flow"), tmp_path, []) == {}


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    def wrong(content, part, inputs):
        return programs._run_pt2(content, part, inputs) + 1e-4

    monkeypatch.setitem(programs.FORMATS, "pt2", (programs._to_pt2, wrong))
    with pytest.raises(UserError, match="differs by 1.0e-04"):
        programs.write_programs(small("flow"), tmp_path, ["pt2"])
    assert not list(tmp_path.iterdir())


def test_a_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnxscript is missing; install the packages: pip install"):
        programs.write_programs(small("flow"), tmp_path, ["onnx"])


# ---- model card


def card_text(folder: Path) -> tuple[dict, str]:
    """The front matter of README.md, and the rest."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_folder_has_the_layout_of_the_hub_and_a_card_from_the_run(run_dir, tmp_path):
    folder = tmp_path / "exported"
    add_eval(run_dir, 1)
    export.main([str(run_dir), str(folder)])
    names = {file.name for file in folder.iterdir()}
    assert names == {"model.safetensors", "model.json", "README.md", "samples.png", ".gitattributes"}
    assert Image.open(folder / "samples.png").size == (8 * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)
    front, text = card_text(folder)
    assert front["license"] == "mit" and "drawings that the project makes itself" in text
    assert "| step | 10 |" in text and "60 training images" in text
    evaluation = json.loads((run_dir / "eval/1/metrics.json").read_text())
    assert f"N = {evaluation['protocol']['n']:,}" in text
    assert "those of step 90. This folder holds step 10." in text
    shutil.rmtree(run_dir / "eval")
    export.main([str(run_dir), str(folder)])
    assert "This run was not evaluated." in card_text(folder)[1]


def test_a_card_that_was_changed_by_hand_stays(run_dir, tmp_path, capsys):
    folder = tmp_path / "exported"
    for _ in range(2):
        export.main([str(run_dir), str(folder)])
    assert not (folder / "README.md.new").exists() and "was changed" not in capsys.readouterr().err
    own = (folder / "README.md").read_text().replace("## Limits", "Ask Ada first.\n\n## Limits")
    (folder / "README.md").write_text(own)
    export.main([str(run_dir), str(folder)])
    assert (folder / "README.md").read_text() == own
    assert "## Limits" in (folder / "README.md.new").read_text()
    assert "README.md: was changed and stays; the new card is" in capsys.readouterr().err


def test_an_export_on_the_fly_leaves_nothing_of_other_weights(tmp_path, capsys):
    config = tiny_config(tmp_path / "runs")
    make_shards(config)
    run_dir = tmp_path / "runs" / config.name
    make_checkpoint(run_dir, config, ATTRIBUTES)
    export.main([str(run_dir)])
    folder = layout.model_dir(run_dir)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "decoder.onnx").touch()
    export.main([str(run_dir)])
    assert (folder / "onnx" / "decoder.onnx").exists()  # the weights are the same
    make_checkpoint(run_dir, config, ATTRIBUTES, step=20, loss=0.5)
    (folder / "model.safetensors").write_bytes(b"other weights")
    later = (folder / "model.json").stat().st_mtime_ns + 1
    os.utime(next(layout.checkpoints_dir(run_dir).glob("*20.json")), ns=(later, later))
    export.open_model(run_dir)
    assert "| step | 20 |" in card_text(folder)[1]
    assert not (folder / "onnx" / "decoder.onnx").exists()
    assert "decoder.onnx: deleted, because it held other weights" in capsys.readouterr().err


def test_a_card_names_the_largest_square(run_dir):
    model = small("flow")
    model.card.provenance.update(data="mine", train_images=60, step=10)
    model.card = replace(model.card, crop=0)
    assert "60 training images; the largest centred square, resized" in export.model_card(run_dir, model, {})


def test_a_model_of_celeba_carries_its_licence_and_its_bias(run_dir):
    model = small("flow")
    model.card.provenance.update(data="celeba", train_images=60, step=10)
    text = export.model_card(run_dir, model, {})
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "other" and front["license_link"].endswith("CelebA.html")
    assert "non-commercial research only" in text and "**Bias.**" in text and "**Consent.**" in text


@pytest.mark.parametrize(("data", "licence"), [("toy", "mit"), ("mine", "other")])
def test_the_licence_is_that_of_the_data(run_dir, data, licence):
    model = small("flow")
    model.card.provenance.update(data=data, train_images=60, step=10)
    front = yaml.safe_load(export.model_card(run_dir, model, {}).split("---\n")[1])
    assert front["license"] == licence and "celeba" not in str(front)


# ---- MLflow


@pytest.fixture(scope="module")
def registered(runs):
    """The model, registered twice: version 2."""
    run_dir = runs / "sigma_cvae_nf"
    folder = runs.parent / "for the registry"
    export.export(run_dir, folder)
    first = export.register(run_dir, folder, "faces")
    second = export.register(run_dir, folder, "faces")
    assert (first.version, second.version) == ("1", "2")
    return second


def decoded(png: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]))


def test_a_registered_model_has_a_signature_and_no_pickle(runs, registered, tmp_path, monkeypatch):
    from mlflow.artifacts import download_artifacts
    from mlflow.models import get_model_info
    from mlflow.pyfunc import load_model
    from pandas import DataFrame

    from pipeline.tracking.mlflow.store import open_client

    store = registered.store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # where MLflow looks for registered models
    client = open_client(store)
    version = client.get_model_version("faces", "2")
    parent = parent_of(client, "cvae")
    assert version.run_id == parent.info.run_id and version.status == "READY"
    outputs = client.get_run(parent.info.run_id).outputs.model_outputs
    assert version.source in [f"models:/{output.model_id}" for output in outputs]

    local = Path(download_artifacts(registered.uri, dst_path=str(tmp_path)))
    files = [file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file()]
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth"))]
    assert "code/cvae/use.py" in files and not [name for name in files if "pipeline/" in name]
    signature = get_model_info(str(local)).signature
    assert signature.inputs.input_names() == ["request"]
    assert {param.name for param in signature.params} == {
        "seed",
        "temperature",
        "guidance",
        "margin",
        "tries",
    }
    answers = load_model(str(local)).predict(DataFrame({"request": [WORDS, WORDS]}), params={"seed": 3})
    expected = cvae.load(runs.parent / "for the registry").sample({"Male": 1, "Smiling": 0}, n=2, seed=3)
    images = np.stack([decoded(answer["png"]) for answer in answers]).astype(int)
    assert np.abs(images - expected.numpy()).max() <= 1  # they are drawn one by one there


def test_a_run_that_is_not_tracked_is_not_registered(tmp_path):
    config = tiny_config(tmp_path)
    make_checkpoint(tmp_path / "run", config, ATTRIBUTES)
    with pytest.raises(UserError, match="tracking.enabled=true"):
        export.register(tmp_path / "run", tmp_path, "faces")


def ask(address: str, content: dict) -> dict:
    """POST a JSON request; an HTTP error gives its answer too."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(content).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return {"status": error.code, "text": error.read().decode()}


@pytest.mark.slow
def test_mlflow_serves_png_images_that_the_classifier_reads_as_the_live_ones(runs, registered):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", registered.uri, "--env-manager"]
    command += ["local", "--host", "127.0.0.1", "--port", str(port)]
    quiet = {"MLFLOW_TRACKING_URI": registered.store, "MLFLOW_DISABLE_TELEMETRY": "true"}
    quiet["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn
    with open(runs / "serve.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=runs, env=os.environ | quiet, start_new_session=True
        )
        try:
            _wait(f"http://127.0.0.1:{port}/ping", process, runs / "serve.log")
            rows = {"dataframe_records": [{"request": WORDS}] * 4, "params": {"seed": 7}}
            answers = ask(f"http://127.0.0.1:{port}/invocations", rows)["predictions"]
            wrong = {"dataframe_records": [{"request": "Mal"}]}
            refused = ask(f"http://127.0.0.1:{port}/invocations", wrong)
        finally:
            os.killpg(process.pid, 9)
            process.wait()
    images = np.stack([decoded(answer["png"]) for answer in answers])
    config = run_config(runs / "sigma_cvae_nf")
    classifier = load_classifier(layout.classifier_dir(config), torch.device("cpu"))
    own = cvae.load(runs.parent / "for the registry").sample({"Male": 1, "Smiling": 0}, n=4, seed=7)
    scores = [classifier.net(to_float(batch)) for batch in (torch.from_numpy(images), own)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=0)
    assert refused["status"] == 400 and "did you mean" in refused["text"]


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    give_up = time.monotonic() + 600
    while time.monotonic() < give_up:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            threading.Event().wait(0.5)
    raise AssertionError(log.read_text())
