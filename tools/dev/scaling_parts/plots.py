"""The two plots of docs/operations/scaling.md."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.reporting.plots import BLUE, GREEN, GREY, ORANGE, STYLE
from tools.dev.scaling_parts.model import Costs, Network, busy, rate, step

SHARES = {16: GREY, 128: BLUE, 1024: GREEN}  # images of a GPU, and the line's colour
BATCHES = {1024: GREY, 8192: BLUE, 65536: GREEN}  # global batches
SHARE = 128  # of the bars
RANKS = tuple(2**i for i in range(11))
PARTS = {
    "compute": BLUE,
    "gradients": ORANGE,
    "sums": "#db2777",
    "checkpoint": GREEN,
    "validation": GREY,
}


def ranks_plot(costs: Costs, network: Network, marked: Sequence[int]) -> bytes:
    """Draw how busy a GPU is at a fixed share, and the speed of all at a fixed global batch."""
    return _svg(2, lambda axes: _draw_ranks(axes[0], axes[1], costs, network, marked))


def _draw_ranks(left: Any, right: Any, costs: Costs, network: Network, marked: Sequence[int]) -> None:
    for share, colour in SHARES.items():
        values = [busy(costs, network, ranks, share) for ranks in RANKS]
        left.plot(RANKS, values, color=colour, label=f"{share:,} images a GPU")
    left.set(title="Share of the step that computes", xlabel="GPUs", ylim=(0, 1.05))
    for batch, colour in BATCHES.items():
        ranks = [n for n in RANKS if n <= batch]
        values = [rate(costs, network, n, batch) for n in ranks]
        right.plot(ranks, values, color=colour, label=f"global batch {batch:,}")
    right.set(title="Images per second of all GPUs", xlabel="GPUs", yscale="log")
    for axis, place in ((left, "lower left"), (right, "upper left")):
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, *marked], [str(n) for n in (1, *marked)])
        axis.legend(loc=place)
    low, high = right.get_ylim()
    right.set_ylim(low, 20 * high)


def parts_plot(modes: dict[str, Costs], network: Network, marked: Sequence[int]) -> bytes:
    """Draw the parts of a step as stacked bars, for each number of GPUs."""
    return _svg(len(modes), lambda axes: _draw_parts(axes, modes, network, marked))


def _draw_parts(axes: Any, modes: dict[str, Costs], network: Network, marked: Sequence[int]) -> None:
    names = [str(ranks) for ranks in (1, *marked)]
    for axis, (mode, costs) in zip(axes, modes.items(), strict=True):
        made = [step(costs, network, ranks, SHARE) for ranks in (1, *marked)]
        bottom = [0.0] * len(made)
        for part, colour in PARTS.items():
            heights = [1e3 * getattr(one, part) for one in made]
            axis.bar(names, heights, 0.6, bottom, color=colour, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.set(title=f"{mode}, {SHARE} images a GPU", xlabel="GPUs", ylabel="ms a step")
        axis.set_ylim(0, 1.35 * max(bottom))
        axis.grid(False, axis="x")
        axis.set_axisbelow(True)
        axis.legend(loc="upper left", ncols=3)


def _svg(columns: int, draw: Callable[[Any], None]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, columns, figsize=(4.4 * columns, 3.0), layout="constrained")
        draw(axes)
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return file.getvalue()
