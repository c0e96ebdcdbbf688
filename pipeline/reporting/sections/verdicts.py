"""What the numbers of an evaluation mean: one sentence for each question that a reader has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.reporting.text import number, percent
from pipeline.rundir.headline import HEADLINES, standing_for
from pipeline.rundir.record import Evaluation

FEW_IMAGES = 1000  # below it, intervals are too wide to rank good models
STILL_FALLING = 0.01  # of the whole fall of the loss, in the last fifth of the training


@dataclass(frozen=True)
class Verdict:
    """A question, its answer in a word, the sentence behind it, and whether it is good, fair or poor."""

    question: str
    answer: str
    text: str
    mood: str


@dataclass(frozen=True)
class Reading:
    """One of the six numbers with its interval and its two references."""

    key: str
    label: str
    metric: str
    value: float
    interval: list[float] | None
    floor: float | None
    ceiling: float | None
    floor_name: str
    ceiling_name: str

    def share(self, value: float) -> float | None:
        """Place a value between floor (0) and ceiling (1); None without both.

        A Fréchet distance is a square, so its root is placed.
        """
        if self.floor is None or self.ceiling is None or self.floor == self.ceiling:
            return None
        ends = [self.floor, value, self.ceiling]
        if self.key == "distance":
            ends = [math.sqrt(max(0.0, end)) for end in ends]
        low, middle, high = ends
        return min(1.0, max(0.0, (middle - low) / (high - low)))

    @property
    def reached(self) -> float | None:
        """The place of the value itself."""
        return self.share(self.value)


def readings(evaluation: Evaluation) -> list[Reading]:
    """Return those of the six headline numbers that the evaluation has."""
    found = []
    for headline in HEADLINES:
        name = standing_for(headline, [evaluation])
        if name:
            about = evaluation.about.get(name, {})
            found.append(
                Reading(
                    key=headline.key,
                    label=headline.label,
                    metric=name,
                    value=evaluation.metrics[name],
                    interval=evaluation.intervals.get(name),
                    floor=evaluation.floors.get(name),
                    ceiling=evaluation.ceilings.get(name),
                    floor_name=about.get("floor_name", "knowing nothing"),
                    ceiling_name=about.get("ceiling_name", "real images"),
                )
            )
    return found


def verdicts(evaluation: Evaluation, records: list[dict[str, Any]]) -> list[Verdict]:
    """Answer every question that the evaluation's numbers allow, and say what to do next."""
    by_key = {reading.key: reading for reading in readings(evaluation)}
    answers = [
        *_is_it_sharp(by_key.get("sharpness"), by_key.get("distance")),
        *_does_it_obey(by_key.get("obedience"), by_key.get("control")),
        *_is_it_diverse(by_key.get("diversity"), evaluation),
        *_has_it_memorised(by_key.get("memorised")),
    ]
    return [*answers, _next(answers, evaluation, records)]


def _is_it_sharp(edges: Reading | None, distance: Reading | None) -> Iterator[Verdict]:
    if edges is None:
        return
    text = f"Samples have {percent(edges.value)} of the edges of real images."
    if distance:
        text += f" Their distance to real images is {number(distance.value)}"
        if distance.ceiling is not None and distance.floor is not None:
            text += f", between {number(distance.ceiling)} ({distance.ceiling_name})"
            text += f" and {number(distance.floor)} ({distance.floor_name})"
        text += "."
    if edges.value > 1.15:
        yield Verdict("Is it sharp?", "Too sharp.", f"{text} More edges than real ones mean noise.", "fair")
        return
    answer, mood = _graded(edges.value, (0.85, "Yes."), (0.5, "A little soft."), "No, blurred.")
    yield Verdict("Is it sharp?", answer, text, mood)


def _does_it_obey(obeyed: Reading | None, control: Reading | None) -> Iterator[Verdict]:
    if obeyed is None:
        return
    text = f"The classifier finds {percent(obeyed.value)} of the attributes as asked for"
    if obeyed.ceiling is not None and obeyed.floor is not None:
        text += f"; real images reach {percent(obeyed.ceiling)}, chance {percent(obeyed.floor)}"
    text += "."
    if control:
        text += f" Toggling one attribute takes effect in {percent(control.value)} of the samples."
    shares = [reading.reached for reading in (obeyed, control) if reading is not None]
    known = [share for share in shares if share is not None]
    worst = min(known) if known else obeyed.value
    answer, mood = _graded(worst, (0.8, "Yes."), (0.45, "In part."), "Hardly.")
    yield Verdict("Does it obey?", answer, text, mood)


