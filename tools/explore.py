"""Explore models in a browser.

The page draws faces with switches for all attributes, slides single attributes of one face, and edits
photos. Several runs stand side by side with the same noise. The server listens on this machine only and
loads nothing from the internet; from elsewhere use `ssh -L 8080:localhost:8080 HOST`. Ctrl-C ends it.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cvae.use import Model
from pipeline.command_line import MODEL, add_device, parser
from pipeline.errors import UserError, exit_code
from tools.export import open_model

EXAMPLES = """\
  python tools/explore.py runs/sigma_cvae runs/sigma_cvae_nf
"""


def open_models(paths: list[Path], device: str) -> dict[str, Model]:
    """Open all models; a name that comes twice gets its folder in front. Raises UserError."""
    names = [path.absolute().name for path in paths]
    models = {}
    for path, name in zip(paths, names, strict=True):
        twice = names.count(name) > 1
        label = f"{path.absolute().parent.name}/{name}" if twice else name
        if label in models:
            raise UserError(f"{path}: is named twice")
        models[label] = open_model(path, device)
    return models


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    words = parser("tools/explore.py", __doc__, EXAMPLES)
    words.add_argument("model", metavar="RUN_DIR", type=Path, nargs="+", help=MODEL)
    words.add_argument("--port", metavar="N", type=int, default=8080, help="where to listen")
    add_device(words)
    args = words.parse_args(argv)
    if importlib.util.find_spec("nicegui") is None:
        raise UserError("the explorer needs the package nicegui; install it: pip install -e '.[explore]'")
    models = open_models(args.model, args.device)
    from tools.parts.explorer.page import serve  # NiceGUI takes a second to import

    with suppress(KeyboardInterrupt):  # the server has ended in good order when it arrives here
        serve(models, args.port)


if __name__ == "__main__":
    sys.exit(exit_code(main))
