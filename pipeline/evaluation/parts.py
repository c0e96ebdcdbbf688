"""The parts of the evidence: features and scores of real images, reconstructions and samples.

Every function here is a collective: all ranks call it together. A new part is a function and its
line in PARTS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.data.loader import to_float
from pipeline.evaluation.features import Features
from pipeline.evaluation.importance import importance_weighted_bound
from pipeline.evaluation.reference import reference_features, reference_key
from pipeline.evaluation.subject import Rows, Subject, edges
from pipeline.runtime.split import spread

MOST_TOGGLED = 20  # attributes that are toggled, the most frequent ones
ENOUGH = 0.9  # of n images, to compare another set with the n real ones
MOST_COMBINATIONS = 64  # rows of the message in which rank 0 tells its choice


def real(subject: Subject) -> Rows:
    """Features of the n real images; on a cache hit only rank 0 has rows."""
    return _split_features(subject, subject.settings.split)


def train(subject: Subject) -> Rows:
    """Features of n training images; on a cache hit only rank 0 has rows."""
    return _split_features(subject, "train")


def others(subject: Subject) -> Rows:
    """Features of n images of the other held-out split; on a cache hit only rank 0 has rows.

    Neither the model nor the classifier was trained on them, so they show what real images reach. There
    are no rows if that split has fewer than 90 % of n images: a distance of few images is too large.
    """
    split = "val" if subject.settings.split == "test" else "test"
    enough = len(subject.positions(split)) >= ENOUGH * subject.n
    return _split_features(subject, split) if enough else {}


def memory(subject: Subject) -> Rows:
    """The `neighbour_features` of training images that the model may have memorised."""
    shards, extractor = subject.splits["train"], neighbour_features(subject)
    key = reference_key(shards, "train", subject.memory_n, subject.settings.block, extractor, subject.crop)
    return {extractor.metric: _cached(subject, "train", key, extractor)}


def neighbour_features(subject: Subject) -> Features:
    """Return the extractor whose features tell which images are near to each other.

    The classifier was trained on the training images, so its features show them differently from others.
    Any other extractor is preferred.
    """
    others = [extractor for extractor in subject.extractors if extractor.metric != "fd_classifier"]
    return (others or subject.extractors)[0]


def mean_image(subject: Subject) -> Rows:
    """The mean of n training images: features [1, F] and "mse" [n] on the [0, 1] scale."""
    shards, positions, block = subject.splits["train"], subject.positions("train"), subject.settings.block
    total = np.zeros(())
    for start in range(0, len(positions), block):
        images, _ = shards.gather(positions[start : start + block])
        total = total + images.sum(0, dtype=np.float64)
    mean = to_float(torch.from_numpy(total[None] / len(positions)).to(subject.ranks.device))

    def rows(indices: np.ndarray) -> dict[str, Tensor]:
        return {"mse": subject.mse(subject.images(indices), mean)}

    features = {name: x.cpu().numpy() for name, x in subject.features(mean).items()}
    return features | subject.map(rows, subject.n)


def reconstructions(subject: Subject) -> Rows:
    """Decoded posterior means: features, errors, edges and the moments of q.

    "mse" [n] is on the [0, 1] scale. "edges" and "real_edges" [n] belong to both images. "mean" and
    "variance" [n, D] are those of q.
    """

    def rows(indices: np.ndarray) -> dict[str, Tensor]:
        x, decoded, q = subject.reconstruct(indices)
        measured = {"mse": subject.mse(x, decoded), "edges": edges(decoded), "real_edges": edges(x)}
        moments = {"mean": q.mean, "variance": (2 * q.log_std).exp()}
        return subject.features(decoded) | measured | moments

    return subject.map(rows, subject.n)


def latents(subject: Subject) -> Rows:
    """Latents "encoded" ~ q(z|x,y) and "drawn" ~ p(z|y) [n, D], with log p(z|y) of both, nats.

    "drawn" follow the guidance; densities are those of the prior as it was fitted, which guidance does not
    keep. "log_det" is log|det df/dz| of the flow at "drawn" [n]; 0 without a flow.
    """

    def rows(indices: np.ndarray) -> dict[str, Tensor]:
        y = subject.condition(subject.requested[indices])
        fitted = subject.model.prior(y)
        posterior = subject.model.encode(subject.images(indices), y)
        encoded = posterior.sample(subject.noise("encoded", indices))
        drawn = subject.prior(y).sample(subject.noise("samples", indices))
        return {
            "encoded": encoded,
            "drawn": drawn,
            "log_p_encoded": fitted.log_prob(encoded),
            "log_p_drawn": fitted.log_prob(drawn),
            "log_det": fitted.log_det(drawn),
        }

    return subject.map(rows, subject.n)


def samples(subject: Subject) -> Rows:
    """Features and "edges" of one sample for each requested row of attributes."""
    return _sample(subject, "samples", subject.requested)


def rare(subject: Subject) -> Rows:
    """The classifier's features of `rare_samples` samples [K * m, F] for each of K rare combinations.

    "columns" [K, 3] names the attributes of each combination, -1 for none. "combination" [K * m]
    numbers each sample's combination.
    """
    chosen = _combinations(subject)
    each = subject.settings.rare_samples
    found: list[Rows] = []
    for row in chosen.tolist():
        names = tuple(subject.info.attributes[i] for i in row if i >= 0)
        if each and len(subject.splits[subject.settings.split]):
            found.append(_named(subject, names, subject.requests(names, each)))
    joined = {name: np.concatenate([rows[name] for rows in found]) for name in (found[0] if found else ())}
    numbers = np.repeat(np.arange(len(found)), each)
    return joined | {"columns": chosen, "combination": numbers}


def flips(subject: Subject) -> Rows:
    """Samples of the same noise, before and after one attribute of the request is toggled.

    "features" [N, 512] are the classifier's. "image" [N] and "attribute" [N] number the image and the
    toggled attribute, -1 for none. "asked" [N, A] is the request before.
    """
    return _toggled(subject, subject.flip)


def edits(subject: Subject) -> Rows:
    """Real images carried to a request in which one attribute is toggled; rows as in `flips`."""
    return _toggled(subject, subject.edit)


def log_likelihood(subject: Subject) -> Rows:
    """Importance-weighted bound on log p(x|y) of `iw_images` images, nats [m].

    "iw" uses the model's own decoder variance. If that variance was not fitted, "iw_fitted" uses
    SSE / (N P) of the training images.
    """
    variances = {"iw": subject.info.s2}
    if subject.info.s2_fit != subject.info.s2:
        variances["iw_fitted"] = subject.info.s2_fit
    chosen = spread(min(subject.n, subject.settings.iw_images), subject.n)

    def rows(block: np.ndarray) -> dict[str, Tensor]:
        indices = chosen[block]
        x, y = subject.images(indices), subject.condition(subject.requested[indices])
        noise = subject.noise("importance", indices, subject.settings.iw_samples).transpose(0, 1)
        return {
            name: importance_weighted_bound(subject.model, x, y, noise, s2) for name, s2 in variances.items()
        }

    return subject.map(rows, len(chosen))


PARTS: dict[str, Callable[[Subject], Rows]] = {
    "real": real,
    "train": train,
    "others": others,
    "memory": memory,
    "mean_image": mean_image,
    "reconstructions": reconstructions,
    "latents": latents,
    "samples": samples,
    "rare": rare,
    "flips": flips,
    "edits": edits,
    "log_likelihood": log_likelihood,
}


def reference_keys(subject: Subject, split: str) -> list[dict[str, Any]]:
    """Keys of the cached features of a split, one per extractor."""
    shards, n = subject.splits[split], len(subject.positions(split))
    block, crop = subject.settings.block, subject.crop
    return [reference_key(shards, split, n, block, extractor, crop) for extractor in subject.extractors]


def _split_features(subject: Subject, split: str) -> Rows:
    keys = reference_keys(subject, split)
    return {
        extractor.metric: _cached(subject, split, key, extractor)
        for extractor, key in zip(subject.extractors, keys, strict=True)
    }


def _cached(subject: Subject, split: str, key: dict[str, Any], extractor: Features) -> np.ndarray:
    shards = subject.splits[split]
    return reference_features(subject.reference_dir, shards, key, extractor, subject.ranks, subject.watch)


def _sample(subject: Subject, purpose: str, labels: np.ndarray) -> Rows:
    def rows(indices: np.ndarray) -> dict[str, Tensor]:
        x = subject.draw(purpose, indices, labels[indices])
        return subject.features(x) | {"edges": edges(x)}

    return subject.map(rows, len(labels))


def _named(subject: Subject, attributes: tuple[str, ...], labels: np.ndarray) -> Rows:
    def rows(indices: np.ndarray) -> dict[str, Tensor]:
        x = subject.draw_named(attributes, indices, labels[indices])
        return {"fd_classifier": subject.classifier_features(x)}

    return subject.map(rows, len(labels))


def _toggled(subject: Subject, change: Callable[[np.ndarray, np.ndarray, np.ndarray], Tensor]) -> Rows:
    """Apply `change` to `flip_images` images: as they are, and with each frequent attribute toggled."""
    images = spread(min(subject.n, subject.settings.flip_images), subject.n)
    columns = np.concatenate(([-1], subject.frequent(MOST_TOGGLED)))
    image = np.repeat(images, len(columns))
    attribute = np.tile(columns, len(images))
    asked = subject.requested[image]
    wanted = asked.copy()
    toggled = np.flatnonzero(attribute >= 0)
    wanted[toggled, attribute[toggled]] ^= 1

    def rows(block: np.ndarray) -> dict[str, Tensor]:
        changed = change(image[block], asked[block], wanted[block])
        return {"features": subject.classifier_features(changed)}

    found = subject.map(rows, len(image)) if len(image) else {"features": np.zeros((0, 512), np.float32)}
    return found | {"image": image, "attribute": attribute, "asked": asked}


def _combinations(subject: Subject) -> np.ndarray:
    """The rarest pairs, then triples, then the data set's showcase, as columns padded with -1 [K, 3 or more].

    Rank 0 chooses, because only rank 0 has read the annotations, and sends its choice to all ranks.
    """
    names = subject.info.attributes
    # Columns are sent plus one, so that 0 means "none" and the sum over ranks is rank 0's message.
    width = max(3, *map(len, subject.showcase), 0)
    message = torch.zeros((MOST_COMBINATIONS, width), dtype=torch.float64, device=subject.ranks.device)
    if subject.ranks.is_main:
        found = [*subject.counts.rare(2), *subject.counts.rare(3)]
        for case in subject.showcase:
            columns = tuple(names.index(name) for name in case)
            if set(columns) not in map(set, found):  # else it is drawn and counted already
                found.append(columns)
        for row, combination in zip(message, found, strict=False):
            row[: len(combination)] = 1 + torch.tensor(combination)
    chosen = subject.ranks.reduce_sum(message).cpu().numpy().astype(np.int64) - 1
    return chosen[chosen[:, 0] >= 0]
