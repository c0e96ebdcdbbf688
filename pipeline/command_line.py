"""The command line that launch.py and all tools share: words, flags, help, version."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.prepare import commit

PACKAGE = "sigma-cvae-hpc"
RUN_DIR = "run directory: it holds config.yaml"
MODEL = "run directory or exported folder"
NO_DEFAULT: tuple[Any, ...] = (None, "", [], argparse.SUPPRESS)
WIDTH = 110  # columns of a help text


def parser(program: str, doc: str | None, examples: str) -> argparse.ArgumentParser:
    """Return the parser of one program, with --help and --version.

    `doc`: what the program does. `examples`: lines that end the help text.
    """
    made = argparse.ArgumentParser(
        prog=program,
        description=doc,
        epilog=f"examples:\n{examples.rstrip()}",
        formatter_class=_Help,
        add_help=False,
    )
    made.add_argument("-h", "--help", action="help", help="show this text")
    made.add_argument(
        "--version", action=_Version, help="show the versions of this project, torch and Python"
    )
    return made


def add_run_dirs(to: argparse.ArgumentParser, nargs: str = "+", what: str = RUN_DIR) -> None:
    """Add RUN_DIR ...: `args.run_dir` is a list of paths."""
    to.add_argument("run_dir", metavar="RUN_DIR", type=Path, nargs=nargs, help=what)


def add_run_dir(to: argparse.ArgumentParser, what: str = RUN_DIR) -> None:
    """Add RUN_DIR: `args.run_dir` is one path."""
    to.add_argument("run_dir", metavar="RUN_DIR", type=Path, help=what)


def add_model(to: argparse.ArgumentParser) -> None:
    """Add RUN_DIR, which may also be an exported folder: `args.model` is a path."""
    to.add_argument("model", metavar="RUN_DIR", type=Path, help=MODEL)


def add_device(to: argparse.ArgumentParser) -> None:
    """Add --device."""
    to.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute")


def add_out(to: argparse.ArgumentParser, what: str, default: str | None = None) -> None:
    """Add --out: `args.out` is a path or None."""
    to.add_argument("--out", metavar="PATH", type=Path, default=_path(default), help=what)


def add_seed(to: argparse.ArgumentParser, what: str) -> None:
    """Add --seed, 0 by default."""
    to.add_argument("--seed", metavar="N", type=int, default=0, help=what)


def add_follow(to: argparse.ArgumentParser, what: str) -> None:
    """Add --follow and -f."""
    to.add_argument("--follow", "-f", action="store_true", help=f"{what}; Ctrl-C ends this, not the jobs")


def versions() -> str:
    """Return the versions that a question about an error should name."""
    code = commit()
    where = f" (commit {code})" if code else ""
    own, torch = version_of(PACKAGE), version_of("torch")
    return f"{PACKAGE} {own}{where}, torch {torch}, Python {platform.python_version()}"


def version_of(package: str) -> str:
    """Return the version of an installed package, or "(not installed)"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


class _Help(argparse.RawDescriptionHelpFormatter):
    """Aligned columns, and the default of every option that has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        is_switch = action.nargs == 0
        if is_switch or "(default" in text or action.default in NO_DEFAULT:
            return text
        return f"{text} (default: %(default)s)"


class _Version(argparse.Action):
    """Print the versions; git is asked only now."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print, and end with exit code 0."""
        print(versions())  # the parser itself would write to stderr
        parser.exit()
