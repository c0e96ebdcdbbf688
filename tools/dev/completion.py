"""Write tools/completion.bash: the words that bash offers after launch.py and the tools.

The script is generated because a parser that is asked at every press of TAB would import torch first.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command_line import parser
from pipeline.stages import STAGES
from slurm.resources import FINISH

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tools/completion.bash"
EXAMPLES = """\
  python tools/dev/completion.py
"""
# What a value may be, by the option's name or the argument's word; other values are files.
NAMES = {"--config": "configs", "--cluster": "configs/cluster", "--overlay": "configs/overlays"}
HEAD = """\
# Words that bash completes after launch.py and the tools. Written by tools/dev/completion.py; use it with
#   source tools/completion.bash
_cvae_names() { local file; for file in "$1"/*.yaml; do basename "$file" .yaml; done; }
_cvae_runs() { local file; for file in runs/*/config.yaml runs/*/*/config.yaml; do
  [ -e "$file" ] && dirname "$file"; done; }
_cvae_keys() { sed -n 's/^| `\\([a-z0-9_.]*\\)` .*/\\1=/p' docs/configuration.md; }
_cvae() {
  local here="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" script="" word words=""
  for word in "${COMP_WORDS[@]:0:COMP_CWORD}"; do
    case "$word" in
      launch.py | */launch.py) script=launch.py ;;
      tools/*.py | */tools/*.py) script="tools/${word##*tools/}" ;;
    esac
  done
  case "$script $before" in
"""
MIDDLE = """\
    *) case "$script" in
"""
TAIL = """\
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$here"))
  case "${COMPREPLY[0]}" in *=) compopt -o nospace 2>/dev/null ;; esac
}
complete -o default -F _cvae python python3 .venv/bin/python launch.py
"""


class Found(Exception):
    """Carries the parser of a program out of its `main`."""


def parser_of(module: str) -> argparse.ArgumentParser:
    """Return the parser that a program builds before it parses its command line."""

    def stop(found: argparse.ArgumentParser, *_: object) -> None:
        raise Found(found)

    program = importlib.import_module(module)
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(argparse.ArgumentParser, "parse_intermixed_args", stop),
    ):
        try:
            program.main([])
        except Found as found:
            parsed: argparse.ArgumentParser = found.args[0]
            return parsed
    raise AssertionError(f"{module}: main() parses no command line")


def programs() -> dict[str, str]:
    """Return {script: module} of launch.py and the tools for users."""
    found = {"launch.py": "launch"}
    for file in sorted((ROOT / "tools").glob("*.py")):
        found[f"tools/{file.name}"] = f"tools.{file.stem}"
    return found


def values_of(action: argparse.Action) -> str:
    """Return the shell words that one option or argument accepts; "" for files and free text."""
    for name in action.option_strings:
        if name in NAMES:
            return f"$(_cvae_names {NAMES[name]})"
    if action.choices:
        return " ".join(map(str, action.choices))
    if action.metavar == "STAGE":
        return " ".join([*STAGES, FINISH])
    if action.option_strings == ["--stages"]:
        return " ".join(STAGES)
    if action.metavar == "key=value":
        return "$(_cvae_keys)"
    return "$(_cvae_runs)" if action.metavar == "RUN_DIR" else ""


def script() -> str:
    """Return the content of tools/completion.bash."""
    after_option = []
    otherwise = []
    for name, module in programs().items():
        words: list[str] = []
        for action in parser_of(module)._actions:
            words += action.option_strings
            values = values_of(action)
            if not action.option_strings and values:
                words.append(values)
            for option in action.option_strings if values else []:
                after_option.append(f'    "{name} {option}") words="{values}" ;;\n')
        otherwise.append(f'      {name}) words="{" ".join(words)}" ;;\n')
    return "".join([HEAD, *after_option, MIDDLE, *otherwise, TAIL])


def main(argv: list[str] | None = None) -> None:
    """Write the file."""
    parser("tools/dev/completion.py", __doc__, EXAMPLES).parse_args(argv)
    FILE.write_text(script())
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
