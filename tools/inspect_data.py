"""Look at a data set before training: `python tools/inspect_data.py PATH|URL|RUN_DIR`.

Prints what is there: kind, counts, splits, how often each attribute occurs, image sizes and damaged
images. Writes a contact sheet with labels, and ends with the command that makes shards.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command_line import add_out, parser
from pipeline.config.paths import is_remote
from pipeline.config.schema import SOURCE_NAMES, DataConfig, ShardConfig
from pipeline.data.encoded.remote import is_url
from pipeline.data.sources.base import SPLITS, ImageError, Source
from pipeline.data.sources.registry import SOURCES, open_source, recognise
from pipeline.data.staging import open_shards
from pipeline.errors import ConfigError, exit_code
from pipeline.rundir import layout
from pipeline.rundir.files import write_bytes
from pipeline.rundir.layout import MANIFEST
from pipeline.rundir.record import run_config
from tools.parts.contact import Shown, contact_page, contact_sheet

EXAMPLES = """\
  python tools/inspect_data.py /data/celeba
  python tools/inspect_data.py "s3://bucket/train-{000..127}.tar" --check 100 --out sheet.html
  python tools/inspect_data.py runs/sigma_cvae_nf
"""
CHECKED = 500  # images that are opened by default
SHOWN = 48  # images on the contact sheet
USUAL_SIZES = (32, 16)  # below the default of shard.size
NAMED = 10  # damaged images that are listed


@dataclass
class Findings:
    """What is known of a data set."""

    kind: str
    place: str
    annotated: int
    attributes: list[str]
    labels: dict[str, np.ndarray]  # split -> uint8 [N, A]
    command: list[str]
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) of checked images
    checked: int = 0
    damaged: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)

    @property
    def present(self) -> int:
        """The number of images."""
        return sum(len(labels) for labels in self.labels.values())


def spread(n: int, most: int) -> list[int]:
    """Return at most `most` positions, evenly spread over n; 0: all."""
    count = min(n, most or n)
    return np.linspace(0, n - 1, count).round().astype(int).tolist() if count else []


def of_source(place: str, kind_name: str, checked: int, allow_pipe: bool) -> Findings:
    """Open a source, read some of its images, and return what was found. Raises DataError."""
    settings = ShardConfig(source=place, source_kind=kind_name, allow_subset=True, allow_pipe=allow_pipe)
    kind = recognise(place, kind_name)
    source = open_source(place, settings)
    name = next(name for name, known in SOURCES.items() if known is kind)
    labels = {split: source.labels[source.splits == index] for index, split in enumerate(SPLITS)}
    annotated = len(source.annotated.splits)
    command = ["python", "launch.py", "--config", "sigma_cvae_nf", f"shard.source={place}"]
    if kind_name:
        command.append(f"shard.source_kind={kind_name}")
    if allow_pipe:
        command.append("shard.allow_pipe=true")
    if annotated > len(source.keys):
        command.append("shard.allow_subset=true")
    found = Findings(name, source.location, annotated, list(source.attributes), labels, command)
    _read_images(source, found, checked)
    if found.damaged:
        command.append("shard.skip_damaged=true")
    command += _fitting_size(found, settings)
    command += ["--stages", "shard"]
    return found


def _fitting_size(found: Findings, settings: ShardConfig) -> list[str]:
    """Return the largest usual size that enlarges no image, as a setting; nothing if the default fits."""
    shortest = min((min(size) for size in found.sizes), default=settings.size)
    if shortest >= settings.size:
        return []
    fitting = [size for size in USUAL_SIZES if size <= shortest]
    return [f"shard.size={fitting[0]}"] if fitting else ["shard.allow_upsampling=true"]


def _read_images(source: Source, found: Findings, checked: int) -> None:
    """Open some images: their sizes, which are damaged, and those to show."""
    rows = spread(len(source.keys), checked)
    to_show = set(rows[at] for at in spread(len(rows), SHOWN))
    for row in rows:
        try:
            pixels = source.images.read(source.names[row])
        except ImageError as error:
            found.damaged.append(f"{source.images.where(source.names[row])}: {error}")
            continue
        finally:
            found.checked += 1
        found.sizes[(pixels.shape[1], pixels.shape[0])] += 1
        if row in to_show:
            names = [name for name, bit in zip(source.attributes, source.labels[row], strict=True) if bit]
            found.shown.append(Shown(pixels, source.keys[row], SPLITS[source.splits[row]], names))


def of_shards(folder: Path, data: DataConfig) -> Findings:
    """Return what finished shards hold; `data` tells where their tars lie. Raises ConfigError, DataError."""
    splits = {split: open_shards(folder, split, data) for split in SPLITS}
    first = splits["train"]
    labels = {split: shards.attributes() for split, shards in splits.items()}
    annotated = first.manifest.get("counts", {}).get("annotated", sum(map(len, splits.values())))
    command = ["python", "launch.py", "--config", "sigma_cvae_nf", f"data.shards={folder}"]
    if data.tars:
        command.append(f"data.tars={data.tars}")
    if is_url(data.tars):
        command.append(f"data.cache_dir={data.cache_dir}")
    kind = f"shards of {first.info.name}"
    found = Findings(kind, str(folder), annotated, first.attribute_names, labels, command)
    found.checked = found.present
    found.sizes[(first.size, first.size)] = found.present
    found.damaged = [f"{name}: {reason} (left out)" for name, reason in first.manifest.get("skipped", [])]
    per_split = SHOWN // len(SPLITS)
    for split, shards in splits.items():
        rows = np.array(spread(len(shards), per_split))
        images, bits = shards.gather(rows)
        for image, key, row in zip(images, shards.keys(rows), bits, strict=True):
            names = [name for name, bit in zip(first.attribute_names, row, strict=True) if bit]
            found.shown.append(Shown(image, key, split, names))
    return found


def text_of(found: Findings) -> str:
    """Return the findings as text."""
    counts = ", ".join(f"{split} {len(labels):,}" for split, labels in found.labels.items())
    lines = [
        f"kind        {found.kind}",
        f"place       {found.place}",
        f"images      {found.present:,} of {found.annotated:,} annotated",
        f"splits      {counts}",
        f"sizes       {_sizes(found)}",
        f"damaged     {len(found.damaged)} of {found.checked:,} images opened",
    ]
    lines += [f"            {damaged}" for damaged in found.damaged[:NAMED]]
    if len(found.damaged) > NAMED:
        lines.append(f"            and {len(found.damaged) - NAMED} more")
    width = max(len(name) for name in found.attributes)
    lines += ["", f"{'attribute':{width}}  " + "  ".join(f"{split:>6}" for split in found.labels)]
    for column, name in enumerate(found.attributes):
        shares = [labels[:, column].mean() if len(labels) else 0.0 for labels in found.labels.values()]
        lines.append(f"{name:{width}}  " + "  ".join(f"{share:6.1%}" for share in shares))
    return "\n".join(lines)


def _sizes(found: Findings) -> str:
    if not found.sizes:
        return "unknown"
    common = found.sizes.most_common(3)
    words = [f"{width}x{height} ({count:,})" for (width, height), count in common]
    sides = [min(size) for size in found.sizes]
    more = f", {len(found.sizes) - 3} others" if len(found.sizes) > 3 else ""
    return f"{', '.join(words)}{more}; shorter sides {min(sides)} to {max(sides)} pixels"


def find(place: str, kind: str, checked: int, allow_pipe: bool) -> Findings:
    """Look at a run directory, a folder of shards, or a source. Raises a UserError."""
    folder = Path(place)
    if not is_remote(place) and (folder / "config.yaml").is_file():
        config = run_config(folder)
        shards = layout.shards_dir(config)
        if (shards / MANIFEST).exists():
            return of_shards(shards, config.data)
        if not config.shard.source:
            raise ConfigError(
                f"{place}: its shards are not made yet, and its images are drawn by the project"
            )
        return of_source(layout.source_place(config), config.shard.source_kind, checked, allow_pipe)
    if not is_remote(place) and (folder / MANIFEST).is_file():
        return of_shards(folder.absolute(), DataConfig())
    absolute = place if is_remote(place) else str(folder.expanduser().absolute())
    return of_source(absolute, kind, checked, allow_pipe)


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises a UserError."""
    words = parser("tools/inspect_data.py", __doc__, EXAMPLES)
    words.add_argument(
        "place", metavar="PATH", help="folder, URLs of tars, folder of shards, or run directory"
    )
    words.add_argument(
        "--kind", default="", choices=("", *SOURCE_NAMES), help="kind; empty: found by looking"
    )
    words.add_argument("--check", metavar="N", type=int, default=CHECKED, help="images to open; 0: all")
    words.add_argument(
        "--allow-pipe", action="store_true", help="let a place pipe:PROGRAM start that program"
    )
    add_out(words, "contact sheet, .png or .html", "contact_sheet.png")
    args = words.parse_args(argv)
    if args.out.suffix not in (".png", ".html"):
        raise ConfigError(f"--out: got {args.out}, expected a name that ends in .png or .html")
    if args.check < 0:
        raise ConfigError(f"--check: got {args.check}, expected a number of images, or 0 for all")
    found = find(args.place, args.kind, args.check, args.allow_pipe)
    text = text_of(found)
    command = shlex.join(found.command)
    as_page = args.out.suffix == ".html"
    write_bytes(args.out, contact_page(found.shown, text, command) if as_page else contact_sheet(found.shown))
    print(f"{text}\n\ncontact sheet: {args.out}\nnext: {command}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
