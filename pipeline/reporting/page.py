"""One self-contained HTML page, without scripts or links.

It escapes everything that comes from files.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pipeline.reporting.faces import Row, webp_file

MOST_COLUMNS = 11  # of a table that fits a screen; a wider one shows each row as a block
STYLE = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")

Cell = str | tuple[str, str]  # text, or (text, CSS classes); text after a line break becomes small print
TableRows = list[tuple[str, list[Cell]]]  # (CSS classes, cells)


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
    """Return a table of rows (CSS classes, cells); "" if there are no rows.

    On a narrow screen each row becomes a block, in which every cell stands behind its heading.
    """
    headings = [cell if isinstance(cell, str) else cell[0] for cell in head]
    lines = []
    for css, cells in rows:
        inner = "".join(_cell("td", cell, name) for cell, name in zip(cells, headings, strict=True))
        lines.append(f"<tr{_class(css)}>{inner}</tr>\n")
    if not lines:
        return ""
    top = "".join(_cell("th", cell) for cell in head)
    wide = ' class="wide"' if len(head) > MOST_COLUMNS else ""
    return f"<table{wide}><thead><tr>{top}</tr></thead><tbody>\n{''.join(lines)}</tbody></table>\n"


def right_aligned(texts: Iterable[str]) -> list[Cell]:
    """Mark cells as numbers, which stand at the right."""
    return [(text, "n") for text in texts]


def facts(items: dict[str, Any]) -> str:
    """Return names and values as a two-column table."""
    return table(["", ""], [("", [key, (str(value), "mono")]) for key, value in items.items()])


def picture(file: Path, caption: str = "") -> str:
    """Return a whole picture, compressed; small images keep their pixels sharp."""
    content, _ = webp_file(file)
    return _figure("image/webp", content, caption or file.stem.replace("_", " "), "pixels")


def faces(row: Row, name: str, note: str = "") -> str:
    """Return a row of faces under its label and a note, each at least 128 pixels wide; the row wraps."""
    images = []
    size = f' width="{row.width}" height="{row.height}"'
    for number, content in enumerate(row.faces, 1):
        words = f"{row.label or name}, {number}"
        images.append(_image("image/webp", content, words, size))
    small = f' <span class="soft">{escape(note)}</span>' if note else ""
    label = f"<h4>{escape(row.label)}{small}</h4>" if row.label else ""
    return f'{label}<div class="faces">{"".join(images)}</div>\n'


def drawing(svg: bytes, caption: str) -> str:
    """Return an SVG drawing, embedded as an image so that nothing in it can act on the page."""
    return _figure("image/svg+xml", svg, caption, "")


def gallery(figures: Iterable[str]) -> str:
    """Return figures side by side, as many as fit."""
    inner = "".join(figures)
    return f'<div class="grid">{inner}</div>\n' if inner else ""


def folded(summary: str, *parts: str) -> str:
    """Return ready HTML that opens on a click; "" if there is nothing in it."""
    inner = "".join(parts)
    return f"<details><summary>{escape(summary)}</summary>\n{inner}</details>\n" if inner else ""


def preformatted(text: str) -> str:
    """Return text that keeps its line breaks."""
    return f"<pre>{escape(text)}</pre>"


def card(title: str, value: str, track: str, small: str) -> str:
    """Return the inside of a card: a name, a large value, a ready bar, and small print."""
    top = f'<h3>{escape(title)}</h3><div class="value">{escape(value)}</div>'
    return f'{top}{track}<div class="soft">{escape(small)}</div>'


def cards(parts: Iterable[str]) -> str:
    """Return cards side by side, as many as fit."""
    inner = "".join(f'<div class="card">{part}</div>\n' for part in parts)
    return f'<div class="cards">{inner}</div>\n' if inner else ""


def bar(filled: float, ends: tuple[float, float] | None, left: str, right: str) -> str:
    """Return a bar that is filled to a share in [0, 1], its interval, and what both ends stand for."""
    inner = f'<span class="fill" style="width:{100 * filled:.1f}%"></span>'
    if ends:
        low, high = sorted(ends)
        place = f"left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"
        inner += f'<span class="whisker" style="{place}"></span>'
    words = f"<span>{escape(left)}</span><span>{escape(right)}</span>"
    return f'<div class="track">{inner}</div><div class="ends">{words}</div>'


def bullets(lines: Iterable[str]) -> str:
    """Return lines of plain text as a list."""
    inner = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{inner}</ul>\n" if inner else ""


def statement(question: str, answer: str, text: str, mood: str) -> str:
    """Return a question, a short answer, and the sentence that explains it; `mood`: good, fair or poor."""
    tag = f'<b class="{escape(mood)}">{escape(answer)}</b>'
    return f"<dt>{escape(question)}</dt><dd>{tag} {escape(text)}</dd>\n"


def statements(parts: Iterable[str]) -> str:
    """Return statements as a list."""
    return f'<dl class="verdict">{"".join(parts)}</dl>\n'


def _figure(kind: str, content: bytes, caption: str, css: str) -> str:
    image = _image(kind, content, caption)
    return f"<figure{_class(css)}>{image}<figcaption>{escape(caption)}</figcaption></figure>\n"


def _image(kind: str, content: bytes, words: str, more: str = "") -> str:
    """An embedded image that the browser decodes when it comes into view."""
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img src="{source}" alt="{escape(words)}" loading="lazy" decoding="async"{more}>'


def _class(css: str) -> str:
    return f' class="{escape(css)}"' if css else ""


def _cell(tag: str, cell: Cell, heading: str = "") -> str:
    text, css = (cell, "") if isinstance(cell, str) else cell
    first, _, second = text.partition("\n")
    below = f'<br><span class="soft">{escape(second)}</span>' if second else ""
    label = f' data-label="{escape(heading)}"' if heading else ""
    return f"<{tag}{_class(css)}{label}>{escape(first)}{below}</{tag}>"
