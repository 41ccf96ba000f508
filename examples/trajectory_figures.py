"""The figures and the animation of `trajectories.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from descents import THRESHOLD, Outcome
from landscapes import PLANES, Factorization
from matplotlib.animation import PillowWriter
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optaxplus.report.plots import loss_curves, trajectories

RELATIVE_ERROR = "‖A·B - M‖² / ‖M‖²"
# Panels of singular values in a row.
COLUMNS = 7
# How much of a path is seen in the animation, as a share of all steps.
TAIL = 0.08
DPI, GIF_DPI = 110, 64


def draw_losses(outcomes: Mapping[str, Outcome], ax: Axes, *, ylabel: str) -> None:
    """Draws losses over steps, and the line below which an optimizer has arrived."""
    losses = {name: run.losses for name, run in outcomes.items()}
    loss_curves(losses, log=True, ylabel=ylabel, legend=False, ax=ax)
    first = next(iter(losses.values()))[0]
    ax.axhline(THRESHOLD * first, color="grey", linewidth=0.9, zorder=1)
    text = ax.text(0.02, THRESHOLD * first, "a millionth of the first", fontsize=8)
    text.set(transform=ax.get_yaxis_transform(), va="bottom", zorder=4)
    text.set_bbox({"color": "white", "alpha": 0.7, "pad": 0.5})
    # From what is large to what is rounding: more would squeeze it.
    ax.set_ylim(0.02 * THRESHOLD * first, 5 * first)


def draw_planes(outcomes: Mapping[str, Mapping[str, Outcome]], path: Path) -> None:
    """Draws functions of a point: a row for each, with a panel for every optimizer."""
    rows, columns = len(outcomes), max(map(len, outcomes.values()))
    figure = Figure(figsize=(2.5 * columns + 4.5, 2.9 * rows), layout="constrained")
    axes = figure.subplots(
        rows, columns + 1, squeeze=False, width_ratios=[2.5] * columns + [4.0]
    )
    for (*panels, last), (name, runs) in zip(axes, outcomes.items(), strict=True):
        plane = PLANES[name]
        surface = plane.surface()
        for panel, (optimizer, run) in zip(panels, runs.items(), strict=True):
            trajectories(
                surface,
                {optimizer: run.params},
                minima=plane.minimum,
                ylabel="",
                legend=False,
                colorbar=False,
                ax=panel,
            )
            panel.set_title(f"{optimizer}, {run.settings}", fontsize=9)
        panels[0].set_ylabel(f"{plane.title}\ny")
        draw_losses(runs, last, ylabel="loss")
        last.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.supxlabel(
        "Paths from the circle to the star, the only minimum; markers after 1, 2, 5, "
        "10, 20, 50, … steps, a larger one at the end. A shade darker: √10 times the "
        "loss.",
        fontsize=10,
    )
    figure.savefig(path, dpi=DPI)


def draw_factorization(
    problem: Factorization, outcomes: Mapping[str, Outcome], path: Path
) -> None:
    """Draws the losses, and the singular values of A·B as they are learned."""
    rows = -(-len(outcomes) // COLUMNS)
    figure = Figure(figsize=(16, 4.5 + 2.8 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4.5, 2.8 * rows))
    axis = above.subplots()
    draw_losses(outcomes, axis, ylabel=RELATIVE_ERROR)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes = below.subplots(rows, COLUMNS, squeeze=False, sharex=True, sharey=True)
    panels = axes.flatten()
    for panel, (name, run) in zip(panels, outcomes.items(), strict=False):
        draw_spectrum(problem, run, panel)
        panel.set_title(f"{name}, {run.settings}", fontsize=9)
    for index, panel in enumerate(panels):
        # The last panel of every column has the numbers of the steps.
        panel.tick_params(labelbottom=index + COLUMNS >= len(outcomes))
        panel.set_visible(index < len(outcomes))
    below.supxlabel("step", fontsize=10)
    below.supylabel("singular value", fontsize=10)
    below.suptitle("The singular values of A·B; dotted, those of M: to be reached")
    figure.savefig(path, dpi=DPI)


def draw_spectrum(problem: Factorization, outcome: Outcome, ax: Axes) -> None:
    """Draws the singular values of A·B over steps, and those of M."""
    values = problem.singular_values(outcome.params)
    for index, curve in enumerate(values.T):
        ax.plot(curve, color=str(0.6 * index / len(values.T)), linewidth=1.0)
    wanted = np.linalg.svd(problem.target, compute_uv=False)[: problem.rank]
    for value in wanted:
        ax.axhline(value, color="#0072b2", linewidth=0.7, linestyle=":", zorder=1)
    ax.set(yscale="log", ylim=(0.3 * wanted[-1], 3 * wanted[0]))


def animate(
    planes: Mapping[str, Mapping[str, Outcome]],
    factorized: Mapping[str, Outcome],
    frames: int,
    path: Path,
) -> None:
    """Writes a GIF of the paths on the planes and of the factorization's losses.

    Args:
        planes: The outcomes on functions of a point, by name.
        factorized: Those on the factorization; may be empty.
        frames: How many pictures, the closer in time the nearer to the start.
        path: Where it goes.
    """
    count = len(planes) + bool(factorized)
    columns = 2 if count == 4 else count
    rows = count // columns
    figure = Figure(figsize=(6 * columns + 1, 4.8 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, columns, squeeze=False).flat)
    paths, losses = [], []
    for (name, runs), axis in zip(planes.items(), axes, strict=False):
        plane = PLANES[name]
        trajectories(
            plane.surface(),
            {key: run.params for key, run in runs.items()},
            minima=plane.minimum,
            title=plane.title,
            legend=False,
            ax=axis,
        )
        # Of every optimizer the path and the marker at its end, in turn.
        lines = axis.lines[: 2 * len(runs)]
        for line, end in zip(lines[::2], lines[1::2], strict=True):
            # None but in the legend.
            line.set_markevery(slice(0))
            paths.append((line, end, line.get_xydata()))
    if factorized:
        axis = next(axes)
        draw_losses(factorized, axis, ylabel=RELATIVE_ERROR)
        axis.set_title("matrix factorization")
        losses = [(line, line.get_xydata()) for line in axis.lines[: len(factorized)]]
    # The last has all optimizers that any has.
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    steps = max(len(points) for *_, points in (*paths, *losses)) - 1
    writer = PillowWriter(fps=10)
    with writer.saving(figure, str(path), dpi=GIF_DPI):
        for share in np.linspace(0, 1, frames):
            step = round(steps * share**2)
            figure.suptitle(f"step {step} of {steps}")
            for line, end, points in paths:
                line.set_data(*points[max(0, step - int(TAIL * steps)) : step + 1].T)
                end.set_data(*points[step : step + 1].T)
            for line, points in losses:
                line.set_data(*points[: step + 1].T)
            writer.grab_frame()
        # The end stays on view.
        for _ in range(frames // 5):
            writer.grab_frame()
