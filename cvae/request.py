"""Requests: attributes by name, and the rows of attributes y that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cvae.attributes import UNKNOWN
from cvae.io import Card, nearest

Request = Mapping[str, int]  # attribute name -> 1 (present) or 0 (absent)
Attributes = Any  # of given images: one request for all, or rows [N, A] as a tensor or an array


class RequestError(ValueError):
    """A request that the model cannot serve; the message says what it can."""


def parse_request(text: str) -> dict[str, int]:
    """Read "Male,Heavy_Makeup,!Smiling" or "Male=1,Smiling=0". Raises RequestError."""
    request: dict[str, int] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = word.partition("=")
        if not equals:
            value = "0" if word.startswith("!") else "1"
            name = word.removeprefix("!")
        if value not in ("0", "1"):
            raise RequestError(f"request {word!r}: expected NAME, !NAME, NAME=1 or NAME=0")
        if request.setdefault(name.strip(), int(value)) != int(value):
            raise RequestError(f"request {text!r}: asks for {name.strip()} and for its opposite")
    return request


class Requests:
    """Reads requests to one model and completes them with label rows of its training images."""

    def __init__(self, card: Card) -> None:
        self.names = card.attributes  # in the model's order
        self.exclusive = card.exclusive  # groups of which an image has at most one attribute
        self.rows = card.rows  # attributes of training images, uint8 [N, A]

    def complete(self, request: Request) -> Tensor:
        """Return rows of attributes [M, A] that carry the request.

        These are the label rows of training images that carry all of it. If there is none, they are
        those that carry most of it. The named attributes are then set, and attributes that exclude
        one of them are unset, unless they are named too. Raises RequestError.
        """
        wanted = self.wanted(request)
        rows, carried = self._carriers(wanted)
        return rows if carried == len(wanted) else self.changed(rows, wanted)

    def origin(self, request: Request) -> str:
        """Say in words where the attributes come from that the request does not name."""
        wanted = self.wanted(request)
        rows, carried = self._carriers(wanted)
        stored = f"{len(rows):,} of {len(self.rows):,} stored training images"
        if not wanted:
            return f"all attributes come from {len(rows):,} stored training images"
        if carried == len(wanted):
            return f"attributes that are not named come from {stored}, which carry the request"
        share = f"no stored training image carries the request; {len(rows):,} of {len(self.rows):,}"
        return f"{share} carry {carried} of its {len(wanted)} attributes and lend the others"

    def wanted(self, request: Request) -> dict[int, int]:
        """Return {column: 0 or 1}; a misspelt name is refused with the nearest one."""
        wanted = {}
        for name, value in request.items():
            if name not in self.names:
                listed = f"; the model reads {', '.join(self.names)}"
                hint = nearest(str(name), self.names) or listed
                raise RequestError(f"attribute {name!r}: is unknown{hint}")
            if value not in (0, 1):
                raise RequestError(f"attribute {name!r}: got {value!r}, expected 1 (present) or 0 (absent)")
            wanted[self.names.index(name)] = int(value)
        return wanted

    def changed(self, rows: Tensor, wanted: dict[int, int]) -> Tensor:
        """Set the wanted attributes in a copy of rows [M, A], and unset what excludes them."""
        rows = rows.clone()
        named = {self.names[column] for column in wanted}
        present = {self.names[column] for column, value in wanted.items() if value}
        for group in self.exclusive:
            for name in set(group) - named:
                if present & set(group) and name in self.names:
                    rows[:, self.names.index(name)] = 0
        for column, value in wanted.items():
            rows[:, column] = value
        return rows

    def described(self, attributes: Attributes, n: int) -> Tensor:
        """Return the attributes of given images [n, A]; unknown ones are UNKNOWN."""
        shape = (n, len(self.names))
        if attributes is not None and not isinstance(attributes, Mapping):
            rows = torch.as_tensor(attributes)
            if rows.shape != shape:
                raise RequestError(
                    f"attributes: got rows of shape {list(rows.shape)}, expected {list(shape)}"
                )
            return rows.detach().cpu().float().clone()
        y = torch.full(shape, UNKNOWN)
        for column, value in self.wanted(attributes or {}).items():
            y[:, column] = value
        return y

    def _carriers(self, wanted: dict[int, int]) -> tuple[Tensor, int]:
        """Return the label rows that carry most of the wanted attributes, and how many these are."""
        rows = self.rows.float()
        values = torch.tensor(list(wanted.values()), dtype=rows.dtype)
        carried = (rows[:, list(wanted)] == values).sum(1)
        most = int(carried.max())
        return rows[carried == most], most
