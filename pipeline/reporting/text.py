"""Tables of plain text that fit a terminal."""

from __future__ import annotations

WIDTH = 120  # columns
GAP = "  "
HEAD = 14  # a longer heading is broken at its underscores and spaces


def columns(head: list[str], rows: list[list[str]], width: int = WIDTH) -> str:
    """Rows under a head that may take several lines; too many columns go into further blocks that repeat the first one."""
    if not rows:
        return ""
    heads = [_break(text) for text in head]
    widths = [max(map(len, [*heads[i], *(row[i] for row in rows)])) for i in range(len(head))]
    blocks: list[list[int]] = [[]]
    for i in range(1, len(head)):
        if blocks[-1] and sum(widths[k] + len(GAP) for k in [0, *blocks[-1], i]) - len(GAP) > width:
            blocks.append([])
        blocks[-1].append(i)
    return "\n\n".join(_block(heads, rows, widths, [0, *block]) for block in blocks)


def _block(heads: list[list[str]], rows: list[list[str]], widths: list[int], chosen: list[int]) -> str:
    height = max(len(heads[i]) for i in chosen)
    top = [[([""] * (height - len(heads[i])) + heads[i])[line] for i in chosen] for line in range(height)]
    rule = ["-" * widths[i] for i in chosen]
    lines = [*top, rule, *([row[i] for i in chosen] for row in rows)]
    return "\n".join(
        GAP.join(_align(cell, widths[i], i == 0) for cell, i in zip(line, chosen, strict=True)).rstrip()
        for line in lines
    )


def _align(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _break(text: str) -> list[str]:
    """A heading as lines of at most HEAD characters, where its words allow."""
    lines = [""]
    for word in text.replace("_", "_ ").split(" "):
        joined = lines[-1] + ("" if lines[-1].endswith("_") or not lines[-1] else " ") + word
        if lines[-1] and len(joined) > HEAD and word not in "↓↑":
            lines.append(word)
        else:
            lines[-1] = joined
    return lines
