"""What the plots share: one style, axes to draw into, files without dates.

Nothing global changes: figures are made without pyplot, and matplotlib's settings are
set aside only while a plot is drawn and saved. So the same data give the same bytes,
whatever style the caller has chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "METADATA",
    "Canvas",
    "curve_style",
    "escaped",
    "part_style",
    "spaced_marks",
    "styled",
]

# What matplotlib would write into a file beside the data, by the format.
METADATA: Mapping[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
DPI = 150
SETTINGS = {
    "font.size": 9.0,
    "hatch.linewidth": 0.5,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.hashsalt": "optaxplus",
}
# Okabe and Ito's, who made them for all kinds of colour blindness, without the yellow,
# which is hard to see on white.
COLORS = ("#0072b2", "#d55e00", "#000000", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# All of them have an inside. Their number and that of the lines have no common divisor,
# so that all pairs are met.
MARKERS = "osv^DXP<"
LINES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (6, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
    (0, (3, 1, 1, 1)),
)
# About how many markers a curve has.
MARKS = 8
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")


@contextmanager
def styled(function: str) -> Iterator[None]:
    """Draws in one style, whatever matplotlib's settings are, and restores those.

    Args:
      function: Who draws, for the message.

    Raises:
      ImportError: If matplotlib is missing.
    """
    try:
        import matplotlib
        import matplotlib.style
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError(
            f"{function}: matplotlib is missing; pip install optaxplus[plot]"
        ) from error
    with matplotlib.style.context(["default", SETTINGS]):
        yield


@dataclass(frozen=True)
class Canvas:
    """Where a plot is drawn.

    Attributes:
      figure: What is returned and saved.
      axes: What is drawn into.
      is_own: Whether the figure was made for this plot alone.
    """

    figure: Figure
    axes: Axes
    is_own: bool

    @classmethod
    def on(cls, function: str, ax: Axes | None, *, size: tuple[float, float]) -> Canvas:
        """Takes the caller's axes, or those of a new figure.

        Args:
          function: Who draws, for the message.
          ax: The caller's axes, or None.
          size: Of a new figure, in inches.
        """
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure

        if ax is None:
            figure = Figure(figsize=size, layout="constrained")
            return cls(figure, figure.subplots(), is_own=True)
        if not isinstance(ax, Axes):
            raise TypeError(
                f"{function}: ax={ax!r} is not allowed; it must be an instance of "
                "matplotlib.axes.Axes, or None for a figure of its own."
            )
        # Twice, as the first may be a part of a figure.
        return cls(ax.figure.figure, ax, is_own=False)

    def label(
        self,
        xlabel: str,
        ylabel: str,
        title: str | None,
        grid: Literal["x", "both"] | None = "both",
    ) -> None:
        """Names the axes, and the whole if it has a title, and draws a grid.

        Args:
          xlabel: Of the x axis.
          ylabel: Of the y axis.
          title: Of the axes, or None.
          grid: Lines from the ticks of which axes: "x", "both", or None.
        """
        self.axes.set(xlabel=xlabel, ylabel=ylabel)
        self.axes.set_axisbelow(True)
        if grid is not None:
            self.axes.grid(axis=grid, alpha=0.3)
        if title is not None:
            self.axes.set_title(title)

    def fit(self, shown: np.ndarray, *, log: bool) -> None:
        """Chooses the y axis so that these values are on it, as far as they can be."""
        from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

        shown = shown[np.isfinite(shown) & ((shown > 0) | (not log))]
        low, high = (shown.min(), shown.max()) if shown.size else (1.0, 1.0)
        if log:
            margin = (high / low) ** 0.05 if high > low else 2.0
            # Limits first: matplotlib cannot find any where nothing is positive.
            self.axes.set_ylim(low / margin, high * margin)
            self.axes.set_yscale("log")
            if high < 1000 * low:
                # Powers of ten alone would leave the axis with few numbers, or none.
                few = MaxNLocator(6) if high < 10 * low else LogLocator(subs=(1, 2, 5))
                self.axes.yaxis.set(major_locator=few, major_formatter="{x:g}")
                self.axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
            self.axes.set_ylim(low - margin, high + margin)

    def finish(
        self, legend: bool, entries: int, path: str | Path | None, *, columns: int = 1
    ) -> Figure:
        """Adds the legend, saves the figure and gives it back.

        Args:
          legend: Whether there is one.
          entries: How many it has; many stand beside the axes if there is room.
          path: Where to save the whole figure, or None.
          columns: Of a legend that stands under the axes; 1 is for one at the side.
        """
        if legend and self.is_own and columns > 1:
            self.figure.legend(loc="outside lower center", ncols=columns)
        elif legend and self.is_own and entries > 5:
            self.figure.legend(loc="outside right upper")
        elif legend:
            self.axes.legend()
        if path is not None:
            metadata = METADATA[Path(path).suffix.lower()]
            self.figure.savefig(path, dpi=DPI, metadata=metadata)
        return self.figure


def curve_style(index: int, count: int) -> dict[str, Any]:
    """How a curve is drawn, to be told from others without colour.

    Args:
      index: Which curve it is.
      count: How many there are.
    """
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        # What comes first is on top, and more than lines that refer to it.
        "zorder": 3 - index / count,
    }


def spaced_marks(index: int, count: int, points: int) -> tuple[int, int]:
    """Which points have markers: others where curves run together.

    Args:
      index: Which curve it is.
      count: How many there are.
      points: How many points it has.
    """
    every = max(1, points // MARKS)
    return index * every // count, every


def part_style(index: int) -> dict[str, Any]:
    """How a part of a bar is filled, to be told from others without colour."""
    from matplotlib.colors import to_rgb

    # Light, so that numbers and hatching are readable on it.
    color = 0.5 + 0.5 * np.array(to_rgb(COLORS[index % len(COLORS)]))
    return {
        "color": tuple(color),
        "edgecolor": "black",
        "linewidth": 0.6,
        "hatch": HATCHES[index % len(HATCHES)],
    }


def escaped(name: Any) -> str:
    """A name as text, in which a dollar begins no formula."""
    return str(name).replace("$", r"\$")
