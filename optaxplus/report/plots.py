"""Figures of training runs: losses, trajectories, singular values, memory.

Every function takes plain data, returns a `matplotlib.figure.Figure` and saves it if it
is given a `path`. With `ax` it draws into axes of yours. The same data give the same
bytes in PNG, SVG and PDF, whatever style matplotlib is set to; nothing global changes.
Curves differ by line and marker, bars by hatching: no figure needs its colours.

matplotlib comes with `pip install optaxplus[plot]`, and is imported when a function is
called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from optaxplus import validation
from optaxplus.report.figures import (
    Canvas,
    curve_style,
    escaped,
    part_style,
    spaced_marks,
    styled,
)
from optaxplus.report.memory import MemoryReport
from optaxplus.report.plot_data import (
    byte_counts,
    check_finite,
    check_names,
    check_path,
    grid_and_values,
    numbers,
    points_in_plane,
    positions_of,
    spectrum,
)
from optaxplus.report.tables import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["loss_curves", "memory_bars", "singular_values", "trajectories"]

# Where float32 rounds, relative to the largest: smaller singular values are noise.
_SMALLEST_RATIO = 1e-8
# Shades of a function, and the lowest that is told apart, relative to the highest.
_LEVELS = 13
_LOWEST_LEVEL = 1e-6
# Where paths have markers.
_MARKED_STEPS = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
# Share of the longest bar that its number of bytes fits into.
_WIDE_ENOUGH = 0.13


def loss_curves(
    losses: Mapping[str, ArrayLike],
    steps: ArrayLike | Mapping[str, ArrayLike] | None = None,
    *,
    reference: Mapping[str, float] | None = None,
    crop_start: float = 0.0,
    log: bool = False,
    xlabel: str = "step",
    ylabel: str = "loss",
    title: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draws losses over steps, with their spread over seeds.

    Of several runs the median is a curve, and everything between the lowest and the
    highest is shaded. A loss that is not finite counts as the highest; where that is
    the median, or the only one, the curve has a gap, and the legend says from where.

    Args:
      losses: Name -> the losses of one run, (points,), or of several, (runs, points).
      steps: Where the points are, increasing or not: (points,) for all names alike, or
        name -> (points,). None counts from 0. In any unit, if `xlabel` says it: time,
        tokens.
      reference: Name -> a loss that is drawn as a horizontal line.
      crop_start: Share of every curve, from its first point, that the y axis need not
        show, in [0, 1): the first losses would squeeze the part that matters.
      log: Whether the y axis is logarithmic.
      xlabel: What `steps` are, with their unit.
      ylabel: What the losses are, with their unit.
      title: Of the axes.
      legend: Whether there is one.
      ax: Axes to draw into; None makes a figure.
      path: Where to save the whole figure: a name that ends in .png, .svg or .pdf.

    Returns:
      The figure.

    Raises:
      ImportError: If matplotlib is missing.
      TypeError: If an argument has a wrong type.
      ValueError: If there is nothing to draw, a shape is wrong, lengths differ, names
        are missing, or `path` has another ending.

    Example:
      >>> from optaxplus.report import plots
      >>> losses = {"adamw": [3.0, 2.5, 2.2], "muon": [[3.0, 2.3, 2.0], [3.1, 2.4, 2]]}
      >>> figure = plots.loss_curves(losses, steps=[0, 100, 200], ylabel="loss (nats)")
      >>> [line.get_label() for line in figure.axes[0].lines]
      ['adamw', 'muon (median, range of 2 runs)']
    """
    name = "loss_curves"
    with styled(name):
        check_path(name, path)
        check_names(name, "losses", losses)
        validation.check_below_one(name, crop_start=crop_start)
        validation.check_flag(name, log=log, legend=legend)
        shapes = {1: "(points,)", 2: "(runs, points)"}
        curves = {
            key: np.atleast_2d(numbers(name, f"losses[{key!r}]", value, shapes))
            for key, value in losses.items()
        }
        lengths = {key: runs.shape[1] for key, runs in curves.items()}
        positions = positions_of(name, steps, lengths)
        lines = _references(name, reference)
        canvas = Canvas.on(name, ax, size=(6.4, 4.2))
        shown = list(lines.values())
        for index, (key, runs) in enumerate(curves.items()):
            style = curve_style(index, len(curves))
            style["markevery"] = spaced_marks(index, len(curves), lengths[key])
            # A run that has diverged is the worst of them.
            ranked = np.where(np.isfinite(runs), runs, np.inf)
            median = np.median(ranked, axis=0)
            finite = np.isfinite(median)
            label = escaped(key) + _of_runs(ranked) + _until(positions[key], finite)
            drawn = np.where(finite, median, np.nan)
            canvas.axes.plot(positions[key], drawn, label=label, **style)
            if len(runs) > 1:
                shade = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
                edges = ranked.min(axis=0), ranked.max(axis=0)
                canvas.axes.fill_between(positions[key], *edges, **shade)
            shown += runs[:, int(crop_start * lengths[key]) :].flat
        for key, value in lines.items():
            canvas.axes.axhline(
                value, color="grey", linewidth=0.9, label=escaped(key), zorder=1
            )
        canvas.label(xlabel, ylabel, title)
        canvas.fit(np.array(shown), log=log)
        return canvas.finish(legend, len(curves) + len(lines), path)


