"""How numbers, durations, protocols and tables read as plain text."""

from __future__ import annotations

import math
from typing import Any

WIDTH = 120  # characters of a terminal line
GAP = "  "
HEAD = 14  # characters; a longer heading breaks at its underscores and spaces
ARROWS = {"lower": "↓", "higher": "↑"}  # which way is better


def number(value: float | None) -> str:
    """Format with four significant digits, without an exponent if that is readable; "–" for None."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float | None) -> str:
    """Format a share in [0, 1] with two significant digits; "–" for None."""
    if share is None:
        return "–"
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def with_half_width(value: float | None, interval: list[float] | None) -> str:
    """Format a value and half of the width of its 95 % interval."""
    if value is None or interval is None:
        return number(value)
    low, high = interval
    return f"{number(value)} ±{(high - low) / 2:.2g}"


def interval_text(interval: list[float] | None) -> str:
    """Format the ends of an interval; "–" for None."""
    if interval is None:
        return "–"
    low, high = interval
    return f"{number(low)} – {number(high)}"


def duration(seconds: float | None) -> str:
    """Format seconds as "1 h 05 min", "3 min 20 s" or "4.2 s"; "–" for None, "?" for infinity."""
    if seconds is None:
        return "–"
    if math.isinf(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def with_arrow(name: str, direction: str) -> str:
    """Put the arrow of "lower" or "higher" behind a metric's name."""
    return f"{name} {ARROWS.get(direction, '')}".rstrip()


def protocol_line(protocol: dict[str, Any]) -> str:
    """Describe how numbers were measured, in one line."""
    known = {key: protocol.get(key, "?") for key in ("split", "n", "size", "crop", "weights")}
    known["crop"] = known["crop"] or "of the largest square"
    return "{split} split, N = {n}, {size} px (crop {crop}), {weights} weights".format_map(known)


def digest_line(protocol: dict[str, Any]) -> str:
    """List the first characters of the digests in a protocol."""
    digests = []
    for key, value in protocol.items():
        if key.endswith("_digest"):
            digests.append(f"{key.removesuffix('_digest')} {str(value)[:8]}")
    return ", ".join(digests)


def text_table(head: list[str], rows: list[list[str]], width: int = WIDTH) -> str:
    """Align rows under a head, which may take several lines.

    If the columns do not fit into `width`, further blocks follow, and each repeats the first
    column.
    """
    if not rows:
        return ""
    heads = [_break(text) for text in head]
    widths = [_widest([*heads[i], *(row[i] for row in rows)]) for i in range(len(head))]
    blocks: list[list[int]] = [[]]
    for i in range(1, len(head)):
        shown = [0, *blocks[-1], i]
        needed = sum(widths[k] for k in shown) + len(GAP) * (len(shown) - 1)
        if blocks[-1] and needed > width:
            blocks.append([])
        blocks[-1].append(i)
    return "\n\n".join(_block(heads, rows, widths, [0, *block]) for block in blocks)


def _block(heads: list[list[str]], rows: list[list[str]], widths: list[int], chosen: list[int]) -> str:
    height = max(len(heads[i]) for i in chosen)
    lines = []
    for level in range(height):
        # Short headings stand at the bottom.
        cells = []
        for i in chosen:
            above = height - len(heads[i])
            cells.append(heads[i][level - above] if level >= above else "")
        lines.append(cells)
    lines.append(["-" * widths[i] for i in chosen])
    for row in rows:
        lines.append([row[i] for i in chosen])
    return "\n".join(_line(cells, [widths[i] for i in chosen]) for cells in lines)


def _line(cells: list[str], widths: list[int]) -> str:
    """Align the first cell to the left and the others to the right."""
    aligned = [cells[0].ljust(widths[0])]
    for cell, width in zip(cells[1:], widths[1:], strict=True):
        aligned.append(cell.rjust(width))
    return GAP.join(aligned).rstrip()


def _widest(texts: list[str]) -> int:
    return max(len(text) for text in texts)


def _break(text: str) -> list[str]:
    """Break a heading into lines of at most HEAD characters if its words allow it."""
    lines = [""]
    for word in text.replace("_", "_ ").split(" "):
        gap = "" if lines[-1].endswith("_") or not lines[-1] else " "
        joined = lines[-1] + gap + word
        if lines[-1] and len(joined) > HEAD and word not in ARROWS.values():
            lines.append(word)
        else:
            lines[-1] = joined
    return lines
