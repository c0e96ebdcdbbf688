"""Tables in Markdown of what the benchmarks measured."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from pipeline.errors import ConfigError
from pipeline.rundir.files import write_text
from tools.dev.benchmarks.harness import Result


def number(value: float) -> str:
    """Format with three significant digits and separated thousands."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(result: Result) -> str:
    """Return protocol, figures and ratios of one benchmark as Markdown."""
    spread = ("median", "min", "max")
    figures = []
    for name, values in result["contenders"].items():
        figures.append([name, *(number(values[k]) for k in spread)])
    parts = [
        f"## {result['title']}",
        f"{result['protocol']} N = {result['repeats']}.",
        table([result["unit"], *spread], figures),
    ]
    if result["ratios"]:
        rows = []
        for r in result["ratios"]:
            values = [number(r[k]) for k in spread]
            verdict = "yes" if r["met"] else "no"
            rows.append([f"{r['contender']} / {r['reference']}", *values, f"≥ {r['target']:g}", verdict])
        parts.append(table(["ratio within a round", *spread, "target", "met"], rows))
    return "\n\n".join(parts)


def markdown(report: dict[str, Any]) -> str:
    """Return the page that shows the content of the JSON."""
    facts = []
    for name, value in report["machine"].items():
        if value is not None:
            facts.append([name.replace("_", " "), str(value)])
    head = (
        f"# Benchmarks\n\n`tools/dev/bench.py` wrote this page. Source: {report['source']}. The figures "
        "are medians over N repetitions with their extremes. The contenders take turns, one repetition of "
        "each per round, and a ratio is taken within each round."
    )
    sections = [section(result) for result in report["benchmarks"].values()]
    return "\n\n".join([head, table(["machine", ""], facts), *sections]) + "\n"


def replace_section(file: Path, report: dict[str, Any]) -> None:
    """Write the report between the marks of its suite and kind of machine in a page of docs/.

    Raises ConfigError if the page has no such marks.
    """
    kind = "GPU" if report["machine"]["gpu"] else "CPU"
    begin, end = (f"<!-- {word}: {report['suite']}, {kind} -->" for word in ("begin", "end"))
    before, found, rest = file.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{file}: expected the lines {begin} and {end}, between which the tables belong")
    facts = [f"{name.replace('_', ' ')} {value}" for name, value in report["machine"].items() if value]
    parts = ["; ".join(facts) + f". Source: {report['source']}."]
    for result in report["benchmarks"].values():
        heading, *body = section(result).split("\n\n")
        parts += [f"#{heading} ({kind})", *body]
    text = "\n\n".join(wrapped(part) for part in parts)
    write_text(file, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def wrapped(paragraph: str) -> str:
    """Break a paragraph into lines of 100 characters; leave tables and headings."""
    return paragraph if paragraph[0] in "|#" else fill(paragraph, 100, break_on_hyphens=False)