def trajectories(
    surface: Sequence[ArrayLike],
    iterates: Mapping[str, ArrayLike],
    *,
    minima: ArrayLike | None = None,
    xlabel: str = "x",
    ylabel: str = "y",
    value_label: str = "loss",
    title: str | None = None,
    legend: bool = True,
    colorbar: bool = True,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draws the paths of optimizers over the contours of a function of two parameters.

    The shades of the function are equally spaced in the logarithm if it is nowhere
    negative. A path starts at a circle, has markers after 1, 2, 5, 10, 20, 50, … steps,
    and ends at a larger one. The legend says which end outside of the frame, which is
    that of `surface`, and from which step on one is not finite.

    Args:
      surface: (x, y, values): x of shape (columns,), y of shape (rows,), both
        increasing, and the function there, of shape (rows, columns).
      iterates: Name -> the parameters after every step, (steps + 1, 2).
      minima: Where the function is smallest, (2,) or (points, 2): drawn as stars.
      xlabel: What the first parameter is.
      ylabel: What the second parameter is.
      value_label: What the function is, with its unit.
      title: Of the axes.
      legend: Whether there is one.
      colorbar: Whether there is one for the shades.
      ax: Axes to draw into; None makes a figure.
      path: Where to save the whole figure: a name that ends in .png, .svg or .pdf.

    Returns:
      The figure.

    Raises:
      ImportError: If matplotlib is missing.
      TypeError: If an argument has a wrong type.
      ValueError: If there is nothing to draw, a shape is wrong, lengths differ, the
        function is constant, or `path` has another ending.

    Example:
      >>> import numpy as np
      >>> from optaxplus.report import plots
      >>> x = y = np.linspace(-1, 1, 50)
      >>> bowl = x**2 + 10 * y[:, None] ** 2
      >>> path = np.array([[0.9, 0.8], [0.5, -0.3], [0.2, 0.1]])
      >>> figure = plots.trajectories((x, y, bowl), {"sgd": path}, minima=[0, 0])
      >>> figure.axes[0].get_legend_handles_labels()[1]
      ['sgd']
    """
    name = "trajectories"
    with styled(name):
        check_path(name, path)
        check_names(name, "iterates", iterates)
        validation.check_flag(name, legend=legend, colorbar=colorbar)
        x, y, values = grid_and_values(name, surface)
        paths = {
            key: points_in_plane(name, f"iterates[{key!r}]", value)
            for key, value in iterates.items()
        }
        stars = None
        if minima is not None:
            shapes = {1: "(2,)", 2: "(points, 2)"}
            found = np.atleast_2d(numbers(name, "minima", minima, shapes))
            stars = points_in_plane(name, "minima", found)
        canvas = Canvas.on(name, ax, size=(6.4, 4.8))
        axes = canvas.axes
        style, bar = _shades(values)
        shades = axes.contourf(x, y, values, **style)
        axes.contour(shades, colors="#999999", linewidths=0.4)
        if colorbar:
            canvas.figure.colorbar(shades, ax=axes, label=value_label, **bar)
        for index, (key, points) in enumerate(paths.items()):
            style = curve_style(index, len(paths))
            finite = np.isfinite(points).all(axis=1)
            label = escaped(key) + _until(np.arange(len(points)), finite)
            last = points[finite][-1:]
            if not np.all((last >= (x[0], y[0])) & (last <= (x[-1], y[-1]))):
                label += " (ends outside)"
            marks = [step for step in _MARKED_STEPS if step < len(points)]
            axes.plot(points[:, 0], points[:, 1], label=label, markevery=marks, **style)
            end = {"markersize": 9, "markeredgecolor": "white", "label": f"_{key} end"}
            axes.plot(last[:, 0], last[:, 1], **style | end)
        starts = np.unique([points[0] for points in paths.values()], axis=0)
        spot: dict[str, Any] = {
            "linestyle": "",
            "markerfacecolor": "white",
            "markeredgecolor": "black",
        }
        axes.plot(*starts.T, marker="o", markersize=9, label="_start", **spot, zorder=4)
        if stars is not None:
            axes.plot(*stars.T, marker="*", markersize=20, label="_minimum", **spot)
        axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))
        canvas.label(xlabel, ylabel, title, grid=None)
        return canvas.finish(legend, len(paths), path)


def singular_values(
    matrices: Mapping[str, ArrayLike],
    *,
    xlabel: str = "singular value, from the largest",
    ylabel: str = "size",
    title: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draws singular values in falling order, on a logarithmic axis.

    For what orthogonalization does to a momentum: pass both, and see how near to 1 the
    second one's are. Values below 1e-8 of the largest of a matrix are rounding and left
    out; the legend says how many.

    Args:
      matrices: Name -> a matrix, (rows, columns), or its singular values, (count,), in
        any order.
      xlabel: What is counted.
      ylabel: What the singular values are, with their unit.
      title: Of the axes.
      legend: Whether there is one.
      ax: Axes to draw into; None makes a figure.
      path: Where to save the whole figure: a name that ends in .png, .svg or .pdf.

    Returns:
      The figure.

    Raises:
      ImportError: If matplotlib is missing.
      TypeError: If an argument has a wrong type.
      ValueError: If there is nothing to draw, a shape is wrong, something is not finite
        or a singular value is negative, or `path` has another ending.

    Example:
      >>> import numpy as np
      >>> import optaxplus as ox
      >>> from optaxplus.report import plots
      >>> momentum = np.random.default_rng(0).standard_normal((64, 32))
      >>> both = {"before": momentum, "after": ox.numerics.polar_factor(momentum)}
      >>> figure = plots.singular_values(both)
      >>> before, after = (line.get_ydata() for line in figure.axes[0].lines)
      >>> print(f"{before[0] / before[-1]:.0f} -> {after[0] / after[-1]:.1f}")
      4 -> 1.3
    """
    name = "singular_values"
    with styled(name):
        from matplotlib.ticker import MaxNLocator

        check_path(name, path)
        check_names(name, "matrices", matrices)
        validation.check_flag(name, legend=legend)
        spectra = {
            key: spectrum(name, f"matrices[{key!r}]", value)
            for key, value in matrices.items()
        }
        canvas = Canvas.on(name, ax, size=(6.4, 4.2))
        shown = []
        for index, (key, values) in enumerate(spectra.items()):
            style = curve_style(index, len(spectra))
            style["markevery"] = spaced_marks(index, len(spectra), len(values))
            seen = values > _SMALLEST_RATIO * values[0]
            label = escaped(key)
            if not seen.all():
                label += f" ({np.sum(~seen)} of {len(values)} are 0, or nearly)"
            shown += values[seen].tolist()
            drawn = np.where(seen, values, np.nan)
            canvas.axes.plot(1 + np.arange(len(values)), drawn, label=label, **style)
        canvas.axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        canvas.label(xlabel, ylabel, title)
        canvas.fit(np.array(shown), log=True)
        return canvas.finish(legend, len(spectra), path)


def memory_bars(
    memory: Mapping[str, MemoryReport | Mapping[str, float]],
    *,
    title: str | None = None,
    legend: bool = True,
    ax: Axes | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draws bytes as bars, stacked by what they are for, with their sums.

    Args:
      memory: Name -> a `MemoryReport`, stacked by parameters, gradients and state, or a
        mapping of your own from parts to bytes. A part that one bar lacks is 0 there;
        parts are stacked in the order in which they are met.
      title: Of the axes.
      legend: Whether there is one.
      ax: Axes to draw into; None makes a figure.
      path: Where to save the whole figure: a name that ends in .png, .svg or .pdf.

    Returns:
      The figure.

    Raises:
      ImportError: If matplotlib is missing.
      TypeError: If an argument has a wrong type.
      ValueError: If there is nothing to draw, a number of bytes is negative or not
        finite, or `path` has another ending.

    Example:
      >>> import jax, optaxplus as ox
      >>> from optaxplus.report import plots
      >>> params = {"dense": {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}}
      >>> txs = {"adamw": ox.adamw(1e-3), "muon": ox.muon(1e-3)}
      >>> figure = plots.memory_bars(
      ...     {name: ox.memory_report(tx, params) for name, tx in txs.items()}
      ... )
      >>> [text.get_text().strip() for text in figure.axes[0].texts[-2:]]
      ['268.4 MB', '201.3 MB']
    """
    name = "memory_bars"
    with styled(name):
        from matplotlib.ticker import EngFormatter

        check_path(name, path)
        check_names(name, "memory", memory)
        validation.check_flag(name, legend=legend)
        bars = {
            key: byte_counts(name, f"memory[{key!r}]", value)
            for key, value in memory.items()
        }
        parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
        totals = np.array([sum(bar.values()) for bar in bars.values()])
        canvas = Canvas.on(name, ax, size=(7.0, 1.4 + 0.45 * len(bars)))
        axes, rows, left = canvas.axes, np.arange(len(bars)), np.zeros(len(bars))
        for index, part in enumerate(parts):
            widths = np.array([bar.get(part, 0.0) for bar in bars.values()])
            axes.barh(rows, widths, left=left, label=escaped(part), **part_style(index))
            for row in np.flatnonzero(widths > _WIDE_ENOUGH * totals.max()).tolist():
                width = float(widths[row])
                text = axes.text(left[row] + width / 2, row, format_bytes(width))
                text.set(ha="center", va="center", fontsize=8)
                text.set_bbox({"color": "white", "alpha": 0.8, "pad": 1})
            left += widths
        for row, total in enumerate(totals.tolist()):
            axes.text(total, row, f" {format_bytes(total)}", va="center", weight="bold")
        axes.set_yticks(rows, [escaped(key) for key in bars])
        axes.invert_yaxis()
        # Room for the sums; nothing at all still has an axis.
        axes.set_xlim(0, 1.2 * totals.max() or 1)
        axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
        canvas.label("memory", "", title, grid="x")
        return canvas.finish(legend, len(parts), path, columns=len(parts))


def _references(name: str, reference: Any) -> dict[str, float]:
    if reference is None:
        return {}
    check_names(name, "reference", reference)
    found = {}
    for key, value in reference.items():
        argument = f"reference[{key!r}]"
        found[key] = float(numbers(name, argument, value, {0: "()"}))
        check_finite(name, argument, found[key])
    return found


def _of_runs(runs: np.ndarray) -> str:
    """Says what a curve is of several runs, and how many of them diverged."""
    if len(runs) == 1:
        return ""
    diverged = np.sum(~np.isfinite(runs).all(axis=1))
    return f" (median, range of {len(runs)} runs" + (
        f", {diverged} not finite)" if diverged else ")"
    )


def _until(steps: np.ndarray, finite: Any) -> str:
    """Says where a curve is not finite: from some point on, or in how many points."""
    if finite.all():
        return ""
    first = np.argmin(finite)
    if finite[first:].any():
        return f" (not finite in {np.sum(~finite)} of {len(finite)} points)"
    return f" (not finite from {steps[first]:g})"


def _shades(values: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
    """How contours are drawn, light enough for curves on top, and their color bar.

    Zeros, which have no logarithm, are raised to what looks like them.
    """
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import LogFormatterMathtext

    greys = np.repeat(np.linspace(1.0, 0.78, 256)[:, None], 3, axis=1)
    shades: dict[str, Any] = {"cmap": ListedColormap(greys)}
    low, high = np.nanmin(values), np.nanmax(values)
    if low < 0:
        return shades | {"levels": _LEVELS}, {}
    # Of a function that comes near 0, what is below is one shade.
    low = max(low, _LOWEST_LEVEL * high)
    np.maximum(values, low / 2, out=values)
    first, last = np.floor(np.log10(low)), np.ceil(np.log10(high))
    levels = 10 ** np.arange(first, last + 0.5, 0.5)
    shades |= {"levels": levels, "norm": LogNorm(levels[0], levels[-1])}
    return shades | {"extend": "min"}, {
        "ticks": levels[::2],
        "format": LogFormatterMathtext(),
    }
