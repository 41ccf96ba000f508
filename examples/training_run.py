"""What a training run measures, how it is saved, and how Ctrl-C ends it.

The training examples share this: the measurements of one run, its checkpoint on disk,
and a flag in place of the exception that Ctrl-C raises.
"""

from __future__ import annotations

import dataclasses
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState


@dataclass
class Run:
    """What was measured while one optimizer trained.

    Attributes:
        optimizer: Its name.
        settings: Everything that decides the numbers; a checkpoint only continues a
            run with the same.
        train: [step, loss of its batch] for every step.
        validation: [step, validation loss], at the start and at equal distances.
        validation_seconds: The value of `seconds` at each of these.
        seconds: Time spent in training steps: without compilation, validation and
            checkpoints.
        compile_seconds: Time spent on compiling the training step.
        sample: Text written by the trained model.
    """

    optimizer: str
    settings: dict[str, Any]
    train: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    validation_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    compile_seconds: float = 0.0
    sample: str = ""

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return len(self.train)

    @property
    def is_finished(self) -> bool:
        """Whether all steps were taken and the result was measured."""
        return self.step == self.settings["steps"] and bool(self.sample)

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of the training steps."""
        if not self.seconds:
            return 0.0
        tokens = self.step * self.settings["batch"] * self.settings["context"]
        return tokens / self.seconds


class Interruption:
    """Turns Ctrl-C into a flag, which the training loop reads between two steps.

    A second Ctrl-C stops at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interruption:
        """Starts to listen."""
        self._previous = [
            signal.signal(number, self._request) for number in self.SIGNALS
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Restores what was there before."""
        for number, handler in zip(self.SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


class ResumeError(ValueError):
    """A checkpoint does not belong to the run that was asked for."""


class Checkpoints:
    """The newest state of one run on disk: parameters, optimizer state, curves."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=1,
                # The next step overwrites the donated state.
                enable_async_checkpointing=False,
            ),
        )

    def save(self, state: TrainState, run: Run) -> None:
        """Saves a run, unless this step of it is there already."""
        if self._manager.latest_step() == run.step:
            return
        arrays = {"params": state.params, "opt_state": state.opt_state}
        self._manager.save(
            run.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays),
                run=ocp.args.JsonSave(dataclasses.asdict(run)),
            ),
        )

    def restore(self, state: TrainState, run: Run) -> tuple[TrainState, Run]:
        """Gives back the run as it was saved, or as it came if there is nothing."""
        step = self._manager.latest_step()
        if step is None:
            return state, run
        saved = self._manager.restore(
            step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
        )
        saved_run = Run(**saved.run)
        check_same_settings(run.settings, saved_run.settings, self.directory)
        arrays = {"params": state.params, "opt_state": state.opt_state}
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        )
        return state.replace(step=step, **restored.arrays), saved_run


def check_same_settings(
    wanted: dict[str, Any], saved: dict[str, Any], directory: Path
) -> None:
    """Refuses to continue a checkpoint with other settings than it was made with."""
    for name, value in saved.items():
        if wanted[name] != value:
            raise ResumeError(
                f"--resume: {name} is {wanted[name]}, but the checkpoint in "
                f"{directory} was made with {value}. Use the same value, or leave out "
                f"--resume to start again."
            )
