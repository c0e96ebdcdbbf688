"""Metrics of control: does one attribute of the request change what it names, and nothing else?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.metrics.base import Metric, Value
from pipeline.evaluation.metrics.statistics import finite, wilson


class AttributeFlip(Metric):
    """Samples of the same noise, with one attribute of the request toggled at a time.

    A flip succeeds if the classifier's decision on that attribute toggles too. Counted are images on
    which the decision was right before. Side effects are the share of the classifier's other decisions
    that change. The ceiling is how often the classifier finds the wanted value in real images that
    have it. The floor is 0: the same noise and the same request give the same image.
    """

    needs = ("real", "flips")
    part, prefix = "flips", "attribute_flip"
    what = "samples of the same noise with one attribute of the request toggled"

    def __call__(self, evidence: Evidence) -> Iterator[tuple[str, Any]]:
        """Yield <prefix>, <prefix>_side_effects and the table <prefix>s."""
        rows = flip_rows(evidence, self.part)
        if not rows:
            return
        counted = [row for row in rows if row["n"]]
        sides = [row["side_effects"] for row in rows if row["side_effects"] is not None]
        ceilings = [row["ceiling"] for row in counted if row["ceiling"] is not None]
        n = sum(row["n"] for row in counted)
        success = float(np.mean([row["success"] for row in counted])) if counted else np.nan
        toggled = sum(row["toggled"] for row in counted)
        pooled_low, pooled_high = wilson(toggled, n)
        pooled = toggled / n if n else np.nan
        yield (
            self.prefix,
            Value(
                value=success,
                direction="higher",
                meaning=f"share of {self.what} whose decision toggles, mean over {len(counted)} attributes",
                n=n,
                interval=(success + pooled_low - pooled, success + pooled_high - pooled),
                ceiling=float(np.mean(ceilings)) if ceilings else None,
                floor=0.0,
                over_read_attributes=True,
            ),
        )
        yield (
            f"{self.prefix}_side_effects",
            Value(
                value=float(np.mean(sides)) if sides else np.nan,
                direction="lower",
                meaning=f"share of the other decisions that change with {self.what}",
                n=sum(row["images"] for row in rows),
                floor=None,
                over_read_attributes=True,
            ),
        )
        yield f"{self.prefix}s", rows


class EditFlip(AttributeFlip):
    """The same for real images: encode, carry the code to the other request, decode.

    The code goes through the prior, u = noise(z; y) and z' = sample(u; y'), because a code decoded with
    another request barely changes: z carries everything.
    """

    needs = ("real", "edits")
    part, prefix = "edits", "edit_flip"
    what = "edited real images with one attribute toggled"


def flip_rows(evidence: Evidence, part: str) -> list[dict[str, Any]]:
    """Return one row per toggled attribute, from the decisions on images before and after."""
    rows = evidence[part]
    if not len(rows["attribute"]):
        return []
    names = evidence.info.attributes
    judged = [evidence.classifier.attributes.index(name) for name in names]
    decided = evidence.classifier.decide(rows["features"])
    first = rows["attribute"] < 0
    before = dict(zip(rows["image"][first].tolist(), decided[first], strict=True))
    decided_real = evidence.classifier.decide(evidence["real"]["fd_classifier"])
    found = []
    for k in np.unique(rows["attribute"][~first]):
        chosen = rows["attribute"] == k
        images = rows["image"][chosen]
        after = decided[chosen]
        was = np.stack([before[i] for i in images.tolist()])
        asked = rows["asked"][chosen][:, k].astype(bool)
        column = judged[k]
        right = was[:, column] == asked
        toggled = right & (after[:, column] != was[:, column])
        others = np.delete(after != was, column, axis=1)
        n = int(right.sum())
        found.append(
            {
                "attribute": names[k],
                "images": len(images),
                "n": n,
                "toggled": int(toggled.sum()),
                "success": finite(toggled.sum() / n) if n else None,
                "ceiling": _ceiling(evidence, decided_real[:, column], k, asked[right]),
                "side_effects": finite(others.mean()) if others.size else None,
            }
        )
    return found


def _ceiling(evidence: Evidence, decided: np.ndarray, k: int, asked: np.ndarray) -> float | None:
    """Share of real images with the wanted value of attribute k in which the classifier finds it."""
    labels = evidence.requested[:, k].astype(bool)
    recalls = []
    for wanted in (False, True):
        there = labels == wanted
        recalls.append(float((decided[there] == wanted).mean()) if there.any() else np.nan)
    wanted_recalls = np.where(asked, recalls[0], recalls[1])  # a flip asks for the other value
    return finite(float(wanted_recalls.mean())) if len(wanted_recalls) else None
