"""Use a trained model: draw faces with attributes, reconstruct, edit and interpolate images.

Images go in and come out as uint8 [n, S, S, 3]. Attributes are given by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cvae.control import AttributeControl
from cvae.distributions import Distribution
from cvae.io import Card, nearest
from cvae.model import CVAE

BATCH = 64  # images that pass through the networks together
UNKNOWN = 0.5  # value of an attribute that is not known

Request = Mapping[str, int]  # attribute name -> 1 (present) or 0 (absent)


class RequestError(ValueError):
    """A request that the model cannot serve; the message says what it can."""


def parse_request(text: str) -> dict[str, int]:
    """Read "Male,Heavy_Makeup,!Smiling" or "Male=1,Smiling=0". Raises RequestError."""
    request = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = word.partition("=")
        if not equals:
            value = "0" if word.startswith("!") else "1"
            name = word.removeprefix("!")
        if value not in ("0", "1"):
            raise RequestError(f"request {word!r}: expected NAME, !NAME, NAME=1 or NAME=0")
        request[name.strip()] = int(value)
    return request


class Model:
    """An exported model; `cvae.load` makes it.

    Wherever `attributes` describe given images, they are names with values for all images, or a
    tensor [n, A] with values from 0 to 1 in the order of `Model.attributes`. What they leave out
    counts as unknown, y = 0.5. Describe the images if you can: the model was trained with attributes.
    """

    def __init__(self, net: CVAE, card: Card, device: str = "cpu") -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.card = card
        self.device = torch.device(device)

    @property
    def attributes(self) -> list[str]:
        """The names that the model reads."""
        return self.card.attributes

    @property
    def size(self) -> int:
        """The side S of the images, pixels."""
        return self.card.size

    @property
    def can_be_guided(self) -> bool:
        """Whether `guidance` and `strength` may differ from 1."""
        prior = self.net.prior(torch.full((1, len(self.attributes)), UNKNOWN, device=self.device))
        return type(prior).guided is not Distribution.guided

    def sample(
        self,
        request: Request,
        n: int = 16,
        seed: int = 0,
        temperature: float = 1.0,
        guidance: float | None = None,
        start: int = 0,
        margin: float | None = None,
    ) -> Tensor:
        """Draw images [n, S, S, 3] that show the request.

        Attributes that it does not name come from training images; see `labels`. The noise is
        scaled by `temperature`. With `guidance` g, the prior follows the request g times as closely.
        With a `margin`, codes are moved until they show the named attributes that clearly; 1 is an
        average image. Without these two, the model draws as it was evaluated (`card.sampling`).
        Image i depends on the seed and on `start` + i, not on n. Raises RequestError.
        """
        y = self.labels(request, n, seed, start)
        return self.draw(y, seed, temperature, guidance, start, margin, named=request)

    def labels(self, request: Request, n: int = 16, seed: int = 0, start: int = 0) -> Tensor:
        """Return the attributes [n, A] of the images that `sample` draws.

        Each image takes them from a training image of `complete`, which the seed and its number pick.
        """
        if n < 1:
            raise RequestError(f"n: got {n}, expected at least 1")
        rows = self.complete(request)
        _, picked = self._keyed(seed, range(start, start + n), len(rows))
        return rows[picked]

    @torch.no_grad()
    def draw(
        self,
        y: Tensor,
        seed: int = 0,
        temperature: float = 1.0,
        guidance: float | None = None,
        start: int = 0,
        margin: float | None = None,
        named: Iterable[str] | None = None,
    ) -> Tensor:
        """Draw one image for each row of attributes y [n, A], from 0 to 1: [n, S, S, 3].

        Image i has the noise of image `start` + i of `sample`. A `margin` acts on the attributes `named`.
        Without names, one that is given acts on all, and the usual one is left out. Raises RequestError.
        """
        shape = (len(y), len(self.attributes))
        if y.shape != shape or not len(y):
            raise RequestError(f"y: got {list(y.shape)}, expected [n, {len(self.attributes)}]")
        usual = self.card.sampling
        guidance = usual.guidance if guidance is None else guidance
        if margin is None:  # rows of numbers name nothing, as in the evaluation
            margin = 0.0 if named is None else usual.margin
        noise, _ = self._keyed(seed, range(start, start + len(y)), 1)
        asked = torch.full(shape, UNKNOWN)
        columns = list(self._wanted(dict.fromkeys(self.attributes if named is None else named, 1)))
        asked[:, columns] = y[:, columns].float()

        def block(y: Tensor, noise: Tensor, asked: Tensor) -> Tensor:
            prior = self.net.prior(y)
            if guidance != 1.0:
                unconditional = self.net.prior(torch.full_like(y, UNKNOWN))
                prior = self._guided(prior, unconditional, "guidance", guidance)
            z = prior.sample(temperature * noise)
            if margin:
                z = self._control("margin", margin).obey(z, asked, margin)
            return self.net.decode(z, y)

        return _levels(self._blocks(block, y.float(), noise, asked))

    def complete(self, request: Request) -> Tensor:
        """Return rows of attributes [M, A] that carry the request.

        These are the label rows of training images that carry all of it. If there is none, they are
        those that carry most of it. The named attributes are then set, and attributes that exclude
        one of them are unset, unless they are named too. Raises RequestError.
        """
        wanted = self._wanted(request)
        rows, carried = self._carriers(wanted)
        return rows if carried == len(wanted) else self._changed(rows, wanted)

    def origin(self, request: Request) -> str:
        """Say in words where the attributes come from that the request does not name."""
        wanted = self._wanted(request)
        rows, carried = self._carriers(wanted)
        stored = f"{len(rows):,} of {len(self.card.rows):,} stored training images"
        if not wanted:
            return f"all attributes come from {len(rows):,} stored training images"
        if carried == len(wanted):
            return f"attributes that are not named come from {stored}, which carry the request"
        share = f"no stored training image carries the request; {len(rows):,} of {len(self.card.rows):,}"
        return f"{share} carry {carried} of its {len(wanted)} attributes and lend the others"

    def _carriers(self, wanted: dict[int, int]) -> tuple[Tensor, int]:
        """Return the label rows that carry most of the wanted attributes, and how many these are."""
        rows = self.card.rows.float()
        values = torch.tensor(list(wanted.values()), dtype=rows.dtype)
        carried = (rows[:, list(wanted)] == values).sum(1)
        most = int(carried.max())
        return rows[carried == most], most

    @torch.no_grad()
    def encode(self, images: Any, attributes: Request | Tensor | None = None) -> Tensor:
        """Return the mean code z [n, D] of images."""
        x = self._images(images)
        y = self._described(attributes, len(x))
        return torch.cat([code.cpu() for code in self._blocks(self._code, x, y)])

    @torch.no_grad()
    def reconstruct(self, images: Any, attributes: Request | Tensor | None = None) -> Tensor:
        """Encode images and decode their mean codes."""
        x = self._images(images)
        y = self._described(attributes, len(x))
        return _levels(self._blocks(lambda some, its: self.net.decode(self._code(some, its), its), x, y))

    @torch.no_grad()
    def edit(
        self,
        images: Any,
        request: Request,
        attributes: Request | Tensor | None = None,
        strength: float | None = None,
    ) -> Tensor:
        """Change attributes of images and keep the rest; `strength` is that of `card.sampling` by default.

        Decoding the code z with other attributes would change little, because z carries everything. A
        model with an attribute control moves z until each changed attribute has `strength` times the
        score of an average image, or, if the run was steered, is `strength` deviations beyond the decision of
        classifiers. Without a control, the code keeps its noise: u = noise(z; y),
        z' = sample(u; y'), and the difference between y and y' acts `strength` times as strongly.
        A named attribute that is unknown counts as the opposite before the edit. Attributes that exclude
        a new one are unset. Raises RequestError.
        """
        wanted = self._wanted(request)
        strength = self.card.sampling.strength if strength is None else strength
        x = self._images(images)
        before = self._described(attributes, len(x))
        for column, value in wanted.items():
            unknown = before[:, column] == UNKNOWN
            before[unknown, column] = 1.0 - value
        after = self._changed(before, wanted)

        def change(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
            if self.net.control is not None:
                z = self.net.control.edit(self._code(x, y), y, new, strength)
                return self.net.decode(z, new)
            prior, new_prior = self.net.prior(y), self.net.prior(new)
            try:
                noise = prior.to_noise(self._code(x, y))
            except ValueError as error:
                raise RequestError(f"edit: {error}; use a model with another prior") from None
            if strength != 1.0:
                new_prior = self._guided(new_prior, prior, "strength", strength)
            return self.net.decode(new_prior.sample(noise), new)

        return _levels(self._blocks(change, x, before, after))

    @torch.no_grad()
    def interpolate(
        self, a: Any, b: Any, steps: int = 8, attributes: Request | Tensor | None = None
    ) -> Tensor:
        """Go from each image of `a` to that of `b`, evenly in z: [n, steps, S, S, 3]."""
        first, last = self.encode(a, attributes), self.encode(b, attributes)
        if len(first) != len(last):
            raise RequestError(f"interpolate: got {len(first)} and {len(last)} images, expected as many")
        if steps < 2:
            raise RequestError(f"steps: got {steps}, expected at least 2")
        t = torch.linspace(0, 1, steps)[None, :, None]
        z = torch.lerp(first[:, None], last[:, None], t).flatten(0, 1)
        y = self._described(attributes, len(first)).repeat_interleave(steps, 0)
        images = _levels(self._blocks(self.net.decode, z, y))
        return images.unflatten(0, (len(first), steps))

    # ---- parts

    def _code(self, images: Tensor, y: Tensor) -> Tensor:
        """Return the mean code [b, D] of uint8 images [b, S, S, 3]."""
        return self.net.encode(_floats(images), y).mean

    def _blocks(self, function: Callable[..., Tensor], *tensors: Tensor) -> Iterator[Tensor]:
        """Call `function` on blocks of the rows of `tensors`, on the device."""
        for i in range(0, len(tensors[0]), BATCH):
            block = [tensor[i : i + BATCH].to(self.device) for tensor in tensors]
            yield function(*block)

    def _keyed(self, seed: int, numbers: Iterable[int], rows: int) -> tuple[Tensor, list[int]]:
        """Return noise [b, D] and positions of label rows; each depends on seed and number alone."""
        noise = []
        picked = []
        for number in numbers:
            digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            noise.append(torch.randn(self.net.z_dim, generator=generator))
            picked.append(int(torch.randint(rows, (1,), generator=generator)))
        return torch.stack(noise), picked

    def _guided(self, prior: Distribution, free: Distribution, name: str, value: float) -> Distribution:
        try:
            return prior.guided(free, value)
        except ValueError:
            kind = self.card.model.prior.name
            raise RequestError(
                f"{name}: got {value}, expected 1, because the prior {kind!r} cannot be guided;"
                " a run refined with refine.prior.name=flow_matching can"
            ) from None

    def _control(self, name: str, value: float) -> AttributeControl:
        if self.net.control is None:
            raise RequestError(
                f"{name}: got {value}, expected 0, because the model has no attribute control;"
                " a run refined with refine.prior.control=true has one"
            )
        return self.net.control

    def _wanted(self, request: Request) -> dict[int, int]:
        """Return {column: 0 or 1}; a misspelt name is refused with the nearest one."""
        wanted = {}
        for name, value in request.items():
            if name not in self.attributes:
                listed = f"; the model reads {', '.join(self.attributes)}"
                hint = nearest(str(name), self.attributes) or listed
                raise RequestError(f"attribute {name!r}: is unknown{hint}")
            if value not in (0, 1):
                raise RequestError(f"attribute {name!r}: got {value!r}, expected 1 (present) or 0 (absent)")
            wanted[self.attributes.index(name)] = int(value)
        return wanted

    def _changed(self, rows: Tensor, wanted: dict[int, int]) -> Tensor:
        """Set the wanted attributes in a copy of rows [M, A], and unset what excludes them."""
        rows = rows.clone()
        named = {self.attributes[column] for column in wanted}
        present = {self.attributes[column] for column, value in wanted.items() if value}
        for group in self.card.exclusive:
            for name in set(group) - named:
                if present & set(group) and name in self.attributes:
                    rows[:, self.attributes.index(name)] = 0
        for column, value in wanted.items():
            rows[:, column] = value
        return rows

    def _described(self, attributes: Request | Tensor | None, n: int) -> Tensor:
        """Return the attributes of given images [n, A]; unknown ones are UNKNOWN."""
        shape = (n, len(self.attributes))
        if isinstance(attributes, Tensor):
            if attributes.shape != shape:
                raise RequestError(
                    f"attributes: got a tensor of shape {list(attributes.shape)}, expected {list(shape)}"
                )
            return attributes.detach().cpu().float().clone()
        y = torch.full(shape, UNKNOWN)
        for column, value in self._wanted(attributes or {}).items():
            y[:, column] = value
        return y

    def _images(self, images: Any) -> Tensor:
        """Return images as a tensor uint8 [n, S, S, 3]; arrays are read through their buffer."""
        expected = f"expected uint8 [n, {self.size}, {self.size}, 3]; tools/edit.py cuts and resizes a photo"
        if not isinstance(images, Tensor):
            try:
                view = memoryview(images)
            except TypeError:
                raise RequestError(f"images: got {type(images).__name__}, {expected}") from None
            shape_given = view.shape or ()
            if view.format != "B" or not view.nbytes:
                raise RequestError(f"images: got format {view.format!r}, shape {shape_given}, {expected}")
            images = torch.frombuffer(bytearray(view.tobytes()), dtype=torch.uint8).view(shape_given)
        shape = (self.size, self.size, 3)
        if images.dtype != torch.uint8 or images.shape[1:] != shape or not len(images):
            raise RequestError(f"images: got {images.dtype} {list(images.shape)}, {expected}")
        return images


def _floats(images: Tensor) -> Tensor:
    """uint8 [n, S, S, 3] -> [n, 3, S, S] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def _levels(blocks: Iterable[Tensor]) -> Tensor:
    """Blocks of images [b, 3, S, S] in [-1, 1] -> uint8 [n, S, S, 3] on the CPU."""
    rounded = [block.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).cpu() for block in blocks]
    return torch.cat(rounded).permute(0, 2, 3, 1).contiguous()
