"""The tab that edits a photo: upload it, click its eyes, and choose what changes."""

from __future__ import annotations

import numpy as np
from nicegui import events, run, ui
from PIL import Image

from cvae.request import RequestError
from cvae.use import Model
from pipeline.data.sources.base import ImageError
from pipeline.data.sources.decode import decode
from tools.parts.explorer.parts import Card, Latest, all_attributes, known_to, readable, slider
from tools.parts.photo import Eyes, fit

MAX_BYTES = 30_000_000
CAPTIONS = ("photo", "before", "after", "difference")
HINT = (
    "Click the middle of both eyes: the photo is then aligned as the training images are. Without them, its"
    " centre is cut out."
)


class PhotoTab:
    """The state of the tab in one browser."""

    def __init__(self, models: dict[str, Model]) -> None:
        self.photo: np.ndarray | None = None
        self.eyes: list[tuple[float, float]] = []
        self.changed = Latest(self.edit)
        names = {name: readable(name) for name in all_attributes(models.values())}
        with ui.element("div").classes("halves"):
            with ui.element("section").classes("panel controls"):
                self._controls(models, names)
            with ui.element("div").classes("results"):
                with ui.element("section").classes("panel w-full") as self.place:
                    ui.label(HINT).classes("soft q-mb-sm")
                    self.image = ui.interactive_image(on_mouse=self.click, events=["click"], cross=True)
                    self.image.classes("photo")
                    self.clear = ui.button("Forget the eyes", on_click=self.forget).props("flat no-caps")
                self.place.set_visibility(False)
                self.cards = [Card(name, model) for name, model in models.items()]
                for card in self.cards:
                    card.show([], "Upload a photo of one face.")

    def _controls(self, models: dict[str, Model], names: dict[str, str]) -> None:
        upload = ui.upload(label="A photo, JPEG or PNG", auto_upload=True, max_file_size=MAX_BYTES)
        upload.props('accept=".jpg,.jpeg,.png" flat bordered').classes("w-full")
        upload.on_upload(self.receive)
        upload.on_rejected(lambda: ui.notify("Give one JPEG or PNG file of at most 30 MB", type="warning"))
        ui.label("Change").classes("title q-mt-md")
        self.add = _choice("Add", names, self.changed)
        self.remove = _choice("Remove", names, self.changed)
        self.strength: ui.slider | None = None
        usual = [model.card.sampling.strength for model in models.values() if model.takes_strength]
        if usual:
            self.strength = slider("Strength", 1.0, 4.0, usual[0], self.changed, "Above 1: a stronger change")
        ui.label("What the photo shows").classes("title q-mt-md")
        ui.label("The more you say, the better the edit keeps it.").classes("soft")
        self.shows = _choice("It shows", names, self.changed)
        self.lacks = _choice("It does not show", names, self.changed)

    async def receive(self, event: events.UploadEventArguments) -> None:
        """Take a new photo."""
        try:
            self.photo = decode(await event.file.read())
        except ImageError as error:
            ui.notify(f"{event.file.name} {error}", type="negative")
            return
        self.eyes = []
        self.image.set_source(Image.fromarray(self.photo))
        self.place.set_visibility(True)
        self._mark()
        await self.changed()

    async def click(self, event: events.MouseEventArguments) -> None:
        """Take the middle of an eye; a third click begins again."""
        if len(self.eyes) == 2:
            self.eyes = []
        self.eyes.append((event.image_x, event.image_y))
        self._mark()
        if len(self.eyes) == 2:
            await self.changed()

    async def forget(self) -> None:
        """Cut out the centre again."""
        self.eyes = []
        self._mark()
        await self.changed()

    def _mark(self) -> None:
        assert self.photo is not None
        radius = max(3, max(self.photo.shape) // 80)
        ring = f'r="{radius}" fill="none" stroke="#0bf" stroke-width="{radius / 3}"'
        self.image.content = "".join(f'<circle cx="{x}" cy="{y}" {ring} />' for x, y in self.eyes)
        self.clear.set_visibility(bool(self.eyes))

    async def edit(self) -> None:
        """Edit the photo with every model."""
        if self.photo is None:
            return
        for card in self.cards:
            try:
                images = await run.io_bound(self._edited, card.model)
                card.show(images or [], "", CAPTIONS)
            except (ImageError, RequestError) as error:
                card.show([], f"The photo {error}." if isinstance(error, ImageError) else f"{error}.")

    def _edited(self, model: Model) -> list[np.ndarray]:
        """Return the photo, its reconstruction, the edited image, and their difference."""
        assert self.photo is not None
        eyes = None
        if len(self.eyes) == 2:
            (x1, y1), (x2, y2) = sorted(self.eyes)
            eyes = Eyes(x1, y1, x2, y2)
        photo = fit(self.photo, model.card, eyes=eyes)
        request = known_to(model, _request(self.add, self.remove))
        opposites = {name: 1 - value for name, value in request.items()}
        known = opposites | known_to(model, _request(self.shows, self.lacks))
        strength = 1.0
        if self.strength is not None and model.takes_strength:
            strength = self.strength.value
        before = model.edit(photo, {}, known).numpy()[0]
        after = model.edit(photo, request, known, strength).numpy()[0]
        difference = np.abs(after.astype(np.int16) - before).astype(np.uint8)
        return [photo[0], before, after, difference]


def _choice(label: str, names: dict[str, str], changed: Latest) -> ui.select:
    made = ui.select(names, multiple=True, label=label, with_input=True, on_change=changed)
    return made.classes("w-full").props("use-chips dense outlined")


def _request(present: ui.select, absent: ui.select) -> dict[str, int]:
    return dict.fromkeys(absent.value, 0) | dict.fromkeys(present.value, 1)


def photo_tab(models: dict[str, Model]) -> None:
    """Draw the tab."""
    PhotoTab(models)
