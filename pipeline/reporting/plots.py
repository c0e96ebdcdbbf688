"""Training curves and scatter plots as SVG. matplotlib draws them without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

GREY, BLUE, ORANGE, GREEN = "#94a3b8", "#2563eb", "#f59e0b", "#059669"
RUN_COLOURS = ("#2563eb", "#f59e0b", "#059669", "#db2777", "#7c3aed", "#0891b2", "#dc2626", "#65a30d")
SMALL, WIDE = (4.4, 2.7), (8.8, 4.2)  # inches
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#cbd5e1",
    "axes.labelcolor": "#64748b",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.6,
    "xtick.color": "#64748b",
    "ytick.color": "#64748b",
    "text.color": "#0f172a",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "cvae",
    "savefig.transparent": True,  # the page gives the ground
    "axes.formatter.useoffset": False,
    "path.simplify_threshold": 0.5,
    # Margins for a title, ticks and one label: to measure the text instead takes half of the time.
    "figure.subplot.left": 0.14,
    "figure.subplot.right": 0.97,
    "figure.subplot.bottom": 0.17,
    "figure.subplot.top": 0.9,
}
SOURCES = (  # prefix in metrics.jsonl, label, colour, line style
    ("train", "training batches", GREY, "-"),
    ("val_raw", "validation, last weights", ORANGE, "--"),
    ("val_ema", "validation, averaged weights", BLUE, "-"),
)
LOSS_PANELS = (  # metric, title, caption
    ("loss", "negative ELBO, nats", "nll + β KL per image; on validation β = 1"),
    ("nll", "reconstruction term, nats", "−log p(x|z, y) per image"),
    ("kl", "KL, nats", "KL(q(z|x, y) ‖ p(z|y)) per image"),
    ("bits_per_dim", "bits per dimension", "the loss per pixel value and grey level"),
)
LATER_PANELS = {  # of the phases that fit a part of the model
    "tune": (("loss", "loss, nats", "negative ELBO and the further terms per image"), *LOSS_PANELS[1:]),
    "refine": (("loss", "loss of the prior", "of codes of the frozen encoder"),),
    "steer": (("loss", "error of the control's scores", "squared, of all attributes, per code"),),
}
STEP_PANELS = (  # metric, title, caption, logarithmic
    ("lr", "learning rate", "learning rate of the optimizer", False),
    ("grad_norm", "gradient norm", "norm of the gradient of nats per dimension, before clipping", True),
    ("images_per_s", "images per second", "throughput of all ranks", False),
)


@dataclass(frozen=True)
class Series:
    """One line: steps and values [n], and its look."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    style: str = "-"


def series(records: list[dict[str, Any]], name: str, label: str, colour: str, style: str = "-") -> Series:
    """Return the finite values of one metric over the steps."""
    points = []
    for record in records:
        value = record["values"].get(name, math.nan)
        if math.isfinite(value):
            points.append((record["step"], value))
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return Series(label, steps, values, colour, style)


def panel(
    title: str,
    lines: list[Series],
    log: bool = False,
    from_zero: bool = False,
    band: tuple[Series, Series] | None = None,
) -> bytes:
    """Draw lines over the steps as a small SVG, with the area between the two series of `band`."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SMALL)
        axes = figure.add_subplot()
        if band:
            low, high = band
            look: Any = {"color": BLUE, "alpha": 0.15, "linewidth": 0, "label": low.label}
            axes.fill_between(low.steps, low.values, high.values, **look)
        for line in lines:
            marker = "." if len(line.steps) < 3 else ""
            look = {"color": line.colour, "label": line.label, "marker": marker}
            axes.plot(line.steps, line.values, line.style, **look)
        axes.set(title=title, xlabel="step", yscale="log" if log else "linear")
        if log:  # 0.1 instead of 10⁻¹, which takes as long as all the rest to draw
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        if not log and not band:
            axes.set_ylim(*_limits(lines))
        if from_zero:
            axes.set_ylim(bottom=0)
        if band or len(lines) > 1:
            axes.legend()
        return _svg(figure)


def scatter(panels: dict[str, np.ndarray], groups: dict[str, np.ndarray]) -> bytes:
    """Draw points [n, 2] side by side on equal axes as SVG.

    `groups` names the rows of each colour.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=WIDE, layout="constrained")
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for one, (title, points) in zip(axes, panels.items(), strict=True):
            for colour, (name, rows) in zip(RUN_COLOURS, groups.items(), strict=False):
                one.scatter(*points[rows].T, s=7, color=colour, label=name, alpha=0.7, linewidths=0)
            one.set(title=title, xticks=[], yticks=[])
        axes[0].legend(loc="best", markerscale=1.5)
        return _svg(figure)


