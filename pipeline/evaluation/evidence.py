"""The evidence behind the metrics: all ranks compute its parts together, rank 0 reads them.

evidence.compute("samples")   # collective: every rank calls it at the same place
evidence["samples"]           # reads; never communicates
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.evaluation.parts import PARTS
from pipeline.evaluation.rare import Combination
from pipeline.evaluation.subject import Rows, Subject

# Compute capabilities at which float64 has half the speed of float32: P100, V100, A100, H100 and H200, B200.
FAST_DOUBLES = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


class MissingPart(LookupError):
    """A part of the evidence was read before all ranks computed it."""


@dataclass(frozen=True)
class Evidence(Subject):
    """A subject and the parts that were computed of it."""

    parts: dict[str, Rows] = field(default_factory=dict)

    def compute(self, *parts: str) -> None:
        """Compute these parts unless they are there (collective: all ranks call it alike)."""
        for part in parts:
            if part not in self.parts:
                self.watch.what = f"part {part}"
                self.parts[part] = PARTS[part](self)

    def __getitem__(self, part: str) -> Rows:
        """Return a computed part.

        Raises MissingPart instead of computing: one rank alone would wait for ever.
        """
        if part not in self.parts:
            there = ", ".join(self.parts) or "none"
            raise MissingPart(
                f"evidence part {part!r} was not computed (there: {there});"
                " name it in the `needs` of the metric, so that all ranks compute it"
            )
        return self.parts[part]

    def rows(self, part: str, name: str) -> Tensor:
        """Return rows of a part for distances in float64.

        They lie on the rank's GPU if it is fast at float64, otherwise on the CPU.
        """
        device = self.ranks.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_DOUBLES:
            device = torch.device("cpu")
        return torch.from_numpy(self[part][name]).to(device)

    def __contains__(self, part: str) -> bool:
        """Whether a part was computed."""
        return part in self.parts

    def rare_combinations(self) -> list[Combination]:
        """Combinations of the part "rare", with counts that only rank 0 knows."""
        rows = self["rare"]["columns"].tolist()
        return [self.counts.of(tuple(i for i in row if i >= 0)) for row in rows]
