"""Exported models: a folder with model.safetensors (the weights) and model.json (everything else).

model.json holds the format number, the model's configuration, the image size, the attributes, label
rows of training images, how it draws, where the weights come from, the sha256 of the weights and a
digest of the rest. No file is executed. This is the only file of `cvae` that reads a model from the disk.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cvae.config import LossConfig, ModelConfig, SamplingConfig
from cvae.model import CVAE

FORMAT = 1  # raise it when an older reader would misread the files
CARD = "model.json"
WEIGHTS = "model.safetensors"
RUN_FOLDER = "model"  # where an export lies in a run directory
MAX_ROWS = 4096  # most label rows of training images
SIMILARITY = 0.4  # below this share of common letters a suggestion would puzzle
AGAIN = "export the run again: python tools/export.py RUN_DIR"

FilePath = str | os.PathLike[str]
Kind = TypeVar("Kind")


class ModelFileError(ValueError):
    """An exported model that is missing, damaged or of another version; the message names the file."""


@dataclass(frozen=True)
class Card:
    """The content of model.json."""

    model: ModelConfig
    size: int  # side of the images, pixels
    crop: int  # side of the centred square cut from each training image, pixels; 0: the largest one
    native_size: tuple[int, int] | None  # (height, width) of the training images; None: sizes differ
    attributes: list[str]  # names that the model reads, in order
    exclusive: list[list[str]]  # groups of which an image has at most one attribute
    rows: Tensor  # attributes of training images, uint8 [N, A]
    provenance: dict[str, Any]  # run, checkpoint, step, data: for people and logs
    sampling: SamplingConfig = SamplingConfig()  # as the run was evaluated


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'NAME'?" with the nearest of `known`, or "" if none is near."""
    near = difflib.get_close_matches(word, list(known), 1, SIMILARITY)
    return f"; did you mean '{near[0]}'?" if near else ""


# ---- writing


