"""A model as programs for other runtimes: ONNX files, and graphs of torch.export.

    decoder    attributes [n, A], z [n, D]      ->  image [n, 3, S, S] in [-1, 1]
    sampler    attributes [n, A], noise [n, D]  ->  z [n, D], a sample of the prior p(z|y)

The size n of a batch is free. The solver of a flow-matching prior is unrolled. Every written program is
run once and compared with the live model.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cvae.model import CVAE
from cvae.use import Model
from pipeline.errors import UserError
from pipeline.rundir.files import write_bytes

TOLERANCE = 1e-5  # largest difference to the live model, as a share of the largest value or of 1
CHECKED = 5  # images of the comparison; another number than the one that was traced
EXTRA = "install the packages: pip install -e '.[onnx]'"


class Decoder(nn.Module):
    """The decoder without the rest of the model, so that a program carries its weights alone."""

    def __init__(self, net: CVAE) -> None:
        super().__init__()
        self.conditioner = net.conditioner
        self.decoder = net.decoder

    def forward(self, attributes: Tensor, z: Tensor) -> Tensor:
        """attributes [n, A], z [n, D] -> image [n, 3, S, S]."""
        return self.decoder(z, self.conditioner(attributes))


class Sampler(nn.Module):
    """The prior's `sample`: from noise to a code."""

    def __init__(self, net: CVAE) -> None:
        super().__init__()
        self.conditioner = net.conditioner
        self.prior = net.conditional_prior

    def forward(self, attributes: Tensor, noise: Tensor) -> Tensor:
        """attributes [n, A], noise [n, D] -> z [n, D]."""
        return self.prior(self.conditioner(attributes)).sample(noise)


@dataclass(frozen=True)
class Part:
    """A part of the model that becomes one program."""

    module: type[Decoder] | type[Sampler]
    second: str  # name of the second input; the first one is `attributes`
    output: str


PARTS = {
    "decoder": Part(Decoder, "z", "image"),
    "sampler": Part(Sampler, "noise", "z"),
}


def write_programs(model: Model, folder: Path, formats: list[str]) -> dict[Path, float]:
    """Write `folder`/<format>/<part>.<format> and return each file with its difference to the live model.

    `formats`: names of FORMATS. Raises UserError if a package is missing or a program is wrong.
    """
    written = {}
    for name, part in PARTS.items() if formats else ():
        module = part.module(model.net).cpu().eval()
        inputs = _inputs(model, CHECKED)
        with torch.no_grad():
            expected = module(*inputs)
        program = _traced(module, part, _inputs(model, 2))
        for kind in formats:
            encode, run = FORMATS[kind]
            content = encode(program, part)
            error = _difference(run(content, part, inputs), expected)
            file = folder / kind / f"{name}.{kind}"
            if not error <= TOLERANCE:
                raise UserError(f"{file}: differs by {error:.1e} from the live model, expected {TOLERANCE:g}")
            write_bytes(file, content)
            written[file] = error
    return written


def _inputs(model: Model, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    attributes = torch.rand(n, len(model.attributes), generator=generator).round()
    return attributes, torch.randn(n, model.net.z_dim, generator=generator)


def _traced(module: nn.Module, part: Part, inputs: tuple[Tensor, Tensor]) -> torch.export.ExportedProgram:
    """Return the graph of a module in which the number of images is free."""
    batch = torch.export.Dim("n")
    shapes = {"attributes": {0: batch}, part.second: {0: batch}}
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def _difference(found: Tensor, expected: Tensor) -> float:
    largest = max(1.0, float(expected.abs().max()))
    return float((found - expected).abs().max()) / largest


def _to_onnx(program: torch.export.ExportedProgram, part: Part) -> bytes:
    _require("onnxscript")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ["attributes", part.second]
        made = torch.onnx.export(program, input_names=names, output_names=[part.output], verbose=False)
    assert made is not None
    return made.model_proto.SerializeToString()


def _run_onnx(content: bytes, part: Part, inputs: tuple[Tensor, Tensor]) -> Tensor:
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    named = {"attributes": inputs[0].numpy(), part.second: inputs[1].numpy()}
    read = {entry.name for entry in session.get_inputs()}  # the standard prior reads no attributes
    found = session.run(None, {name: value for name, value in named.items() if name in read})
    return torch.from_numpy(found[0])


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--formats onnx: the package {package} is missing; {EXTRA}")


def _to_pt2(program: torch.export.ExportedProgram, part: Part) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


def _run_pt2(content: bytes, part: Part, inputs: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.export.load(io.BytesIO(content)).module()(*inputs)


Encode = Callable[[torch.export.ExportedProgram, Part], bytes]
Run = Callable[[bytes, Part, tuple[Tensor, Tensor]], Tensor]
FORMATS: dict[str, tuple[Encode, Run]] = {
    "onnx": (_to_onnx, _run_onnx),
    "pt2": (_to_pt2, _run_pt2),
}
