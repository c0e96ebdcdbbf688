"""Write docs/configuration.md from the dataclasses: `python tools/dev/config_reference.py`.

The page lists every key with its type, its default and the comment behind it in the source. A test
fails if the page is not current.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import io
import sys
import tokenize
import types
import typing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config.schema import RunConfig
from pipeline.prepare import ROOT
from pipeline.rundir.files import write_text

PAGE = ROOT / "docs" / "configuration.md"
HEAD = """\
# Configuration

`tools/dev/config_reference.py` writes this page from `pipeline/config/schema.py` and
`cvae/config.py`. Do not edit it by hand.

The value of a key comes from four places. Each one overrides those before it:

1. the defaults below,
2. the YAML file of `--config` and, before it, the file that its `base:` names,
3. the cluster file and the files of `--overlay`,
4. `a.b=value` on the command line.

A key that does not exist is refused with the nearest name. To see all keys with their values:

```sh dry-run
python launch.py --config sigma_cvae_nf train.batch_size=128 --dry-run
```

`config.yaml` in the run directory holds the resolved configuration. `config_history.jsonl` says what
each launch changed. Files that use the old name of a key still load, with a warning.
"""


def comments(section: type) -> dict[str, str]:
    """Return the comment behind each field of a dataclass, by the field's name."""
    found: dict[str, str] = {}
    name = ""
    line_start = True
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(section)).readline):
        if token.type == tokenize.NAME and line_start:
            name = token.string
        if token.type == tokenize.COMMENT and name:
            text = token.string.lstrip("# ")
            found[name] = f"{found[name]} {text}" if name in found else text
        line_start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL)
    return found


def type_name(annotation: Any) -> str:
    """Return a type as a reader writes it: `int`, `list of str`, `int or empty`."""
    if isinstance(annotation, types.UnionType):
        names = [type_name(each) for each in typing.get_args(annotation) if each is not type(None)]
        return " or ".join([*names, "null"])
    if typing.get_origin(annotation) is list:
        return f"list of {type_name(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    return str(annotation.__name__)


def default_of(field: dataclasses.Field) -> Any:
    """Return the default value of a dataclass's field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def shown(value: Any) -> str:
    """Return a default as it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if value == "":
        return '""'
    return str(value)


def rows(section: type, prefix: str) -> tuple[list[str], list[tuple[str, type]]]:
    """Return the rows of a section's own keys, and its subsections with their prefixes."""
    hints = typing.get_type_hints(section)
    meanings = comments(section)
    lines = []
    subsections = []
    for field in dataclasses.fields(section):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            subsections.append((f"{prefix}{field.name}.", typing.cast(type, kind)))
            continue
        meaning = meanings.get(field.name, "").replace("|", "\\|")
        default = shown(default_of(field))
        lines.append(f"| `{prefix}{field.name}` | {type_name(kind)} | `{default}` | {meaning} |")
    return lines, subsections


def sections(section: type, prefix: str) -> list[str]:
    """Return a heading, the docstring and the table of a section, then those of its subsections."""
    lines, subsections = rows(section, prefix)
    title = prefix.rstrip(".") or "The run"
    about = " ".join((section.__doc__ or "").split())
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    parts = [f"## {title}\n\n{about}\n\n" + "\n".join(head + lines)]
    if not lines:
        parts = [f"## {title}\n\n{about}"]
    for name, subsection in subsections:
        parts += sections(subsection, name)
    return parts


def page() -> str:
    """Return the text of docs/configuration.md."""
    parts = [HEAD.rstrip(), *sections(RunConfig, "")]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    description = "Write docs/configuration.md from the dataclasses."
    argparse.ArgumentParser(prog="tools/dev/config_reference.py", description=description).parse_args(argv)
    write_text(PAGE, page())
    print(PAGE)


if __name__ == "__main__":
    main()
