"""An exported model is the live model: it samples, edits and reconstructs, and says what is wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import cvae
from cvae.config import (
    ConditionerConfig,
    FlowConfig,
    FlowMatchingConfig,
    LossConfig,
    ModelConfig,
    NetConfig,
    PerceptualConfig,
    PriorConfig,
    SamplingConfig,
)
from cvae.control import CodeMoments
from cvae.io import Card, ModelFileError, pack, read
from cvae.model import CVAE
from cvae.request import RequestError, parse_request
from cvae.use import BATCH, Model
from pipeline.data.pixels import to_uint8
from tests.conftest import ROOT
from tests.tiny_run import ATTRIBUTES, SIZE, tiny_images

PRIORS = ("flow", "flow_matching")


def config_of(prior: str, control: bool = False) -> ModelConfig:
    settings = PriorConfig(
        name=prior,
        control=control,
        hidden=8,
        flow=FlowConfig(layers=2, hidden=8),
        flow_matching=FlowMatchingConfig(width=16, blocks=1, condition=8, steps=24),
    )
    net = NetConfig(channels=[8, 8])
    return ModelConfig(z_dim=8, net=net, conditioner=ConditionerConfig(width=8), prior=settings)


def live(config: ModelConfig) -> CVAE:
    """A model in which no layer is zero, so every attribute and every weight matters."""
    torch.manual_seed(0)
    net = CVAE(config, SIZE, len(ATTRIBUTES))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return net.eval()


def card_of(config: ModelConfig, **changes) -> Card:
    _, labels = tiny_images(60, 0)
    labels[labels[:, 3] == 1, 2] = 0  # no image is Male and has Heavy_Makeup
    values = {
        "model": config,
        "size": SIZE,
        "crop": 148,
        "native_size": (218, 178),
        "attributes": ATTRIBUTES,
        "exclusive": [["Bald", "Young"]],
        "rows": torch.from_numpy(labels),
        "provenance": {"step": 10},
    }
    return Card(**{**values, **changes})


def write(folder, net: CVAE, card: Card):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pack(net, card).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    made = {}
    for prior in PRIORS:
        config = config_of(prior)
        made[prior] = write(tmp_path_factory.mktemp(prior), live(config), card_of(config))
    return made


@pytest.fixture(params=PRIORS)
def model(request, folders):
    return cvae.load(folders[request.param])


@pytest.fixture
def flow(folders):
    return cvae.load(folders["flow"])


@pytest.fixture
def photos() -> np.ndarray:
    return tiny_images(3, 5)[0]


def rewritten(folder, tmp_path, change):
    """A copy of an export whose model.json is changed and sealed again."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tree = json.loads((tmp_path / "model.json").read_text())
    del tree["digest"]
    change(tree)
    tree["digest"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    (tmp_path / "model.json").write_text(json.dumps(tree))
    return tmp_path


# ---- the same model


@pytest.mark.parametrize("prior", PRIORS)
def test_it_equals_the_live_model(folders, prior):
    net, opened = live(config_of(prior)), cvae.load(folders[prior])
    y, noise = torch.rand(5, len(ATTRIBUTES)).round(), torch.randn(5, 8)
    with torch.no_grad():
        expected = net.decode(net.prior(y).sample(noise), y)
        found = opened.net.decode(opened.net.prior(y).sample(noise), y)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_card_survives_the_disk(folders):
    _, card = read(folders["flow"])
    wanted = card_of(config_of("flow"))
    assert torch.equal(card.rows, wanted.rows)
    for name in ("model", "size", "crop", "native_size", "attributes", "exclusive", "provenance"):
        assert getattr(card, name) == getattr(wanted, name)


def test_reconstructions_and_codes_are_those_of_the_live_model(photos, model):
    y = torch.rand(3, len(ATTRIBUTES)).round()
    x = torch.from_numpy(photos).permute(0, 3, 1, 2) / 127.5 - 1
    net = live(model.card.model)
    with torch.no_grad():
        z = net.encode(x, y).mean
        images = to_uint8(net.decode(z, y))
    torch.testing.assert_close(model.encode(photos, y), z, atol=1e-5, rtol=0)
    assert torch.equal(model.encode(photos, y.numpy()), model.encode(photos, y))
    with pytest.raises(RequestError, match=r"attributes: got rows of shape \[2, "):
        model.encode(photos, y[:2].numpy())
    assert (model.reconstruct(torch.from_numpy(photos), y).int() - images.int()).abs().max() <= 1


def test_networks_of_loss_terms_are_not_exported(tmp_path):
    config = config_of("flow")
    card = card_of(ModelConfig(**{**vars(config), "losses": LossConfig(perceptual=PerceptualConfig(1.0))}))
    _, opened = read(write(tmp_path, live(config), card))
    assert opened.model.losses == LossConfig()


# ---- samples


def test_a_seed_gives_the_same_images_however_they_are_asked_for(model):
    request = {"Male": 1, "Smiling": 0}
    images = model.sample(request, n=BATCH + 6, seed=3)
    assert images.shape == (BATCH + 6, SIZE, SIZE, 3) and images.dtype == torch.uint8
    assert torch.equal(images, model.sample(request, n=BATCH + 6, seed=3))
    rest = model.sample(request, n=6, seed=3, start=BATCH)
    assert (images[BATCH:].int() - rest.int()).abs().max() <= 1
    assert not torch.equal(images, model.sample(request, n=BATCH + 6, seed=4))


def test_without_noise_one_request_gives_one_image(flow):
    request = dict.fromkeys(ATTRIBUTES, 1)
    images = flow.sample(request, n=4, temperature=0.0).int()
    assert (images - images[:1]).abs().max() <= 1
    warm = flow.sample(request, n=4).int()
    assert (warm - warm[:1]).abs().max() > 1


def test_unnamed_attributes_come_from_images_that_carry_the_request(flow):
    rows = flow.requests.complete({"Male": 1, "Smiling": 0})
    stored = {tuple(row) for row in flow.card.rows.tolist()}
    assert {tuple(row) for row in rows.int().tolist()} <= stored
    assert (rows[:, 3] == 1).all() and (rows[:, 4] == 0).all()
    assert rows.mean() > 0.3  # not silently zero


def test_a_combination_that_no_image_carries_is_completed(flow):
    rows = flow.requests.complete({"Male": 1, "Heavy_Makeup": 1, "Bald": 1})
    assert (rows[:, [0, 2, 3]] == 1).all()
    assert (rows[:, 5] == 0).all()  # Young excludes Bald here
    assert rows[:, [1, 4]].any()


def test_the_model_says_where_unnamed_attributes_come_from(flow):
    carried = flow.requests.complete({"Male": 1})
    assert f"come from {len(carried)} of 60 stored training images" in flow.requests.origin({"Male": 1})
    assert "no stored training image carries the request" in flow.requests.origin(
        {"Male": 1, "Heavy_Makeup": 1}
    )
    assert "carry 1 of its 2 attributes" in flow.requests.origin({"Male": 1, "Heavy_Makeup": 1})


def test_labels_are_what_sample_draws(model):
    request = {"Male": 1}
    y = model.labels(request, n=5, seed=3, start=2)
    images = model.sample(request, n=5, seed=3, start=2)
    assert (model.draw(y, seed=3, start=2).int() - images.int()).abs().max() <= 1
    halves = model.draw(y * 0.5 + 0.25, seed=3, start=2)  # between absent and present
    assert not torch.equal(halves, images)
    with pytest.raises(RequestError, match=r"expected \[n, 6\]"):
        model.draw(y[:, :3])


def test_a_model_says_whether_it_can_be_guided(folders):
    guided, plain = cvae.load(folders["flow_matching"]), cvae.load(folders["flow"])
    assert guided.can_be_guided and guided.takes_strength
    assert not plain.can_be_guided and not plain.takes_strength


def test_guidance_acts_on_a_prior_with_a_velocity_alone(folders):
    able, unable = cvae.load(folders["flow_matching"]), cvae.load(folders["flow"])
    plain = able.sample({"Male": 1}, n=4)
    assert not torch.equal(able.sample({"Male": 1}, n=4, guidance=3.0), plain)
    with pytest.raises(RequestError, match="guidance: got 3.0, expected 1.*flow_matching"):
        unable.sample({"Male": 1}, guidance=3.0)


def test_a_model_draws_and_edits_as_it_was_evaluated(folders, photos, tmp_path):
    net, card = read(folders["flow_matching"])
    usual = SamplingConfig(guidance=2.0, strength=3.0)
    model = cvae.load(write(tmp_path, net, replace(card, sampling=usual)))
    plain = cvae.load(folders["flow_matching"])
    assert model.card.sampling == usual and plain.card.sampling == SamplingConfig()
    request = {"Male": 1}
    assert torch.equal(model.sample(request, n=4), plain.sample(request, n=4, guidance=2.0))
    assert torch.equal(model.sample(request, n=4, guidance=1.0), plain.sample(request, n=4))
    assert torch.equal(model.edit(photos, request), plain.edit(photos, request, strength=3.0))
    tree = json.loads((folders["flow_matching"] / "model.json").read_text())
    old = {key: value for key, value in tree.items() if key not in ("sampling", "digest")}
    sealed = {**old, "digest": hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()}
    (tmp_path / "model.json").write_text(json.dumps(sealed))  # an export of an earlier version
    assert cvae.load(tmp_path).card.sampling == SamplingConfig()


# ---- edits


def test_an_edit_without_a_change_is_the_reconstruction(photos, model):
    known = {"Male": 1, "Smiling": 0}
    for request in ({}, {"Male": 1}):
        edited = model.edit(photos, request, known).float() / 255
        expected = model.reconstruct(photos, known).float() / 255
        assert (edited - expected).abs().mean() < 1e-3


def test_an_edit_carries_the_noise_to_the_other_request(photos, model):
    y = torch.zeros(3, len(ATTRIBUTES))
    other = y.clone()
    other[:, 1] = 1
    net = model.net
    x = torch.from_numpy(photos).permute(0, 3, 1, 2) / 127.5 - 1
    noise = net.prior(y).to_noise(net.encode(x, y).mean)
    expected = to_uint8(net.decode(net.prior(other).sample(noise), other))
    edited = model.edit(photos, {"Eyeglasses": 1}, y)
    assert (edited.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(edited, model.reconstruct(photos, y))


def test_a_named_attribute_that_is_unknown_counts_as_the_opposite(photos, flow):
    edited = flow.edit(photos, {"Eyeglasses": 1})
    assert torch.equal(edited, flow.edit(photos, {"Eyeglasses": 1}, {"Eyeglasses": 0}))
    assert not torch.equal(edited, flow.edit(photos, {"Eyeglasses": 1}, {"Eyeglasses": 1}))


def test_an_edit_unsets_what_excludes_the_new_attribute(photos, flow):
    young = {"Young": 1, "Bald": 0}
    both = flow.edit(photos, {"Bald": 1, "Young": 0}, young)
    assert torch.equal(flow.edit(photos, {"Bald": 1}, young), both)


def test_strength_acts_on_a_prior_with_a_velocity_alone(photos, folders):
    able, unable = cvae.load(folders["flow_matching"]), cvae.load(folders["flow"])
    plain = able.edit(photos, {"Male": 1})
    assert not torch.equal(able.edit(photos, {"Male": 1}, strength=2.0), plain)
    with pytest.raises(RequestError, match="strength: got 2.0"):
        unable.edit(photos, {"Male": 1}, strength=2.0)


def test_an_attribute_control_edits_and_makes_samples_obey(photos, folders, tmp_path, monkeypatch):
    config = config_of("flow", control=True)
    net = live(config)
    generator = torch.Generator().manual_seed(3)
    labels = torch.rand(400, len(ATTRIBUTES), generator=generator).round().double()
    codes = labels @ torch.randn(len(ATTRIBUTES), 8, generator=generator).double()
    codes = codes + torch.randn(400, 8, generator=generator).double()
    net.control.fit(CodeMoments(codes.mean(0), labels.mean(0), codes.T @ codes / 400, codes.T @ labels / 400))
    able = cvae.load(write(tmp_path, net, card_of(config)))
    assert able.has_control and able.takes_strength and not able.can_be_guided
    y = torch.zeros(3, len(ATTRIBUTES))
    other = y.clone()
    other[:, 1] = 1
    with torch.no_grad():
        moved = net.control.edit(able.encode(photos, y), y, other, 2.0)
        expected = to_uint8(net.decode(moved, other))
    edited = able.edit(photos, {"Eyeglasses": 1}, y, strength=2.0)
    assert (edited.int() - expected.int()).abs().max() <= 1
    request = {"Male": 1, "Eyeglasses": 0}
    with monkeypatch.context() as patch:
        heard = []
        patch.setattr(able.net.control, "obey", lambda z, asked, margin: heard.append(asked) or z)
        able.sample(request, n=4, margin=2.0)
    (asked,) = heard
    assert [asked[0, ATTRIBUTES.index(name)] for name in request] == [1, 0]
    assert (asked == 0.5).sum() == 4 * (len(ATTRIBUTES) - 2)  # what nobody named is left alone
    assert not torch.equal(able.sample(request, n=4, margin=2.0), able.sample(request, n=4))
    usual = Model(able.net, replace(able.card, sampling=SamplingConfig(margin=2.0)))
    assert torch.equal(usual.sample(request, n=4), able.sample(request, n=4, margin=2.0))
    rows = able.labels(request, n=4)
    assert torch.equal(usual.draw(rows), able.draw(rows))  # rows of numbers name nothing
    with pytest.raises(RequestError, match="margin: got 2.0, expected 0.*refine.prior.control=true"):
        cvae.load(folders["flow"]).sample(request, n=4, margin=2.0)


def test_several_tries_need_a_score_and_begin_with_the_usual_one(model, monkeypatch):
    with pytest.raises(RequestError, match="tries: got 3, expected 1.*refine.prior.anomaly=true"):
        model.sample({"Male": 1}, n=2, tries=3)
    with pytest.raises(RequestError, match="tries: got 0, expected at least 1"):
        model.sample({"Male": 1}, n=2, tries=0)
    usual = model.sample({"Male": 1}, n=2)
    monkeypatch.setattr(model.net, "anomaly", object())
    monkeypatch.setattr(model.net, "anomaly_of", lambda z, y: torch.tensor([-1.0, 1.0])[: len(z)])
    again = model.sample({"Male": 1}, n=2, tries=2)
    assert torch.equal(again[0], usual[0]) and not torch.equal(again[1], usual[1])


def test_an_interpolation_goes_from_one_reconstruction_to_the_other(photos, model):
    images = model.interpolate(photos[:2], photos[1:], steps=5)
    assert images.shape == (2, 5, SIZE, SIZE, 3)
    ends = model.reconstruct(photos)
    assert (images[:, 0].int() - ends[:2].int()).abs().max() <= 1
    assert (images[:, -1].int() - ends[1:].int()).abs().max() <= 1


# ---- mistakes


def test_a_misspelt_attribute_is_refused_with_the_nearest_name(flow, photos):
    with pytest.raises(RequestError, match="attribute 'Eyeglases': is unknown; did you mean 'Eyeglasses'?"):
        flow.sample({"Eyeglases": 1})
    with pytest.raises(RequestError, match="'zzz': is unknown; the model reads Bald, Eyeglasses"):
        flow.edit(photos, {"zzz": 1})
    with pytest.raises(RequestError, match="got 2, expected 1"):
        flow.sample({"Male": 2})


def test_images_of_another_form_are_refused(flow, photos):
    for wrong in (photos[:, :16], photos[0], photos.astype(np.float32), torch.zeros(1, 3, 32, 32), [1]):
        with pytest.raises(RequestError, match=r"images: got .* expected uint8 \[n, 32, 32, 3\]"):
            flow.reconstruct(wrong)


def test_requests_are_read_from_text():
    assert parse_request("Male, Heavy_Makeup,!Smiling,Young=0") == {
        "Male": 1,
        "Heavy_Makeup": 1,
        "Smiling": 0,
        "Young": 0,
    }
    assert parse_request("") == {}
    with pytest.raises(RequestError, match="expected NAME"):
        parse_request("Male=2")
    with pytest.raises(RequestError, match="asks for Smiling and for its opposite"):
        parse_request("Smiling,Male,!Smiling")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_changed_bit_is_refused(folders, tmp_path, name):
    for file in folders["flow"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"{name}: is damaged.*tools/export.py"):
        cvae.load(tmp_path)


def test_a_folder_without_an_export_names_the_command(tmp_path):
    with pytest.raises(ModelFileError, match=f"type: python tools/export.py {tmp_path}"):
        cvae.load(tmp_path)
    with pytest.raises(ModelFileError, match="no such folder"):
        cvae.load(tmp_path / "absent")


CHANGES = {
    "format": (lambda tree: tree.update(format=2), "key 'format': got 2, expected 1"),
    "unknown": (lambda tree: tree["model"].update(zdim=8), "'model.zdim': is unknown; did you mean 'z_dim'"),
    "type": (lambda tree: tree["model"].update(z_dim="8"), "'model.z_dim': got '8', expected int"),
    "list": (lambda tree: tree["model"]["net"].update(channels=[8, "8"]), "'model.net.channels': got"),
    "part": (lambda tree: tree["model"]["prior"].update(name="magic"), "no part is called 'magic'"),
    "shape": (lambda tree: tree["model"].update(z_dim=10**12), "do not fit|builds no model"),
    "missing": (lambda tree: tree.pop("image"), "malformed"),
    "size": (lambda tree: tree["image"].update(size="wide"), "malformed"),
    "infinite size": (lambda tree: tree["image"].update(size=float("inf")), "malformed"),
    "one side": (lambda tree: tree["image"].update(native_size=[1]), "malformed"),
    "names": (lambda tree: tree.update(attributes="Male"), "expected a list of names"),
    "rows": (lambda tree: tree.update(rows="?"), "expected packed label rows"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_wrong_card_is_refused_by_key(folders, tmp_path, case):
    change, message = CHANGES[case]
    with pytest.raises(ModelFileError, match=message):
        cvae.load(rewritten(folders["flow"], tmp_path, change))


def test_an_older_card_gets_the_defaults_of_newer_keys(folders, tmp_path):
    folder = rewritten(folders["flow"], tmp_path, lambda tree: tree["model"].pop("variance"))
    assert cvae.load(folder).card.model.variance == ModelConfig().variance


ALONE = """
import importlib.metadata as metadata, re, sys

def closure(names):
    seen, waiting = set(), list(names)
    while waiting:
        name = re.split(r"[^A-Za-z0-9_.-]", waiting.pop())[0].lower().replace("_", "-")
        if name not in seen:
            seen.add(name)
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            waiting += [need for need in needs if "extra ==" not in need]
    return seen

allowed = closure(["torch", "safetensors"])
owners = metadata.packages_distributions()
refused = {"pipeline", "slurm", "tools", "tests", "launch"}
for package, names in owners.items():
    if not allowed & {name.lower().replace("_", "-") for name in names}:
        refused.add(package)
refused.discard("cvae")
assert "numpy" in refused and "torch" not in refused

class Door:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Door())
import cvae
images = cvae.load(sys.argv[1]).sample({"Male": 1}, n=2)
print(*images.shape, int(images.sum()))
"""


def test_torch_and_safetensors_suffice(folders):
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(folders["flow"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = cvae.load(folders["flow"]).sample({"Male": 1}, n=2)
    assert done.stdout.split() == [str(part) for part in (*expected.shape, int(expected.sum()))]
