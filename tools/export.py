"""Export the model of a run to a folder.

The folder (RUN_DIR/model by default) then holds model.safetensors and model.json, which `cvae.load` opens
with torch and safetensors alone, and a model card with samples. It has the layout of a repository on the
Hugging Face Hub, and it can be copied anywhere.

  --formats onnx pt2   adds the decoder and the sampling of the prior as programs for other runtimes
  --register NAME      also puts the model into the run's MLflow store, ready for `mlflow models serve`
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import cvae
from cvae.config import SamplingConfig
from cvae.io import CARD, MAX_ROWS, WEIGHTS, Card, ModelFileError, pack
from cvae.request import RequestError
from cvae.use import Model
from pipeline.command_line import add_run_dir, parser
from pipeline.config.schema import PHASES, RunConfig
from pipeline.data.grids import grid
from pipeline.data.loader import attribute_positions
from pipeline.data.shards import Shards
from pipeline.data.staging import open_shards
from pipeline.errors import UserError, exit_code
from pipeline.rundir import layout
from pipeline.rundir.files import write_bytes
from pipeline.rundir.record import commit, run_config
from pipeline.runtime.split import spread
from pipeline.tracking.mlflow.model import register
from pipeline.training.checkpoints.weights import CheckpointInfo, load_model
from pipeline.training.phases import Phase, evaluated_phase, phase
from tools.parts.model_card import GITATTRIBUTES, PICTURE, is_generated, model_card, sealed
from tools.parts.programs import FORMATS, write_programs

EXAMPLES = """\
  python tools/export.py runs/sigma_cvae_nf
  python tools/export.py runs/sigma_cvae_nf exported --checkpoint latest
  python tools/export.py runs/sigma_cvae_nf exported --formats onnx pt2
  python tools/export.py runs/sigma_cvae_nf --register faces
"""
CARD_TEXT = "README.md"


def export(run_dir: Path, folder: Path, which: str = "", weights: str = "", stage: str = "") -> Path:
    """Write the model of a run to `folder` and return it.

    `which`: best | latest | a step. `weights`: ema | raw. `stage`: train | tune | refine | steer. What is
    empty is as evaluated. The run's shards must be there, since the export keeps label rows of training
    images. Raises UserError.
    """
    config = run_config(run_dir)
    stage = stage or evaluated_phase(config)
    weights = weights or config.eval.weights
    evaluated = config.eval.checkpoint
    which = which or ("best" if evaluated == "all" else evaluated)
    net, info = load_model(run_dir, which, weights, torch.device("cpu"), stage)
    card = _card(run_dir, phase(stage, config), info, weights)
    files = pack(net, card)
    _drop_old_programs(folder, files[WEIGHTS])
    for name, content in files.items():
        write_bytes(folder / name, content)
    return folder


def _drop_old_programs(folder: Path, weights: bytes) -> None:
    """Delete the programs of an earlier export, unless it had the same weights."""
    file = folder / WEIGHTS
    if file.exists() and file.read_bytes() == weights:
        return
    for kind in FORMATS:
        for program in (folder / kind).glob(f"*.{kind}"):
            program.unlink()
            print(f"{program}: deleted, because it held other weights; see --formats", file=sys.stderr)


def _card(run_dir: Path, trained: Phase, info: CheckpointInfo, weights: str) -> Card:
    config = trained.config
    shards = open_shards(layout.shards_dir(config), "train", config.data)
    read = attribute_positions(shards.attribute_names, info.attributes)
    labels = shards.attributes()[:, read]
    rows = labels[spread(min(MAX_ROWS, len(labels)), len(labels))]
    exclusive = []
    for group in shards.info.exclusive:
        known = [name for name in group if name in info.attributes]
        if len(known) > 1:
            exclusive.append(known)
    return Card(
        model=config.model,
        size=info.size,
        crop=shards.crop,
        native_size=shards.info.native_size,
        attributes=info.attributes,
        exclusive=exclusive,
        rows=torch.from_numpy(rows),
        provenance={
            "run": run_dir.absolute().name,
            "stage": trained.name,
            "checkpoint": info.file.name,
            "checkpoint_sha256": info.digest,
            "weights": weights,
            "step": info.step,
            "images": info.images,
            "s2": info.s2,
            "data": _data_name(config, shards),
            "train_images": len(shards),
            "content_digest": shards.content_digest,
            "commit": commit(run_dir),
        },
        sampling=_sampling(trained.config),
    )


def _sampling(config: RunConfig) -> SamplingConfig:
    """Return the settings of the run's evaluation, as far as this stage's model can follow them."""
    prior, settings = config.model.prior, config.eval
    guided = prior.name == "flow_matching"
    return SamplingConfig(
        guidance=settings.guidance if guided else 1.0,
        margin=settings.margin if prior.control else 0.0,
        strength=settings.edit_strength if guided or prior.control else 1.0,
        tries=settings.tries if prior.anomaly else 1,
    )


def _data_name(config: RunConfig, shards: Shards) -> str:
    """Return the name of the data set; manifests of old shards do not hold it."""
    drawn = not config.shard.source and not config.data.shards
    return "toy" if drawn else shards.info.name


def add_card(run_dir: Path, folder: Path, model: Model, programs: dict[Path, float]) -> None:
    """Write the model card, its picture, and what git needs to keep large files.

    A card that somebody has changed stays; the new one then lies beside it.
    """
    drawn = io.BytesIO()
    grid(model.sample({}, n=16).numpy(), columns=8).save(drawn, "PNG")
    write_bytes(folder / PICTURE, drawn.getvalue())
    write_bytes(folder / ".gitattributes", GITATTRIBUTES.encode())
    card = folder / CARD_TEXT
    if card.exists() and not is_generated(card.read_text(errors="replace")):
        card = card.with_name(f"{CARD_TEXT}.new")
        print(f"{folder / CARD_TEXT}: was changed and stays; the new card is {card}", file=sys.stderr)
    write_bytes(card, sealed(model_card(run_dir, model, programs)).encode())


def open_model(path: Path, device: str = "cpu") -> Model:
    """Open an exported folder or a run directory; a run without a current export is exported first.

    Raises UserError.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible; use --device cpu")
    if (path / "config.yaml").is_file() and not _is_current(path):
        if not _may_export(path):
            return _exported_for_now(path, device)
        folder = export(path, layout.model_dir(path))
        print(f"exported {path} to {folder}", file=sys.stderr)
        if (folder / CARD_TEXT).exists():  # of an earlier export, so it describes other weights
            with user_errors():
                add_card(path, folder, cvae.load(folder), {})
    with user_errors():
        return cvae.load(path, device)


