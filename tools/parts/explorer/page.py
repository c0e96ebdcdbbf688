"""The page of the explorer: its frame and its server."""

from __future__ import annotations

from pathlib import Path

from nicegui import app, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cvae.use import Model
from tools.parts.explorer.draw import draw_tab
from tools.parts.explorer.photo import photo_tab
from tools.parts.explorer.slide import slide_tab

STYLE = Path(__file__).with_name("style.css")
TABS = {
    "Draw": ("grid_view", draw_tab),
    "One face": ("tune", slide_tab),
    "Edit a photo": ("photo_camera", photo_tab),
}
LOOPBACK = "127.0.0.1"
PATIENCE_S = 60.0  # a busy machine answers late; NiceGUI's 3 seconds would load the page again and again


def serve(models: dict[str, Model], port: int) -> None:
    """Serve the page to this machine until Ctrl-C."""
    # Without this check a web page elsewhere could reach the server under a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])

    app.on_startup(
        lambda: print(f"open http://localhost:{port} in a browser; Ctrl-C ends the explorer", flush=True)
    )

    @ui.page("/", title="Faces", dark=None)
    def page() -> None:
        _page(models)

    ui.run(
        host=LOOPBACK,
        port=port,
        show=False,
        reload=False,
        show_welcome_message=False,
        favicon="🙂",
        reconnect_timeout=PATIENCE_S,
    )


def _page(models: dict[str, Model]) -> None:
    ui.add_css(STYLE.read_text())
    with ui.header().classes("items-center q-px-md q-py-none"):
        ui.label("Faces").classes("text-h6 q-mr-md")
        with ui.tabs().props("no-caps inline-label dense") as tabs:
            made = {name: ui.tab(name, icon=icon) for name, (icon, _) in TABS.items()}
        ui.space()
        ui.label(", ".join(models)).classes("subtitle ellipsis")
    with ui.tab_panels(tabs, value="Draw", animated=False).classes("w-full bg-transparent"):
        for name, (_, tab) in TABS.items():
            with ui.tab_panel(made[name]).classes("q-pa-none"), ui.element("div").classes("frame"):
                tab(models)
