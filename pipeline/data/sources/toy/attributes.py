"""Attributes of toy faces, with CelebA's marginals and correlations, by a Gaussian copula."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

# Share of positive labels in the official annotations (202,599 images), in official order.
MARGINALS: dict[str, float] = {
    "5_o_Clock_Shadow": 0.111, "Arched_Eyebrows": 0.267, "Attractive": 0.513, "Bags_Under_Eyes": 0.205,
    "Bald": 0.022, "Bangs": 0.152, "Big_Lips": 0.241, "Big_Nose": 0.235, "Black_Hair": 0.239,
    "Blond_Hair": 0.148, "Blurry": 0.051, "Brown_Hair": 0.205, "Bushy_Eyebrows": 0.142, "Chubby": 0.058,
    "Double_Chin": 0.047, "Eyeglasses": 0.065, "Goatee": 0.063, "Gray_Hair": 0.042, "Heavy_Makeup": 0.387,
    "High_Cheekbones": 0.455, "Male": 0.417, "Mouth_Slightly_Open": 0.483, "Mustache": 0.042,
    "Narrow_Eyes": 0.115, "No_Beard": 0.835, "Oval_Face": 0.284, "Pale_Skin": 0.043, "Pointy_Nose": 0.277,
    "Receding_Hairline": 0.080, "Rosy_Cheeks": 0.066, "Sideburns": 0.057, "Smiling": 0.482,
    "Straight_Hair": 0.208, "Wavy_Hair": 0.320, "Wearing_Earrings": 0.189, "Wearing_Hat": 0.048,
    "Wearing_Lipstick": 0.472, "Wearing_Necklace": 0.123, "Wearing_Necktie": 0.073, "Young": 0.774,
}  # fmt: skip
NAMES: tuple[str, ...] = tuple(MARGINALS)
HAIR_COLOURS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
EXCLUSIVE = (  # at most one attribute of each group holds
    HAIR_COLOURS,
    ("Straight_Hair", "Wavy_Hair"),
    ("Bangs", "Receding_Hairline"),
)
EXCLUDED_BY = {
    "No_Beard": ("Goatee", "Mustache", "Sideburns"),
    "Bald": (*HAIR_COLOURS, "Bangs", "Straight_Hair", "Wavy_Hair", "Receding_Hairline", "Sideburns"),
}


def sample_attributes(noise: np.ndarray) -> np.ndarray:
    """Turn standard normal `noise` [N, 40] into attributes, bool [N, 40].

    Each row is a function of its own noise alone. Attribute a holds if coordinate a of N(0, R) lies
    below the normal quantile of its marginal; R is fitted to the frequencies of all pairs. Impossible
    combinations are then repaired: there is one hair colour, and nothing grows on a bald head.
    """
    factor, threshold = _copula()
    margin = threshold - noise @ factor.T  # the attribute holds if this is positive; the larger, the clearer
    present = margin > 0
    for group in EXCLUSIVE:
        members = [NAMES.index(name) for name in group]
        clearest = margin[:, members].max(axis=1, keepdims=True)
        present[:, members] &= margin[:, members] == clearest
    for name, excluded in EXCLUDED_BY.items():
        members = [NAMES.index(other) for other in excluded]
        present[:, members] &= ~present[:, NAMES.index(name), None]
    return present


@cache
def _copula() -> tuple[np.ndarray, np.ndarray]:
    """Return the Cholesky factor [40, 40] of the correlations, and the thresholds [40]."""
    rows = Path(__file__).with_name("correlations.txt").read_text(encoding="ascii").splitlines()[1:]
    correlation = np.eye(len(NAMES))
    for i, row in enumerate(rows, 1):
        correlation[i, :i] = correlation[:i, i] = np.array(row.split(), dtype=float) / 100
    return np.linalg.cholesky(correlation), np.array([NormalDist().inv_cdf(p) for p in MARGINALS.values()])
