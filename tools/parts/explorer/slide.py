"""The tab with one face and a slider for every attribute."""

from __future__ import annotations

import torch
from nicegui import ui
from torch import Tensor

from cvae.use import Model
from tools.parts.explorer.parts import Card, Latest, Noise, all_attributes, drawn, readable, slider

NOTE = "From 0 (without) to 1 (with). The model was trained with 0 and 1; between them it interpolates."


def slide_tab(models: dict[str, Model]) -> None:
    """Draw the tab."""
    sliders: dict[str, ui.slider] = {}
    names = all_attributes(models.values())
    start = _typical(models)
    cards: list[Card] = []

    async def draw() -> None:
        for card in cards:
            y = torch.tensor([[float(sliders[name].value) for name in card.model.attributes]])
            card.show(await drawn(card.model.draw, y, **noise.settings(card.model)), "")

    changed = Latest(draw)
    with ui.element("div").classes("halves large follow"):
        with ui.element("section").classes("panel controls"):
            noise = Noise(models.values(), changed)
            with ui.element("div").classes("line"):
                ui.label(NOTE).classes("soft name").style("white-space: normal")
                ui.button("Reset", on_click=lambda: _set(sliders, start)).props("flat no-caps")
            with ui.element("div").classes("rows"):
                for name in names:
                    sliders[name] = slider(readable(name), 0.0, 1.0, start[name], changed)
        with ui.element("div").classes("results"):
            cards += [Card(name, model) for name, model in models.items()]
    ui.timer(0.01, changed, once=True)


def _typical(models: dict[str, Model]) -> dict[str, float]:
    """Return the attributes of a training image that is like most others: the one nearest to the mean."""
    found: dict[str, float] = {}
    for model in models.values():
        rows: Tensor = model.card.rows.float()
        nearest = (rows - rows.mean(0)).square().sum(1).argmin()
        for name, value in zip(model.attributes, rows[nearest].tolist(), strict=True):
            found.setdefault(name, value)
    return found


def _set(sliders: dict[str, ui.slider], values: dict[str, float]) -> None:
    for name, value in values.items():
        sliders[name].set_value(value)