def _may_export(run_dir: Path) -> bool:
    """Return whether this user may write the run's own export."""
    folder = layout.model_dir(run_dir)
    return os.access(folder if folder.exists() else run_dir, os.W_OK)


def _exported_for_now(run_dir: Path, device: str) -> Model:
    """Open a run that can only be read, such as a colleague's; its export is deleted again."""
    with tempfile.TemporaryDirectory() as folder, user_errors():
        return cvae.load(export(run_dir, Path(folder)), device)


def _is_current(run_dir: Path) -> bool:
    """Return whether the run has an export that is newer than its checkpoints."""
    card = layout.model_dir(run_dir) / CARD
    if not card.is_file():
        return False
    checkpoints = layout.checkpoints_dir(run_dir, evaluated_phase(run_config(run_dir)))
    written = [file.stat().st_mtime_ns for file in checkpoints.glob("step_*.json")]
    return max(written, default=0) <= card.stat().st_mtime_ns


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors of `cvae` that a user can correct into UserError, which ends with exit code 2."""
    try:
        yield
    except (ModelFileError, RequestError) as error:
        raise UserError(str(error)) from None


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises a UserError."""
    words = parser("tools/export.py", __doc__, EXAMPLES)
    add_run_dir(words)
    add = words.add_argument
    add("folder", metavar="FOLDER", type=Path, nargs="?", help="where to write (default: RUN_DIR/model)")
    add("--checkpoint", metavar="NAME", default="", help="best, latest or a step (default: as evaluated)")
    add(
        "--weights",
        default="",
        choices=("ema", "raw"),
        help="averaged or raw weights (default: as evaluated)",
    )
    add("--stage", default="", choices=PHASES, help="of the run (default: as evaluated)")
    formats = sorted(FORMATS)
    add("--formats", nargs="+", action="extend", default=[], choices=formats, help="programs to write too")
    add("--register", metavar="NAME", default="", help="name in MLflow's model registry")
    args = words.parse_args(argv)
    if args.checkpoint not in ("", "best", "latest") and not args.checkpoint.isdecimal():
        raise UserError(f"--checkpoint: got {args.checkpoint!r}, expected best, latest or the step of one")
    folder = args.folder or layout.model_dir(args.run_dir)
    export(args.run_dir, folder, args.checkpoint, args.weights, args.stage)
    with user_errors():
        model = cvae.load(folder)
    programs = write_programs(model, folder, args.formats)
    add_card(args.run_dir, folder, model, programs)
    step = model.card.provenance["step"]
    print(f"{folder}: step {step}, {model.size} pixels, {len(model.attributes)} attributes; use it with:")
    print(f"  python tools/sample.py {folder} {model.attributes[0]} --out grid.png")
    for file, error in programs.items():
        print(f"{file}: differs from the live model by at most {error:.1e}")
    if args.register:
        registered = register(args.run_dir, folder, args.register)
        print(f"registered as {registered.uri}; serve it with:")
        print(f"  {registered.command}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
