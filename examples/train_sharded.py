r"""Muon on many devices: the GPT of the main example under a mesh.

The byte-level GPT of `train_gpt.py` learns Python's source with its parameters, and
what Muon remembers of them, cut into pieces that lie on different devices. Where there
is no accelerator, one CPU stands for eight devices. Axes of the mesh are `fsdp` (cuts
the width of the model, and the batch), `tensor` (cuts heads and hidden units) and
`data` (cuts the batch alone); results do not depend on them, but for rounding.

    python examples/train_sharded.py                         # some two minutes
    python examples/train_sharded.py --steps small           # under a minute
    python examples/train_sharded.py --mesh fsdp=4,tensor=2
    python examples/train_sharded.py --explicit              # axes of explicit type
    python examples/train_sharded.py --mesh fsdp=2,tensor=4 --steps 700 --resume

Several processes: on each machine of a pod `--distributed`, where JAX finds the others
by itself. Elsewhere tell each where the first one is, here two on one machine; `--out`
must be a directory that all of them see.

    for i in 0 1; do python examples/train_sharded.py --process-id $i --processes 2 \
        --coordinator localhost:9876 & done; wait

Written to `--out`: `results.json` (every number) and `checkpoints/`. In the end the
checkpoint is restored onto another mesh, and both take some more steps to show that
they agree. Ctrl-C, in any process, stops all of them after the same step and saves;
`--resume` goes on from there, on whatever mesh `--mesh` says then.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import processes
import train_gpt
from comparison import device, versions
from flax.training.train_state import TrainState
from gpt import GPT, GPTConfig, next_token_loss
from jax.experimental import multihost_utils
from layout import (
    Layout,
    MeshError,
    bytes_on_devices,
    collectives,
    make_layout,
    mesh_sizes,
    other_sizes,
)
from processes import AgreedInterruption
from rich.console import Console
from text import standard_library, training_batch, validation_batches
from train_gpt import Task, Trainer, positive
from training_run import Checkpoints, Interruption, ResumeError, Run

import optaxplus as ox

# The size of the job: what two cores can do in the time, as eight devices.
STEPS = 600
SMALL_STEPS = 40
BATCH = 8
VALIDATION_BATCHES = 8
# The rate stays where the warm-up ends, so that more steps can be asked for later.
WARMUP_STEPS = 20
LEARNING_RATE = train_gpt.RECIPES["muon"].learning_rate
# Taken on both meshes, when a checkpoint is restored onto another one.
FURTHER_STEPS = 5


@dataclass(frozen=True)
class ShardedTask(Task):
    """The task of the main example, with everything where the layout says."""

    layout: Layout
    batch_size: int

    def initial_params(self) -> Any:
        """The parameters, each made in pieces where they belong."""
        make = super().initial_params
        shardings = self.layout.params(jax.eval_shape(make))
        return jax.jit(make, out_shardings=shardings)()

    def batch(self, step: int) -> jax.Array:
        """The data of one step: the same windows on every mesh."""
        return self.layout.place(
            training_batch(
                self.text.train,
                seed=self.seed,
                step=step,
                batch=self.batch_size,
                context=self.model.config.context,
            )
        )

    def settings(self) -> dict[str, Any]:
        """What must not change when a run is resumed, and the mesh, which may."""
        return {
            "seed": self.seed,
            "width": self.model.config.width,
            "depth": self.model.config.depth,
            "context": self.model.config.context,
            "batch": self.batch_size,
            "learning_rate": LEARNING_RATE,
            "text": self.text.digest,
            "mesh": str(self.layout),
        }


class ShardedTrainer(Trainer):
    """Trains with Muon where the layout of the task says.

    Attributes:
        state: Parameters and state of the optimizer, after the steps taken so far.
        compiled: The training step; None until it is compiled.
    """

    def __init__(self, task: ShardedTask, interruption: Any, console: Console) -> None:
        super().__init__(task, interruption, console)
        layout = task.layout
        validation_loss = layout.on_auto_axes(self._sharded_loss, layout.whole)
        self._validation_loss = jax.jit(validation_loss)
        self._validation_batches = [
            layout.place(windows)
            for windows in validation_batches(
                task.text.validation,
                batches=VALIDATION_BATCHES,
                batch=task.batch_size,
                context=task.model.config.context,
            )
        ]
        self.state = initial_state(task)
        self.compiled: Any = None

    def train(self, run: Run, checkpoints: Checkpoints) -> None:
        """Takes the steps that are left."""
        self.state = self._take_steps(self.state, run, checkpoints)
        checkpoints.save(self.state, run)

    def further_losses(self, run: Run) -> list[float]:
        """Takes some more steps, which are not part of the run."""
        if self.compiled is None:
            self._compile(self.state, run)
        losses = []
        for step in range(run.step, run.step + FURTHER_STEPS):
            self.state, loss = self._call(self.state, self.task.batch(step))
            losses.append(float(loss))
        return losses

    def _sharded_loss(self, params: Any, windows: jax.Array) -> jax.Array:
        return next_token_loss(
            self.task.model, self.task.layout.gather(params), windows
        )

    def _sharded_step(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        opt_state: Any,
        windows: jax.Array,
    ) -> tuple[Any, Any, jax.Array]:
        """Takes one step; gives back the loss before it."""
        layout = self.task.layout
        value_and_grad = layout.on_auto_axes(
            jax.value_and_grad(self._sharded_loss),
            (layout.whole, layout.params(params)),
        )
        loss, grads = value_and_grad(params, windows)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def _compile(self, state: TrainState, run: Run) -> Callable[..., Any]:
        """Compiles the training step before the clock of the run starts."""
        start = time.perf_counter()
        arrays = (state.params, state.opt_state)
        # Without being told, the compiler may put results elsewhere than arguments.
        shardings = jax.tree.map(lambda leaf: leaf.sharding, arrays)
        jitted = jax.jit(
            partial(self._sharded_step, state.tx),
            donate_argnums=(0, 1),
            out_shardings=(*shardings, self.task.layout.whole),
        )
        windows = self.task.batch(0)
        self.compiled = jitted.lower(*arrays, windows).compile()
        # The first call is slow; it is made with a copy, because of the donation.
        jax.block_until_ready(self.compiled(*jax.tree.map(jnp.copy, arrays), windows))
        run.compile_seconds += time.perf_counter() - start
        return self._call

    def _call(self, state: TrainState, windows: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state, loss = self.compiled(state.params, state.opt_state, windows)
        return state.replace(params=params, opt_state=opt_state), loss


def initial_state(task: ShardedTask) -> TrainState:
    """Parameters and state of Muon, made in pieces where they belong."""
    params = task.initial_params()
    # On explicit axes the types of the parameters say how they lie.
    placement = "auto" if task.layout.is_explicit else ox.Placement.like(params)
    schedule = optax.warmup_constant_schedule(
        LEARNING_RATE / (WARMUP_STEPS + 1), LEARNING_RATE, WARMUP_STEPS
    )
    tx = ox.muon(schedule, clip_norm=1.0, placement=placement)
    shardings = ox.state_sharding(tx, params)
    opt_state = jax.jit(tx.init, out_shardings=shardings)(params)
    apply_fn = task.model.apply
    return TrainState(0, apply_fn=apply_fn, params=params, tx=tx, opt_state=opt_state)


class ShardedCheckpoints(Checkpoints):
    """Checkpoints that may be restored onto another mesh."""

    def saved_run(self) -> Run | None:
        """What was measured until the checkpoint, or None without one."""
        if (step := self._manager.latest_step()) is None:
            return None
        arguments = ocp.args.Composite(run=ocp.args.JsonRestore())
        return Run(**self._manager.restore(step, args=arguments).run)

    def restore(self, state: TrainState, run: Run) -> tuple[TrainState, Run]:
        """Gives back the run as it was saved, in the pieces that `state` has."""
        if (saved := self.saved_run()) is None:
            return state, run
        mesh = {"mesh": saved.settings["mesh"]}
        asked = dataclasses.replace(run, settings=run.settings | mesh)
        state, saved = super().restore(state, asked)
        return state, dataclasses.replace(saved, settings=run.settings)


def print_plan(task: ShardedTask, params: Any, console: Console) -> None:
    """Prints who updates which parameter, and which device does what."""
    if not console.quiet:
        print(ox.explain_routing(params))
        console.rule(f"Muon on {task.layout}", align="left")
        print(ox.plan_placement(params, ox.Placement.like(params)))
    console.print(
        f"\n{task.steps} steps of {task.batch_size * task.model.config.context:,} "
        f"tokens on {device()}, processes: {jax.process_count()}",
        highlight=False,
    )


def print_report(found: dict[str, Any], console: Console) -> None:
    """Prints what lies on a device, and what the step moves."""
    for name, held in found["bytes"].items():
        console.print(
            f"{name:>10}  {held['per_device']:>10,} bytes on a device, "
            f"{held['total']:,} in total",
            highlight=False,
        )
    counts = (f"{count} {kind}" for kind, count in found["collectives"].items())
    console.print(f"communication in a step: {', '.join(counts) or 'none'}")


def restore_elsewhere(
    trainer: ShardedTrainer, run: Run, checkpoints: ShardedCheckpoints
) -> dict[str, Any] | None:
    """Restores the checkpoint onto another mesh, and compares how both go on."""
    task, console = trainer.task, trainer.console
    sizes = other_sizes(dict(task.layout.mesh.shape), task.batch_size)
    if sizes is None:
        console.print("There is no other mesh to restore the checkpoint onto.")
        return None
    layout = make_layout(sizes, explicit=task.layout.is_explicit)
    console.print(
        f"\nRestoring onto {layout}, too; {FURTHER_STEPS} more steps on both",
        highlight=False,
    )
    other_task = dataclasses.replace(task, layout=layout)
    other = ShardedTrainer(other_task, trainer.interruption, console)
    other.state, other_run = checkpoints.restore(
        other.state, Run("muon", other_task.settings())
    )
    losses, elsewhere = trainer.further_losses(run), other.further_losses(other_run)
    difference = float(np.max(np.abs(np.subtract(losses, elsewhere))))
    console.print(f"largest difference of the losses: {difference:.1e}")
    return {
        "mesh": str(layout),
        "losses": losses,
        "losses_elsewhere": elsewhere,
        "largest_difference": difference,
    }


def train(options: argparse.Namespace, console: Console) -> int:
    """Trains, saves, reports; returns the exit status."""
    sizes = options.mesh or {"fsdp": jax.device_count()}
    config = GPTConfig(
        width=options.width,
        depth=train_gpt.DEPTH,
        head_size=train_gpt.HEAD_SIZE,
        context=train_gpt.CONTEXT,
    )
    task = ShardedTask(
        model=GPT(config),
        text=standard_library(),
        steps=options.steps,
        seed=options.seed,
        layout=make_layout(sizes, explicit=options.explicit),
        batch_size=options.batch,
    )
    with Interruption() as signals:
        interruption = AgreedInterruption(signals)
        trainer = ShardedTrainer(task, interruption, console)
        checkpoints, run = open_checkpoints(trainer, options)
        print_plan(task, trainer.state.params, console)
        trainer.train(run, checkpoints)
        found = results(trainer, run, options)
        print_report(found, console)
        interrupted = interruption.requested
        # Whoever interrupts does not want to wait.
        found["restored"] = (
            None if interrupted else restore_elsewhere(trainer, run, checkpoints)
        )
    if jax.process_index() == 0:
        (options.out / "results.json").write_text(json.dumps(found) + "\n")
    console.print(f"\nWritten to {options.out}: results.json, checkpoints/")
    if interrupted:
        command = resume_command(options)
        console.print("Interrupted. To go on from here, on any mesh:")
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    return 0


def open_checkpoints(
    trainer: ShardedTrainer, options: argparse.Namespace
) -> tuple[ShardedCheckpoints, Run]:
    """Removes old checkpoints, or puts the trainer where they end."""
    directory = options.out / "checkpoints"
    if jax.process_index() == 0:
        if not options.resume:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
    multihost_utils.sync_global_devices("the directory is ready")
    checkpoints = ShardedCheckpoints(directory)
    run = Run("muon", trainer.task.settings())
    if (saved := checkpoints.saved_run()) is None:
        return checkpoints, run
    trainer.state, run = checkpoints.restore(trainer.state, run)
    if run.step >= options.steps:
        raise ResumeError(
            f"--resume: the checkpoint in {directory} has {run.step} steps already; "
            f"ask for more than that with --steps."
        )
    trainer.console.print(
        f"Going on after step {run.step}: saved on {saved.settings['mesh']}, "
        f"restored onto {trainer.task.layout}\n",
        highlight=False,
    )
    return checkpoints, run


def results(
    trainer: ShardedTrainer, run: Run, options: argparse.Namespace
) -> dict[str, Any]:
    """Collects everything measured, in the form of `results.json`."""
    return {
        "run": dataclasses.asdict(run) | {"tokens_per_second": run.tokens_per_second},
        "bytes": {
            "parameters": bytes_on_devices(trainer.state.params),
            "state": bytes_on_devices(trainer.state.opt_state),
        },
        "collectives": collectives(trainer.compiled),
        "processes": jax.process_count(),
        "device": device(),
        "versions": versions(),
        "seed": options.seed,
        "date": datetime.date.today().isoformat(),
        "arguments": vars(options) | {"out": str(options.out)},
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="AXIS=N,…",
        help="the axes, of data, fsdp and tensor, with sizes that multiply to the "
        "number of devices (default: fsdp alone)",
    )
    parser.add_argument(
        "--explicit",
        action="store_true",
        help="use axes of explicit type, on which arrays' types say how they lie",
    )
    parser.add_argument(
        "--steps",
        type=lambda text: SMALL_STEPS if text == "small" else positive(text),
        default=STEPS,
        metavar="N",
        help=f"number of steps, or 'small' for {SMALL_STEPS} (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--width",
        type=positive,
        default=train_gpt.WIDTH,
        help=f"width of the model, a multiple of {train_gpt.HEAD_SIZE} "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--batch",
        type=positive,
        default=BATCH,
        help="number of windows in a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/train_sharded"),
        help="directory for everything that is written; without --resume, the "
        "checkpoint of an earlier run in it is removed (default: %(default)s)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --out"
    )
    processes.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    processes.check_arguments(parser, parsed)
    if parsed.width % train_gpt.HEAD_SIZE:
        parser.error(
            f"--width must be a multiple of {train_gpt.HEAD_SIZE}, got {parsed.width}"
        )
    if parsed.seed < 0:
        parser.error(f"--seed must not be negative, got {parsed.seed}")
    if parsed.resume and not (parsed.out / "checkpoints").is_dir():
        parser.error(f"--resume: there are no checkpoints in {parsed.out}")
    return parsed


def resume_command(options: argparse.Namespace) -> str:
    """The command line that continues this run on one process."""
    words = ["python", sys.argv[0], "--steps", options.steps, "--seed", options.seed]
    words += ["--width", options.width, "--batch", options.batch]
    words += ["--out", options.out, "--resume"]
    words += ["--explicit"] if options.explicit else []
    return shlex.join(map(str, words))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example; returns the exit status."""
    options = parse_arguments(arguments)
    processes.start(options)
    try:
        return train(options, Console(quiet=jax.process_index() > 0))
    except (MeshError, ResumeError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
