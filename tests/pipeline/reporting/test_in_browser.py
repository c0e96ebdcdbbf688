"""The report and the comparison in a real browser: on a screen and on a telephone, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.reporting.comparison import compare
from pipeline.reporting.report import write_report
from tests.browser import WIDTHS, OpenPage, assert_fits
from tests.fake_run import make_run

MOST_BYTES = 3_000_000
SMALLEST_FACE = 128  # pixels of the screen
DECODE = """async () => {
  const images = [...document.images];
  for (const image of images) image.loading = 'eager';
  await Promise.all(images.map(image => image.decode()));
  return images.map(image => image.naturalWidth);
}"""
UNFOLD = "document.querySelectorAll('details').forEach(part => part.open = true)"
FACES = "[...document.querySelectorAll('.faces img')].map(face => face.getBoundingClientRect().width)"
COLOURS = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]
  .map(text => text.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report, and a comparison of many variants with long names."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = ("model.prior.name=standard",)
    runs = [make_run(folder, "sigma_cvae_with_a_rather_long_name", overrides, steps=20, evals=1, fd=30.0)]
    for number in range(5):
        runs.append(make_run(folder, f"variant_{number}", steps=20, evals=2, fd=21.5 + number))
    compare(runs, folder / "comparison.html")
    return {"report": write_report(runs[1]), "comparison": folder / "comparison.html"}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "name, words",
    [
        (
            "report",
            ["Verdict", "Is it sharp?", "21.5 ±0.5", "distance to real images", "Curves", "All numbers"],
        ),
        ("comparison", ["Which is better?", "30 ±0.5", "model.prior.name", "The same noise", "variant_4"]),
    ],
)
def test_a_page_fits_shows_its_numbers_and_decodes_its_pictures(
    pages: dict[str, Path], open_page: OpenPage, name: str, words: list[str], width: int
) -> None:
    page: Any = open_page(pages[name].as_uri(), width)
    assert pages[name].stat().st_size < MOST_BYTES
    assert_fits(page)
    shown = page.inner_text("body")
    for word in words:
        assert word in shown, word
    page.evaluate(UNFOLD)
    assert_fits(page)
    assert min(page.evaluate(DECODE)) > 0
    assert min(page.evaluate(FACES)) >= SMALLEST_FACE


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_follows_the_theme(pages: dict[str, Path], open_page: OpenPage, dark: bool) -> None:
    page: Any = open_page(pages["report"].as_uri(), dark=dark)
    ground, ink = page.evaluate(COLOURS)
    assert (ground < ink) == dark and abs(ground - ink) > 300  # of three channels