def unit_curves(units: list[dict[str, Any]]) -> bytes:
    """Draw the nats of each latent unit, largest first, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SMALL)
        axes = figure.add_subplot()
        for key, colour, label in (
            ("information", BLUE, "information about the image"),
            ("kl", ORANGE, "KL from q to p(z|y)"),
        ):
            values = sorted((row[key] for row in units if row.get(key) is not None), reverse=True)
            if values:
                axes.plot(np.arange(1, len(values) + 1), values, color=colour, label=label)
        axes.set(title="nats per latent unit", xlabel="units, sorted", ylim=(0, None))
        axes.legend()
        return _svg(figure)


def training_panels(records: list[dict[str, Any]], phase: str = "train") -> Iterator[tuple[str, bytes]]:
    """Yield (caption, SVG) of everything that shows how a phase of the training went.

    Panels without data are left out.
    """
    for name, title, caption in LATER_PANELS.get(phase, LOSS_PANELS):
        lines = _from_all_sources(records, name)
        if lines:
            yield caption, panel(title, lines)
    sigma = _from_all_sources(records, "sigma")
    if sigma:
        caption = "decoder standard deviation beside the root of the batch's MSE, pixels in [−1, 1]"
        yield caption, panel("σ*", [*_root_mse(records), *sigma])
    units = _from_all_sources(records, "active_units")
    if units:
        yield "latent units whose posterior mean moves with the image", panel("active units", units)
    yield from _log_det_panel(records)
    for name, title, caption, log in STEP_PANELS:
        line = series(records, f"train/{name}", name, GREEN)
        if len(line.steps):
            wide = bool(0 < 10 * line.values.min() < line.values.max())
            yield caption, panel(title, [line], log=log and wide, from_zero=not log)


def _from_all_sources(records: list[dict[str, Any]], name: str) -> list[Series]:
    """The lines of one metric in training and validation, as far as there are values."""
    lines = []
    for prefix, label, colour, style in SOURCES:
        line = series(records, f"{prefix}/{name}", label, colour, style)
        if len(line.steps):
            lines.append(line)
    return lines


def _root_mse(records: list[dict[str, Any]]) -> list[Series]:
    line = series(records, "train/mse", "√MSE of the batch", ORANGE, ":")
    if not len(line.steps):
        return []
    return [replace(line, values=2 * np.sqrt(line.values))]  # [0, 1] -> [-1, 1]


def _log_det_panel(records: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """The flow's log-determinant; nothing without a flow."""
    low = series(records, "val_ema/log_det_min", "smallest to largest", BLUE)
    mean = series(records, "val_ema/log_det_mean", "mean", BLUE)
    high = series(records, "val_ema/log_det_max", "smallest to largest", BLUE)
    if len(mean.steps) and np.any(high.values != low.values):
        caption = "log |det ∂f/∂z| of the flow prior on validation images"
        yield caption, panel("log-determinant, nats", [mean], band=(low, high))


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _limits(lines: list[Series]) -> tuple[float | None, float | None]:
    """Limits of the y axis that cut off the first steps, which are hundreds of times too high."""
    values = np.concatenate([line.values for line in lines])
    low, high = values.min(), np.quantile(values, 0.97)
    if values.max() - high <= high - low:
        return None, None
    margin = 0.08 * (high - low)
    return low - margin, high + margin
