"""Use a trained model: draw faces with attributes, reconstruct, edit and interpolate images.

Images go in and come out as uint8 [n, S, S, 3]. Attributes are given by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cvae.anomaly import draw_again
from cvae.attributes import UNKNOWN
from cvae.control import AttributeControl
from cvae.distributions import Distribution
from cvae.io import Card
from cvae.model import CVAE
from cvae.request import Attributes, Request, RequestError, Requests

BATCH = 64  # images that pass through the networks together


class Model:
    """An exported model; `cvae.load` makes it.

    Wherever `attributes` describe given images, they are names with values for all images, or a
    tensor [n, A] with values from 0 to 1 in the order of `Model.attributes`. What they leave out
    counts as unknown, y = 0.5. Describe the images if you can: the model was trained with attributes.
    """

    def __init__(self, net: CVAE, card: Card, device: str = "cpu") -> None:
        self.net = net.to(device).eval().requires_grad_(False)
        self.card = card
        self.requests = Requests(card)
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
        """Whether `guidance` may differ from 1."""
        prior = self.net.prior(torch.full((1, len(self.attributes)), UNKNOWN, device=self.device))
        return type(prior).guided is not Distribution.guided

    @property
    def has_control(self) -> bool:
        """Whether an attribute control edits codes; without one an edit keeps the noise."""
        return self.net.control is not None

    @property
    def takes_strength(self) -> bool:
        """Whether the `strength` of an edit may differ from 1."""
        return self.has_control or self.can_be_guided

    def sample(
        self,
        request: Request,
        n: int = 16,
        seed: int = 0,
        temperature: float = 1.0,
        guidance: float | None = None,
        start: int = 0,
        margin: float | None = None,
        tries: int | None = None,
    ) -> Tensor:
        """Draw images [n, S, S, 3] that show the request.

        Attributes that it does not name come from training images; see `labels`. The noise is
        scaled by `temperature`. With `guidance` g, the prior follows the request g times as closely.
        With a `margin`, codes are moved until they show the named attributes that clearly; 1 is an
        average image. An anomalous image is drawn again; `tries` times are the most. Without these three,
        the model draws as it was evaluated (`card.sampling`). Image i depends on the seed and on
        `start` + i, not on n. Raises RequestError.
        """
        y = self.labels(request, n, seed, start)
        return self.draw(y, seed, temperature, guidance, start, margin, request, tries)

    def labels(self, request: Request, n: int = 16, seed: int = 0, start: int = 0) -> Tensor:
        """Return the attributes [n, A] of the images that `sample` draws.

        Each image takes them from a training image of `Requests.complete`, picked by the seed and its number.
        """
        if n < 1:
            raise RequestError(f"n: got {n}, expected at least 1")
        rows = self.requests.complete(request)
        _, picked = self._keyed(seed, range(start, start + n), len(rows), 1)
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
        tries: int | None = None,
    ) -> Tensor:
        """Draw one image for each row of attributes y [n, A], from 0 to 1: [n, S, S, 3].

        Image i has the noise of image `start` + i of `sample`, and `tries` as there. A `margin` acts on the
        attributes `named`. Without names, one that is given acts on all, and the usual one is left out.
        Raises RequestError.
        """
        shape = (len(y), len(self.attributes))
        if y.shape != shape or not len(y):
            raise RequestError(f"y: got {list(y.shape)}, expected [n, {len(self.attributes)}]")
        usual = self.card.sampling
        guidance = usual.guidance if guidance is None else guidance
        tries = self._tries(usual.tries if tries is None else tries)
        if margin is None:  # rows of numbers name nothing, as in the evaluation
            margin = 0.0 if named is None else usual.margin
        noise, _ = self._keyed(seed, range(start, start + len(y)), 1, tries)
        asked = torch.full(shape, UNKNOWN)
        acting = dict.fromkeys(self.attributes if named is None else named, 1)
        columns = list(self.requests.wanted(acting))
        asked[:, columns] = y[:, columns].float()

        def block(y: Tensor, noise: Tensor, asked: Tensor) -> Tensor:
            def code(noise: Tensor, rows: Tensor) -> Tensor:
                with self._guidance("guidance", guidance):
                    prior = self.net.guided_prior(y[rows], guidance)
                z = prior.sample(temperature * noise)
                return self._control("margin", margin).obey(z, asked[rows], margin) if margin else z

            _, z = draw_again(noise, code, lambda z, rows: self.net.anomaly_of(z, y[rows]))
            return self.net.decode(z, y)

        return _levels(self._blocks(block, y.float(), noise, asked))

    @torch.no_grad()
    def encode(self, images: Any, attributes: Attributes = None) -> Tensor:
        """Return the mean code z [n, D] of images."""
        x = self._images(images)
        y = self.requests.described(attributes, len(x))
        return torch.cat([code.cpu() for code in self._blocks(self._code, x, y)])

    @torch.no_grad()
    def reconstruct(self, images: Any, attributes: Attributes = None) -> Tensor:
        """Encode images and decode their mean codes."""
        x = self._images(images)
        y = self.requests.described(attributes, len(x))
        return _levels(self._blocks(lambda some, its: self.net.decode(self._code(some, its), its), x, y))

    @torch.no_grad()
    def edit(
        self,
        images: Any,
        request: Request,
        attributes: Attributes = None,
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
        wanted = self.requests.wanted(request)
        strength = self.card.sampling.strength if strength is None else strength
        x = self._images(images)
        before = self.requests.described(attributes, len(x))
        for column, value in wanted.items():
            unknown = before[:, column] == UNKNOWN
            before[unknown, column] = 1.0 - value
        after = self.requests.changed(before, wanted)

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
                with self._guidance("strength", strength):
                    new_prior = new_prior.guided(prior, strength)
            return self.net.decode(new_prior.sample(noise), new)

        return _levels(self._blocks(change, x, before, after))

    @torch.no_grad()
    def interpolate(self, a: Any, b: Any, steps: int = 8, attributes: Attributes = None) -> Tensor:
        """Go from each image of `a` to that of `b`, evenly in z: [n, steps, S, S, 3]."""
        first, last = self.encode(a, attributes), self.encode(b, attributes)
        if len(first) != len(last):
            raise RequestError(f"interpolate: got {len(first)} and {len(last)} images, expected as many")
        if steps < 2:
            raise RequestError(f"steps: got {steps}, expected at least 2")
        t = torch.linspace(0, 1, steps)[None, :, None]
        z = torch.lerp(first[:, None], last[:, None], t).flatten(0, 1)
        y = self.requests.described(attributes, len(first)).repeat_interleave(steps, 0)
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

    def _tries(self, number: int) -> int:
        """Return how often a sample is drawn at most. Raises RequestError unless the model can tell."""
        if number < 1:
            raise RequestError(f"tries: got {number}, expected at least 1")
        if number > 1 and self.net.anomaly is None:
            raise RequestError(
                f"tries: got {number}, expected 1, because this model has no anomaly score;"
                " a run refined with refine.prior.anomaly=true has one"
            )
        return number

    def _keyed(self, seed: int, numbers: Iterable[int], rows: int, tries: int) -> tuple[Tensor, list[int]]:
        """Return noise [b, tries, D] and positions of label rows; both depend on seed and number alone."""
        noise = []
        picked = []
        for number in numbers:
            digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            first = torch.randn(1, self.net.z_dim, generator=generator)
            picked.append(int(torch.randint(rows, (1,), generator=generator)))
            # After the pick, so that the first try and the labels do not depend on their number.
            noise.append(torch.cat((first, torch.randn(tries - 1, self.net.z_dim, generator=generator))))
        return torch.stack(noise), picked

    @contextmanager
    def _guidance(self, name: str, value: float) -> Iterator[None]:
        try:
            yield
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
