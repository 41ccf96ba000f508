"""A live bar for a training run: its loss, its speed and the time that is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from training_run import Run


@contextlib.contextmanager
def live_progress(
    run: Run, steps: int, unit: str, console: Console
) -> Iterator[Callable[[float], None]]:
    """Shows a bar, in a terminal only; gives the function that updates it.

    Args:
        run: What the bar shows; it has a validation loss.
        steps: Of the whole run.
        unit: Of the speed.
        console: Where the bar is.

    Yields:
        Called after a step with the speed, it shows the run as it is then.
    """
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} " + unit),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task(
            run.optimizer,
            total=steps,
            completed=run.step,
            loss=run.validation[-1][1],
            speed=0.0,
        )

        def show(speed: float) -> None:
            progress.update(bar, completed=run.step, loss=run.train[-1][1], speed=speed)

        yield show
