"""One self-contained HTML page, without scripts or links.

It escapes everything that comes from files.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --ground: #f8fafc; --accent: #2563eb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 1rem; letter-spacing: -.01em; }
h3 { font-size: .95rem; margin: 1.4rem 0 .5rem; }
p { margin: .3rem 0 .8rem; max-width: 75ch; }
.soft { color: var(--soft); font-size: .875rem; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: .9rem 0 1.8rem; }
.chip { background: #fff; border: 1px solid var(--line); border-radius: 999px; padding: .1rem .7rem;
        font-size: .85rem; }
.chip b { font-weight: 600; }
section { background: #fff; border: 1px solid var(--line); border-radius: 14px; padding: 1.4rem 1.5rem;
          margin: 1.2rem 0; box-shadow: 0 1px 2px rgb(15 23 42 / 4%); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: .78rem; vertical-align: bottom; }
th, td { padding: .42rem .9rem .42rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.best { font-weight: 700; color: var(--accent); }
td.off, tr.off td { color: #94a3b8; }
tr.reference td { color: var(--soft); background: var(--ground); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; border-radius: 6px; }
figure.pixels img { image-rendering: pixelated; width: auto; max-width: 100%; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .35rem; overflow-wrap: anywhere; }
details summary { cursor: pointer; font-weight: 600; }
pre { background: var(--ground); border: 1px solid var(--line); border-radius: 8px; padding: 1rem;
      overflow-x: auto; font-size: .8rem; line-height: 1.45; }
code, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .85em;
              overflow-wrap: anywhere; }
@media print { section { break-inside: avoid; box-shadow: none; } body { background: #fff; } }
"""

Cell = str | tuple[str, str]  # text, or (text, CSS classes); text after a line break becomes small print


def page(title: str, body: Iterable[str]) -> str:
    """Return the whole document around ready HTML parts."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    main = "".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{main}</main></body></html>\n'
    )


def heading(title: str, items: dict[str, Any]) -> str:
    """Return the title of a page with short facts under it."""
    chips = []
    for key, value in items.items():
        chips.append(f'<span class="chip">{escape(key)} <b>{escape(str(value))}</b></span>')
    return f'<h1>{escape(title)}</h1>\n<div class="chips">{"".join(chips)}</div>\n'


def section(title: str, *parts: str) -> str:
    """Return a card with a heading around ready HTML; "" if there is nothing in it."""
    if not any(parts):
        return ""
    return f"<section><h2>{escape(title)}</h2>\n{''.join(parts)}</section>\n"


def subheading(text: str) -> str:
    """Return a heading within a card."""
    return f"<h3>{escape(text)}</h3>\n"


def paragraph(text: str, soft: bool = False) -> str:
    """Return plain text as a paragraph."""
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>\n"


def table(head: Sequence[Cell], rows: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    """Return a table of rows (CSS classes, cells); "" if there are no rows."""
    lines = []
    for css, cells in rows:
        inner = "".join(_cell("td", cell) for cell in cells)
        lines.append(f"<tr{_class(css)}>{inner}</tr>\n")
    if not lines:
        return ""
    top = "".join(_cell("th", cell) for cell in head)
    inner = f"<thead><tr>{top}</tr></thead><tbody>\n{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>\n'


def right_aligned(texts: Iterable[str]) -> list[Cell]:
    """Mark cells as numbers, which stand at the right."""
    return [(text, "n") for text in texts]


def facts(items: dict[str, Any]) -> str:
    """Return names and values as a two-column table."""
    return table(["", ""], [("", [key, (str(value), "mono")]) for key, value in items.items()])


def picture(file: Path, caption: str = "") -> str:
    """Return an embedded PNG file; small images keep their pixels sharp."""
    return _figure("image/png", file.read_bytes(), caption or file.stem.replace("_", " "), "pixels")


def drawing(svg: bytes, caption: str) -> str:
    """Return an SVG drawing, embedded as an image so that nothing in it can act on the page."""
    return _figure("image/svg+xml", svg, caption, "")


def gallery(figures: Iterable[str]) -> str:
    """Return figures side by side, as many as fit."""
    inner = "".join(figures)
    return f'<div class="grid">{inner}</div>\n' if inner else ""


def details(summary: str, text: str) -> str:
    """Return preformatted text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>\n"


def _figure(kind: str, content: bytes, caption: str, css: str) -> str:
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    words = escape(caption)
    image = f'<img src="{source}" alt="{words}">'
    return f"<figure{_class(css)}>{image}<figcaption>{words}</figcaption></figure>\n"


def _class(css: str) -> str:
    return f' class="{escape(css)}"' if css else ""


def _cell(tag: str, cell: Cell) -> str:
    text, css = (cell, "") if isinstance(cell, str) else cell
    first, _, second = text.partition("\n")
    below = f'<br><span class="soft">{escape(second)}</span>' if second else ""
    return f"<{tag}{_class(css)}>{escape(first)}{below}</{tag}>"
