"""Training curves as SVG, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

GREY, BLUE, ORANGE, GREEN = "#94a3b8", "#2563eb", "#f59e0b", "#059669"
RUN_COLOURS = ("#2563eb", "#f59e0b", "#059669", "#db2777", "#7c3aed", "#0891b2", "#dc2626", "#65a30d")
STYLE: Any = {
    "font.family": "sans-serif", "font.size": 9, "axes.edgecolor": "#cbd5e1", "axes.labelcolor": "#64748b", "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e2e8f0", "grid.linewidth": 0.6, "xtick.color": "#64748b", "ytick.color": "#64748b",
    "text.color": "#0f172a", "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.4,
    "svg.fonttype": "none", "svg.hashsalt": "cvae", "axes.formatter.useoffset": False, "path.simplify_threshold": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line: steps and values [n], and how it looks."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    style: str = "-"


def series(records: list[dict[str, Any]], name: str, label: str, colour: str, style: str = "-") -> Series:
    """The finite values of one metric over the steps."""
    points = [
        (r["step"], r["values"][name]) for r in records if math.isfinite(r["values"].get(name, math.nan))
    ]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return Series(label, steps, values, colour, style)


def panel(
    title: str,
    lines: list[Series],
    log: bool = False,
    from_zero: bool = False,
    band: tuple[Series, Series] | None = None,
) -> bytes:
    """One small drawing of some lines over the steps, with the area between the two of `band`; SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.add_subplot()
        if band:
            axes.fill_between(
                band[0].steps,
                band[0].values,
                band[1].values,
                color=BLUE,
                alpha=0.15,
                linewidth=0,
                label=band[0].label,
            )
        for line in lines:
            axes.plot(
                line.steps,
                line.values,
                line.style,
                color=line.colour,
                label=line.label,
                marker="." if len(line.steps) < 3 else "",
            )
        axes.set(title=title, xlabel="step", yscale="log" if log else "linear")
        if not log and not band:
            axes.set_ylim(*_limits(lines))
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(lines) + bool(band) > 1:
            axes.legend()
        return _svg(figure)


def scatter(panels: dict[str, np.ndarray], groups: dict[str, np.ndarray]) -> bytes:
    """Points [n, 2] side by side on the same axes; `groups`: which rows have which colour; SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.8, 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for one, (title, points) in zip(axes, panels.items(), strict=True):
            for colour, (name, rows) in zip(RUN_COLOURS, groups.items(), strict=False):
                one.scatter(*points[rows].T, s=7, color=colour, label=name, alpha=0.7, linewidths=0)
            one.set(title=title, xticks=[], yticks=[])
        axes[0].legend(loc="best", markerscale=1.5)
        return _svg(figure)


def unit_curves(units: list[dict[str, Any]]) -> bytes:
    """Nats of each latent unit, largest first; SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
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


def _svg(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _limits(lines: list[Series]) -> tuple[float | None, float | None]:
    """Limits that the first steps of a training, hundreds of times off, do not flatten the rest with."""
    values = np.concatenate([line.values for line in lines])
    low, high = values.min(), np.quantile(values, 0.97)
    if values.max() - high <= high - low:
        return None, None
    margin = 0.08 * (high - low)
    return low - margin, high + margin


def training_panels(records: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
    """(caption, SVG) of everything that tells how a training went; panels without data are left out."""
    both = (("train", "training batches", GREY, "-"), ("val_raw", "validation, last weights", ORANGE, "--"))
    everywhere = (*both, ("val_ema", "validation, averaged weights", BLUE, "-"))

    def lines(name: str) -> list[Series]:
        return [
            s
            for where, label, *look in everywhere
            if len((s := series(records, f"{where}/{name}", label, *look)).steps)
        ]

    for name, title, caption in (
        ("loss", "negative ELBO, nats", "nll + β KL per image; on validation β = 1"),
        ("nll", "reconstruction term, nats", "−log p(x|z, y) per image"),
        ("kl", "KL, nats", "KL(q(z|x, y) ‖ p(z|y)) per image"),
        ("bits_per_dim", "bits per dimension", "the loss per pixel value and grey level"),
    ):
        if lines(name):
            yield caption, panel(title, lines(name))
    if sigma := lines("sigma"):
        yield (
            "decoder standard deviation beside the root of the batch's MSE, pixels in [−1, 1]",
            panel("σ*", [*_root_mse(records), *sigma]),
        )
    if units := lines("active_units"):
        yield "latent units whose posterior mean moves with the image", panel("active units", units)
    low, mean, high = (
        series(records, f"val_ema/log_det_{k}", "smallest to largest", BLUE) for k in ("min", "mean", "max")
    )
    if len(mean.steps) and np.any(high.values != low.values):
        caption = "log |det ∂f/∂z| of the flow prior on validation images"
        yield (
            caption,
            panel("log-determinant, nats", [Series("mean", mean.steps, mean.values, BLUE)], band=(low, high)),
        )
    for name, title, caption, log in (
        ("lr", "learning rate", "learning rate of the optimizer", False),
        ("grad_norm", "gradient norm", "norm of the gradient of nats per dimension, before clipping", True),
        ("images_per_s", "images per second", "throughput of all ranks", False),
    ):
        line = series(records, f"train/{name}", name, GREEN)
        if len(line.steps):
            yield caption, panel(title, [line], log and bool(np.all(line.values > 0)), from_zero=not log)


def _root_mse(records: list[dict[str, Any]]) -> list[Series]:
    mse = series(records, "train/mse", "√MSE of the batch", ORANGE, ":")
    return (
        [Series(mse.label, mse.steps, 2 * np.sqrt(mse.values), mse.colour, mse.style)]
        if len(mse.steps)
        else []
    )  # [0, 1] -> [-1, 1]
