"""The tab that draws many faces, with a switch for every attribute."""

from __future__ import annotations

from nicegui import ui

from cvae.use import Model
from tools.parts.explorer.parts import Card, Latest, Noise, all_attributes, drawn, known_to, readable

COUNTS = (4, 8, 16, 32)
STATES = {0: "no", -1: "any", 1: "yes"}  # of a switch


def draw_tab(models: dict[str, Model]) -> None:
    """Draw the tab."""
    switches: dict[str, ui.toggle] = {}
    cards: list[Card] = []

    async def draw() -> None:
        request = {name: switch.value for name, switch in switches.items() if switch.value != -1}
        for card in cards:
            own = known_to(card.model, request)
            settings = noise.settings(card.model)
            images = await drawn(card.model.sample, own, int(count.value), **settings)
            note = card.model.requests.origin(own)
            unread = sorted(set(request) - set(own))
            if unread:
                note += f"; this model does not read {', '.join(map(readable, unread))}"
            card.show(images, f"{note[0].upper()}{note[1:]}.")

    changed = Latest(draw)
    with ui.element("div").classes("halves follow"):
        with ui.element("section").classes("panel controls"):
            noise = Noise(models.values(), changed)
            with ui.element("div").classes("line"):
                ui.label("Faces of each model").classes("name")
                count = ui.toggle(list(COUNTS), value=8, on_change=changed).props("dense no-caps unelevated")
            _switches(switches, all_attributes(models.values()), changed)
        with ui.element("div").classes("results"):
            ui.label("Faces in the same place have the same noise in every model.").classes("soft")
            cards += [Card(name, model) for name, model in models.items()]
    ui.timer(0.01, changed, once=True)


def _switches(switches: dict[str, ui.toggle], names: list[str], changed: Latest) -> None:
    """Draw a line with a switch for each attribute, a filter, and a button that resets all."""
    lines: dict[str, ui.element] = {}

    def show_matching() -> None:
        wanted = (search.value or "").lower().replace(" ", "_")
        for name, line in lines.items():
            line.set_visibility(wanted in name.lower())

    def reset() -> None:
        for switch in switches.values():
            switch.set_value(-1)

    with ui.element("div").classes("line q-mt-sm"):
        search = ui.input(placeholder="Find an attribute", on_change=show_matching)
        search.classes("col").props("dense outlined clearable")
        ui.button("Reset", on_click=reset).props("flat no-caps")
    with ui.element("div").classes("rows q-mt-sm"):
        for name in names:
            with ui.element("div").classes("line") as line:
                ui.label(readable(name)).classes("name")
                switch = ui.toggle(STATES, value=-1, on_change=changed)
                switches[name] = switch.props(f'dense no-caps unelevated size=sm aria-label="{name}"')
            lines[name] = line