def _is_it_diverse(recall: Reading | None, evaluation: Evaluation) -> Iterator[Verdict]:
    if recall is None:
        return
    best = recall.ceiling or 1.0
    text = f"Samples reach {percent(recall.value)} of the real images"
    if recall.ceiling is not None:
        text += f"; {recall.ceiling_name} reach {percent(recall.ceiling)}"
    text += "."
    spread = evaluation.metrics.get("group_diversity")
    if spread is not None:
        text += f" Among samples of equal requests the spread is {percent(spread)} of the real one."
    answer, mood = _graded(recall.value / best, (0.8, "Yes."), (0.4, "In part."), "No.")
    yield Verdict("Is it diverse?", answer, text, mood)


def _has_it_memorised(copies: Reading | None) -> Iterator[Verdict]:
    if copies is None:
        return
    share, usual = copies.value, copies.ceiling or 0.01
    low = copies.interval[0] if copies.interval else share
    text = f"{percent(share)} of the samples are as close to a training image as a copy would be"
    text += f"; of real held-out images it is {percent(usual)}."
    if low <= usual:
        yield Verdict("Has it memorised?", "No.", text, "good")
    elif share < 5 * usual:
        yield Verdict("Has it memorised?", "A little.", f"{text} Look at the nearest images.", "fair")
    else:
        yield Verdict("Has it memorised?", "Yes.", f"{text} Look at the nearest images.", "poor")


def _next(answers: list[Verdict], evaluation: Evaluation, records: list[dict[str, Any]]) -> Verdict:
    """The most useful next step."""
    worst = {verdict.question: verdict.mood for verdict in answers if verdict.mood != "good"}
    poor = [question for question, mood in worst.items() if mood == "poor"] or list(worst)
    if still_falling(records):
        text = "The loss was still falling at the end: raise train.images and launch the same run again."
        return Verdict("What next?", "Train longer.", text, "fair")
    if poor and poor[0] in ADVICE:
        answer, text = ADVICE[poor[0]]
        return Verdict("What next?", answer, text, "fair")
    n = int(evaluation.protocol.get("n", 0))
    if n < FEW_IMAGES:
        text = f"{n} images tell good models apart only roughly: evaluate again with a larger eval.n."
        return Verdict("What next?", "Measure more.", text, "fair")
    text = "Nothing stands out: compare variants over several seeds with a sweep."
    return Verdict("What next?", "Compare.", text, "good")


ADVICE = {
    "Is it sharp?": (
        "Sharpen.",
        "Add the stages tune and refine: the configurations sharp and best show how.",
    ),
    "Does it obey?": (
        "Strengthen the request.",
        "Refine the prior by flow matching, then raise eval.guidance or eval.edit_strength.",
    ),
    "Is it diverse?": (
        "Fit the prior.",
        "Add the stage refine, and look whether drawn and encoded z cover the same regions.",
    ),
    "Has it memorised?": (
        "Use more images.",
        "Train on more images or less long, and check the nearest training images by eye.",
    ),
}


def still_falling(records: list[dict[str, Any]]) -> bool:
    """Whether the validation loss of the main training fell until its end."""
    losses = []
    for record in records:
        value = record["values"].get("val_ema/loss", math.nan)
        if math.isfinite(value):
            losses.append(value)
    if len(losses) < 5:
        return False
    late = losses[-1 - len(losses) // 5]
    return late - losses[-1] > STILL_FALLING * (losses[0] - losses[-1]) > 0


def _graded(value: float, good: tuple[float, str], fair: tuple[float, str], poor: str) -> tuple[str, str]:
    """Return the answer and the mood of a value that is better the higher it is."""
    if value >= good[0]:
        return good[1], "good"
    return (fair[1], "fair") if value >= fair[0] else (poor, "poor")