def pack(net: CVAE, card: Card) -> dict[str, bytes]:
    """Return the content of each file of an export, in the order in which they must be written.

    Networks of loss terms are left out, because only training needs them.
    """
    tensors = {}
    for name, tensor in net.state_dict().items():
        if not name.startswith("loss_terms."):
            tensors[name] = tensor.detach().cpu().contiguous()
    weights = safetensors.torch.save(tensors)
    tree = {
        "format": FORMAT,
        "model": asdict(replace(card.model, losses=LossConfig())),
        "image": {"size": card.size, "crop": card.crop, "native_size": card.native_size},
        "attributes": card.attributes,
        "exclusive": card.exclusive,
        "rows": _packed(card.rows[:MAX_ROWS]),
        "sampling": asdict(card.sampling),
        "provenance": card.provenance,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    sealed = {**tree, "digest": _digest(tree)}
    return {WEIGHTS: weights, CARD: (json.dumps(sealed, indent=1) + "\n").encode()}


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _packed(rows: Tensor) -> str:
    """Write bits [N, A] as base64; bit k of a row is bit k % 8 of its byte k // 8."""
    n, width = rows.shape
    padded = torch.zeros(n, -(-width // 8) * 8, dtype=torch.uint8)
    padded[:, :width] = rows
    places = 2 ** torch.arange(8, dtype=torch.uint8)
    packed = (padded.view(n, -1, 8) * places).sum(-1).to(torch.uint8)
    return base64.b64encode(bytes(packed.flatten().tolist())).decode()


def _unpacked(text: str, width: int) -> Tensor:
    """Return the bits [N, width] that `_packed` wrote. Raises ValueError."""
    content = base64.b64decode(text, validate=True)
    if not content:
        raise ValueError("no row")
    packed = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, -(-width // 8))
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).flatten(1)[:, :width].contiguous()


# ---- reading


def read(path: FilePath) -> tuple[CVAE, Card]:
    """Return the model, on the CPU and in eval mode, and its card. Raises ModelFileError."""
    folder = _folder(Path(path))
    tree = _tree(folder / CARD)
    try:
        card = _card(tree, folder / CARD)
    except ModelFileError:
        raise
    except (ValueError, LookupError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise ModelFileError(f"{folder / CARD}: is malformed ({error}); {AGAIN}") from None
    shapes = _network(card, folder / CARD, "meta")  # without memory: a wrong size then costs nothing
    _fill(shapes, folder / WEIGHTS, str(tree["weights_sha256"]))
    net = _network(card, folder / CARD, "cpu")  # it also has the constants that are in no file
    net.load_state_dict(shapes.state_dict(), assign=True)
    return net.eval(), card


def _folder(path: Path) -> Path:
    """Return the folder that holds the export: `path`, or the one in the run directory `path`."""
    for folder in (path, path / RUN_FOLDER):
        if (folder / CARD).is_file():
            return folder
    if not path.is_dir():
        raise ModelFileError(f"{path}: no such folder; give a run directory or an exported folder")
    raise ModelFileError(
        f"{path}: no exported model in it; to export a run, type: python tools/export.py {path}"
    )


def _tree(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_bytes())
        found = tree["format"]
    except OSError as error:
        raise ModelFileError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelFileError(f"{file}: is damaged; {AGAIN}") from None
    if found != FORMAT:
        raise ModelFileError(f"{file}: key 'format': got {found!r:.40}, expected {FORMAT}; {AGAIN}")
    rest = {key: value for key, value in tree.items() if key != "digest"}
    if tree.get("digest") != _digest(rest):
        raise ModelFileError(f"{file}: is damaged (its digest does not fit its content); {AGAIN}")
    return tree


def _card(tree: dict[str, Any], file: Path) -> Card:
    attributes = _names(tree["attributes"], f"{file}: key 'attributes'")
    exclusive = [_names(group, f"{file}: key 'exclusive'") for group in tree["exclusive"]]
    image = tree["image"]
    native = image["native_size"]
    try:
        rows = _unpacked(tree["rows"], len(attributes))
    except ValueError as error:
        raise ModelFileError(f"{file}: key 'rows': expected packed label rows ({error}); {AGAIN}") from None
    return Card(
        model=read_config(ModelConfig, tree["model"], f"{file}: key 'model"),
        size=int(image["size"]),
        crop=int(image["crop"]),
        native_size=None if native is None else (int(native[0]), int(native[1])),
        attributes=attributes,
        exclusive=exclusive,
        rows=rows,
        provenance=dict(tree["provenance"]),
        # Exports of before 2026-11-26 do not have it.
        sampling=read_config(SamplingConfig, tree.get("sampling", {}), f"{file}: key 'sampling"),
    )


def _names(stored: Any, where: str) -> list[str]:
    if not isinstance(stored, list) or not all(isinstance(name, str) for name in stored) or not stored:
        raise ModelFileError(f"{where}: got {stored!r:.80}, expected a list of names; {AGAIN}")
    return stored


def read_config(kind: type[Kind], tree: Any, where: str) -> Kind:
    """Build the dataclass `kind` from plain dictionaries; a key that is missing keeps its default.

    `where` begins the messages and ends in the name of the section. Raises ModelFileError.
    """
    if not isinstance(tree, dict):
        raise ModelFileError(f"{where}': got {tree!r:.80}, expected a section; {AGAIN}")
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            hint = nearest(str(key), hints) or "; it needs a newer version of cvae"
            raise ModelFileError(f"{where}.{key}': is unknown{hint}")
        values[key] = _checked(hints[key], value, f"{where}.{key}")
    return kind(**values)


def _checked(kind: Any, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return read_config(kind, value, where)  # type: ignore[arg-type]
    if kind is float:
        fits = type(value) in (int, float)
    elif kind == list[int]:
        fits = isinstance(value, list) and all(type(item) is int for item in value)
    else:
        fits = type(value) is kind
    if not fits:
        expected = getattr(kind, "__name__", str(kind))
        raise ModelFileError(f"{where}': got {value!r:.80}, expected {expected}; {AGAIN}")
    return value


def _network(card: Card, file: Path, device: str) -> CVAE:
    """Build the networks of a card."""
    try:
        with torch.device(device):
            return CVAE(card.model, card.size, len(card.attributes))
    except KeyError as error:
        raise ModelFileError(
            f"{file}: key 'model': no part is called {error}; it needs a newer version of cvae"
        ) from None
    except (ValueError, TypeError, RuntimeError, ArithmeticError, IndexError) as error:
        raise ModelFileError(f"{file}: key 'model': builds no model ({error}); {AGAIN}") from None


def _fill(net: CVAE, file: Path, expected: str) -> None:
    """Check the weights and put them into `net`, as float32."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{file}: cannot be read ({error.strerror}); {AGAIN}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ModelFileError(
            f"{file}: is damaged: its sha256 begins with {found[:12]}, expected {expected[:12]}; {AGAIN}"
        )
    try:
        tensors = safetensors.torch.load(content)
        net.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelFileError(f"{file}: its tensors do not fit {CARD}: {reason}; {AGAIN}") from None
