"""Flips of one attribute, on decisions that are set by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.evaluation.metrics.control import AttributeFlip

NAMES = ["Male", "Smiling", "Young"]


def evidence(
    features: np.ndarray, image: list[int], attribute: list[int], asked: np.ndarray, real: np.ndarray
):
    """Features are the decisions themselves, as 0 and 1."""
    parts = {
        "flips": {
            "features": features,
            "image": np.array(image),
            "attribute": np.array(attribute),
            "asked": asked[np.array(image)],
        },
        "real": {"fd_classifier": real},
    }
    classifier = SimpleNamespace(attributes=NAMES, decide=lambda rows: rows > 0.5)
    info = SimpleNamespace(attributes=NAMES)
    found = SimpleNamespace(classifier=classifier, info=info, requested=asked)
    return type("Parts", (SimpleNamespace,), {"__getitem__": lambda self, part: parts[part]})(**vars(found))


def test_success_counts_images_that_were_right_and_side_effects_the_others():
    asked = np.array([[0, 0, 1], [1, 0, 1]], dtype=np.uint8)
    before = asked.copy()
    before[1, 0] = 0  # image 1 asked for Male and was not seen as Male: not counted
    toggled = [[1, 0, 1], [0, 1, 1]]  # image 0 flips Male; image 1 changes Smiling, which nobody asked for
    features = np.array([before[0], toggled[0], before[1], toggled[1]], dtype=np.float64)
    real = np.array([[1, 0, 1], [1, 0, 1]], dtype=np.float64)  # the classifier sees Male everywhere
    found = dict(AttributeFlip()(evidence(features, [0, 0, 1, 1], [-1, 0, -1, 0], asked, real)))
    assert found["attribute_flip"].value == 1.0 and found["attribute_flip"].n == 1
    assert found["attribute_flip"].ceiling == 1.0  # image 0 becomes Male; real men are all recognised
    assert found["attribute_flip_side_effects"].value == pytest.approx(1 / 4)
    (row,) = found["attribute_flips"]
    assert row["attribute"] == "Male" and row["images"] == 2 and row["toggled"] == 1
