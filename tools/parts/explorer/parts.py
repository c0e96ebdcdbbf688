"""What the tabs of the explorer share: controls, cards with faces, and work that never blocks the page."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import numpy as np
from nicegui import run, ui
from PIL import Image
from torch import Tensor

from cvae.use import Model

MAX_SEED = 10**6
GUIDANCE = "Guidance: how closely the prior follows the attributes"


class Latest:
    """Call a slow function after a change. Changes that come meanwhile cause one more call, not many."""

    def __init__(self, function: Callable[[], Awaitable[None]]) -> None:
        self.function = function
        self.waiting = False
        self.busy = False

    async def __call__(self) -> None:
        """Ask for a call with the newest values."""
        self.waiting = True
        if self.busy:
            return
        self.busy = True
        try:
            while self.waiting:
                self.waiting = False
                await self.function()
        finally:
            self.busy = False


async def drawn(function: Callable[..., Tensor], *arguments: Any, **settings: Any) -> list[np.ndarray]:
    """Call a function of a model in a thread and return its images; none if the server is ending."""
    images = await run.io_bound(function, *arguments, **settings)
    return [] if images is None else list(images.numpy())


def all_attributes(models: Iterable[Model]) -> list[str]:
    """Return the names that any of the models reads, in order."""
    names: dict[str, None] = {}
    for model in models:
        names |= dict.fromkeys(model.attributes)
    return list(names)


def readable(name: str) -> str:
    """Return an attribute's name as people write it."""
    return name.replace("_", " ")


def known_to(model: Model, request: dict[str, int]) -> dict[str, int]:
    """Return the part of a request that a model reads."""
    return {name: value for name, value in request.items() if name in model.attributes}


def figures(images: Sequence[np.ndarray], captions: Sequence[str] = ()) -> str:
    """Return HTML of images, uint8 [S, S, 3] each; the browser enlarges them without smoothing."""
    parts = []
    for i, image in enumerate(images):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        encoded = base64.b64encode(content.getvalue()).decode()
        caption = f"<figcaption>{captions[i]}</figcaption>" if captions else ""
        words = captions[i] if captions else f"face {i + 1}"
        parts.append(f'<figure><img src="data:image/png;base64,{encoded}" alt="{words}">{caption}</figure>')
    return f'<div class="faces">{"".join(parts)}</div>'


class Card:
    """The card of one model: its name, its faces, and a line that explains them."""

    def __init__(self, name: str, model: Model) -> None:
        self.model = model
        with ui.element("section").classes("panel w-full"):
            ui.label(name).classes("title")
            self.note = ui.label().classes("soft")
            self.faces = ui.html("", sanitize=False).classes("w-full q-mt-sm")

    def show(self, images: Sequence[np.ndarray], note: str, captions: Sequence[str] = ()) -> None:
        """Replace the faces and the line."""
        self.faces.set_content(figures(images, captions))
        self.note.set_text(note)


class Noise:
    """The controls of the noise, which all models share."""

    def __init__(self, models: Iterable[Model], changed: Latest) -> None:
        with ui.element("div").classes("line"):
            self.seed = ui.number("Noise seed", value=0, min=0, max=MAX_SEED, precision=0, on_change=changed)
            self.seed.classes("col").props("dense outlined")
            ui.button("New noise", icon="casino", on_click=self._renew).props("unelevated no-caps")
        self.temperature = slider("Temperature", 0.0, 1.5, 1.0, changed, "Scale of the noise; below 1: tamer")
        self.guidance: ui.slider | None = None
        guided = [model.card.sampling.guidance for model in models if model.can_be_guided]
        if guided:
            self.guidance = slider("Guidance", 1.0, 4.0, guided[0], changed, GUIDANCE)

    def _renew(self) -> None:
        self.seed.set_value(random.randrange(MAX_SEED))

    def settings(self, model: Model) -> dict[str, Any]:
        """Return the arguments of `sample` and `draw`; a model without guidance is not guided."""
        found: dict[str, Any] = {"seed": int(self.seed.value or 0), "temperature": self.temperature.value}
        if self.guidance is not None and model.can_be_guided:
            found["guidance"] = self.guidance.value
        return found


def slider(
    name: str, least: float, most: float, value: float, changed: Latest, meaning: str = ""
) -> ui.slider:
    """Draw a line with a name, a slider, and its value."""
    with ui.element("div").classes("line"):
        label = ui.label(name).classes("name")
        if meaning:
            label.tooltip(meaning)
        made = ui.slider(min=least, max=most, step=0.05, value=value, on_change=changed)
        made.props(f'aria-label="{name}"')
        ui.label().classes("figure").bind_text_from(made, "value", lambda x: f"{x:.2f}")
    return made
