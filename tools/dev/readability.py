"""Measure how readable source trees are: `python tools/dev/readability.py TREE [TREE ...]`.

The script prints one Markdown table with a column for each tree. It only counts; it judges nothing.
A tree may be written `NAME=FOLDER` to choose the heading of its column.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

LONG_LINE = 100  # columns
SKIPPED = {".git", ".venv", "venv", "build", "dist", "runs", "__pycache__", "node_modules"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
STIFF_FIRST_WORDS = ("Of", "What")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`*\"(\d])")


@dataclass
class Counts:
    """The counts of one tree."""

    lines: int = 0
    long_lines: int = 0
    statements: int = 0
    comprehensions: int = 0
    tuple_assignments: int = 0
    docstrings: int = 0
    stiff_docstrings: int = 0
    sentences: list[int] = field(default_factory=list)  # words of each sentence of the prose
    folders: Counter[str] = field(default_factory=Counter)  # .py files of each folder


def files_below(root: Path, pattern: str) -> list[Path]:
    """Return the files of `root` that match `pattern`, without environments, outputs and caches."""
    found = []
    for file in sorted(root.rglob(pattern)):
        folders = file.relative_to(root).parts[:-1]
        if not SKIPPED.intersection(folders):
            found.append(file)
    return found


def count_source(source: str, counts: Counts) -> None:
    """Add one Python file to `counts`. Blank lines and comment lines are no code lines."""
    for line in source.splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            counts.lines += 1
            counts.long_lines += len(line) > LONG_LINE
    for node in ast.walk(ast.parse(source)):
        counts.statements += isinstance(node, ast.stmt)
        counts.comprehensions += isinstance(node, COMPREHENSIONS)
        counts.tuple_assignments += is_tuple_assignment(node)
        if isinstance(node, DOCUMENTED):
            count_docstring(ast.get_docstring(node), counts)


def is_tuple_assignment(node: ast.AST) -> bool:
    """Tell whether `node` is `a, b = x, y`.

    Unpacking the result of a call, `a, b = f()`, does not count.
    """
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return isinstance(node.targets[0], ast.Tuple)


def count_docstring(docstring: str | None, counts: Counts) -> None:
    """Add one docstring to `counts`; None is no docstring."""
    words = (docstring or "").split()
    if words:
        counts.docstrings += 1
        counts.stiff_docstrings += words[0] in STIFF_FIRST_WORDS


def sentences(markdown: str) -> list[int]:
    """Return the words per sentence of the prose, without code, tables, headings and addresses."""
    kept = []
    fenced = False
    for line in markdown.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
            continue
        is_code = fenced or line.startswith(("    ", "\t"))
        if is_code or line.lstrip().startswith(("|", "#", "!", "<")):
            kept.append("")  # ends a paragraph
            continue
        kept.append(re.sub(r"^\s*([-*]|\d+\.)\s+", "\n\n", line))
    text = "\n".join(kept)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    lengths = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            words = re.findall(r"[A-Za-z]\S*", sentence)
            if words:
                lengths.append(len(words))
    return lengths


def measure(root: Path) -> Counts:
    """Count one tree. Prose is README.md and docs/*.md; a tree without them has no sentences."""
    counts = Counts()
    for file in files_below(root, "*.py"):
        counts.folders[str(file.parent.relative_to(root))] += 1
        count_source(file.read_text(errors="replace"), counts)
    pages = [root / "README.md", *files_below(root / "docs", "*.md")]
    for page in pages:
        if page.exists():
            counts.sentences += sentences(page.read_text())
    return counts


def per_thousand(count: int, statements: int) -> str:
    """Return `count` per 1,000 statements."""
    return f"{1000 * count / max(1, statements):.1f}"


def rows(counts: Counts) -> dict[str, str]:
    """Return the cells of one column, by the name of their row."""
    fullest, most = (counts.folders.most_common(1) or [("", 0)])[0]
    mean = sum(counts.sentences) / max(1, len(counts.sentences))
    return {
        ".py files": str(sum(counts.folders.values())),
        "code lines": f"{counts.lines:,}",
        f"code lines above {LONG_LINE} columns": f"{100 * counts.long_lines / max(1, counts.lines):.1f} %",
        "comprehensions per 1,000 statements": per_thousand(counts.comprehensions, counts.statements),
        "tuple assignments per 1,000 statements": per_thousand(counts.tuple_assignments, counts.statements),
        "docstrings": str(counts.docstrings),
        'docstrings that begin with "Of" or "What"': str(counts.stiff_docstrings),
        "words per sentence in README and docs": f"{mean:.1f}" if counts.sentences else "-",
        "sentences in README and docs": str(len(counts.sentences)),
        "most .py files in one folder": f"{most} ({fullest})",
    }


def table(columns: dict[str, Counts]) -> str:
    """Return the Markdown table: one column for each tree."""
    cells = {name: rows(counts) for name, counts in columns.items()}
    lines = [
        "| | " + " | ".join(cells) + " |",
        "|---|" + "---:|" * len(cells),
    ]
    for row in rows(Counts()):
        values = " | ".join(column[row] for column in cells.values())
        lines.append(f"| {row} | {values} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/dev/readability.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trees", metavar="TREE", nargs="+", help="a folder, or NAME=FOLDER")
    args = parser.parse_args(argv)
    columns = {}
    for word in args.trees:
        name, equals, folder = word.rpartition("=")
        root = Path(folder)
        if not root.is_dir():
            parser.error(f"{folder}: no such folder")
        columns[name if equals else root.name] = measure(root)
    print(table(columns))


if __name__ == "__main__":
    main()
