"""The explorer in a real browser: what it shows is what the models draw, and it asks no other machine."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import cvae
from cvae.use import Model
from pipeline.runtime.ports import free_port
from tests.browser import WIDTHS, assert_fits
from tests.conftest import ROOT
from tests.cvae.test_use import card_of, config_of, live, write
from tests.tiny_run import ATTRIBUTES, SIZE
from tools import explore
from tools.parts.photo import Eyes, fit

FACES = 8  # that the page draws for each model at first


class Explorer(NamedTuple):
    address: str
    models: dict[str, Model]


@pytest.fixture(scope="module")
def explorer(tmp_path_factory) -> Iterator[Explorer]:
    """The explorer with two models: one with a coupling flow, one that can be guided."""
    folder = tmp_path_factory.mktemp("explored")
    for name, prior in (("plain", "flow"), ("guided", "flow_matching")):
        config = config_of(prior)
        write(folder / name, live(config), card_of(config))
    port = free_port()
    command = [sys.executable, "tools/explore.py", str(folder / "plain"), str(folder / "guided")]
    # NiceGUI behaves differently where it sees that pytest runs.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command += ["--port", str(port)]
    with open(folder / "errors", "w") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        told = process.stdout.readline()  # the tool prints its address as soon as it answers
        assert f"open http://localhost:{port}" in told, (folder / "errors").read_text()
        models = {name: cvae.load(folder / name) for name in ("plain", "guided")}
        yield Explorer(f"http://127.0.0.1:{port}/", models)
        process.send_signal(signal.SIGINT)
        process.wait(120)
        assert "Traceback" not in (folder / "errors").read_text()
    finally:
        process.kill()
        process.communicate()


def sources(page, at_least: int) -> list[str]:
    """The addresses of the faces, as soon as there are so many of them."""
    page.wait_for_function(f"document.querySelectorAll('.faces img').length >= {at_least}")
    return page.evaluate("[...document.querySelectorAll('.faces img')].map(image => image.src)")


def changed(page, before: list[str]) -> list[str]:
    """The addresses of the faces once the first and the last have changed."""
    script = "old => { const now = [...document.querySelectorAll('.faces img')].map(image => image.src);"
    script += " return now.length && now[0] !== old[0] && now.at(-1) !== old.at(-1); }"
    page.wait_for_function(script, arg=before)
    return sources(page, 1)


def pixels(found: list[str]) -> torch.Tensor:
    images = []
    for source in found:
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        images.append(np.array(Image.open(io.BytesIO(content), formats=["PNG"])))
    return torch.from_numpy(np.stack(images)).int()


def assert_same(found: list[str], *expected: torch.Tensor) -> None:
    assert (pixels(found) - torch.cat(expected).int()).abs().max() <= 1


def press(page, attribute: str, word: str) -> None:
    page.locator(f'[aria-label="{attribute}"]').get_by_text(word, exact=True).click()


@pytest.mark.parametrize("width", WIDTHS)
def test_switches_and_noise_act_on_all_models(explorer, open_page, width):
    page = open_page(explorer.address, width, dark=width == WIDTHS[1])
    first = sources(page, 2 * FACES)
    assert_same(first, *(model.sample({}, n=FACES) for model in explorer.models.values()))
    assert_fits(page)
    assert page.evaluate("document.querySelector('.faces img').clientWidth") >= 128
    press(page, "Male", "yes")
    male = changed(page, first)
    assert_same(male, *(model.sample({"Male": 1}, n=FACES) for model in explorer.models.values()))
    assert "which carry the request" in page.inner_text(".results")
    page.get_by_label("Noise seed").fill("5")
    page.get_by_label("Noise seed").press("Tab")
    again = changed(page, male)
    assert_same(again, *(model.sample({"Male": 1}, n=FACES, seed=5) for model in explorer.models.values()))
    assert page.locator("[aria-label='Guidance']").count() == 1  # one of the two can be guided


def test_a_slider_for_each_attribute_changes_one_face(explorer, open_page):
    page = open_page(explorer.address, WIDTHS[1])
    sources(page, 2 * FACES)
    page.get_by_role("tab", name="One face").click()
    page.wait_for_function("document.querySelectorAll('.faces img').length == 2")
    before = sources(page, 2)
    values = [page.get_by_label(name, exact=True) for name in (name.replace("_", " ") for name in ATTRIBUTES)]
    y = torch.tensor([[float(value.get_attribute("aria-valuenow")) for value in values]])
    assert_same(before, *(model.draw(y) for model in explorer.models.values()))
    page_key = "PageDown" if y[0, 4] else "PageUp"  # ten steps
    values[4].locator("[tabindex='0']").press(page_key)
    y[0, 4] = 0.5
    assert_same(changed(page, before), *(model.draw(y) for model in explorer.models.values()))
    assert_fits(page)


def test_a_photo_is_uploaded_aligned_and_edited(explorer, open_page, tmp_path):
    rng = np.random.default_rng(0)
    photo = np.kron(rng.integers(0, 256, (30, 40, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    page = open_page(explorer.address)
    page.get_by_role("tab", name="Edit a photo").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "photo.png")
    plain = sources(page, 8)
    cards = [model.card for model in explorer.models.values()]
    assert_same([plain[0], plain[4]], *(torch.from_numpy(fit(photo, card)) for card in cards))
    picture = page.locator(".photo img").first
    box = picture.bounding_box()
    scale = box["width"] / 400
    for x, y in ((240, 140), (150, 130)):  # the right eye first
        page.mouse.click(box["x"] + x * scale, box["y"] + y * scale)
    aligned = changed(page, plain[:1] * 2)
    expected = torch.from_numpy(fit(photo, cards[0], eyes=Eyes(150, 130, 240, 140))).int()
    assert (pixels(aligned[:1]) - expected).abs().float().mean() < 6  # a click is a pixel or two off
    page.get_by_label("Add").click()
    page.get_by_role("option", name="Eyeglasses").click()
    page.wait_for_function("old => document.querySelectorAll('.faces img')[2].src != old", arg=aligned[2])
    assert pixels(sources(page, 8)).shape == (8, SIZE, SIZE, 3)
    assert_fits(page)


def test_a_file_that_is_no_photo_is_refused_in_words(explorer, open_page, tmp_path):
    (tmp_path / "note.png").write_text("no photo")
    page = open_page(explorer.address)
    page.get_by_role("tab", name="Edit a photo").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "note.png")
    page.get_by_text("note.png is not a JPEG, PNG or WebP file").wait_for()


def test_the_server_answers_only_to_its_own_names(explorer):
    request = urllib.request.Request(explorer.address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 400
    port = int(explorer.address.rsplit(":")[-1].strip("/"))
    listening = Path("/proc/net/tcp").read_text().splitlines()
    hosts = {line.split()[1].split(":")[0] for line in listening if f":{port:04X} 00000000:" in line}
    assert hosts == {"0100007F"}  # 127.0.0.1 alone


def test_two_runs_of_one_name_are_told_apart(tmp_path):
    config = config_of("flow")
    for place in ("a", "b"):
        write(tmp_path / place / "run", live(config), card_of(config))
    found = explore.open_models([tmp_path / "a/run", tmp_path / "b/run"], "cpu")
    assert list(found) == ["a/run", "b/run"]
