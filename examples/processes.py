"""Several processes that train together, and devices for machines without any.

Every process runs the same program; JAX joins their devices to one list. What one of
them alone does, such as printing, is for the first; what changes the program, such as
Ctrl-C, has to be agreed upon.
"""

from __future__ import annotations

import argparse
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from train_gpt import positive
from training_run import Interruption

# All of them together, when a CPU is to stand for several devices.
SIMULATED_DEVICES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say where the other processes are."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--distributed", action="store_true", help="on a pod")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="the first process")
    group.add_argument("--processes", type=positive, metavar="N", help="how many")
    group.add_argument("--process-id", type=int, metavar="I", help="which, from 0")


def check_arguments(
    parser: argparse.ArgumentParser, parsed: argparse.Namespace
) -> None:
    """Refuses arguments that do not say enough."""
    given = (parsed.coordinator, parsed.processes, parsed.process_id)
    if len({value is None for value in given}) == 2:
        parser.error("--coordinator, --processes and --process-id belong together")
    if parsed.coordinator is None:
        return
    if parsed.distributed:
        parser.error("--distributed finds the other processes without --coordinator")
    if not 0 <= parsed.process_id < parsed.processes:
        parser.error(
            f"--process-id must be from 0 to {parsed.processes - 1}; "
            f"got {parsed.process_id}"
        )


def start(options: argparse.Namespace) -> None:
    """Simulates devices where there are none, and connects the processes.

    To be called before JAX is asked for anything, as it looks for devices then.
    """
    simulate_devices(options.processes or 1)
    if options.coordinator is not None:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process_id
        )
    elif options.distributed:
        jax.distributed.initialize()


def simulate_devices(processes: int) -> None:
    """Lets a CPU stand for several devices; accelerators are left as they are.

    Args:
        processes: Number of processes that share the devices out among them.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        # Read when JAX looks for devices, which importing it does not do.
        count = max(1, SIMULATED_DEVICES // processes)
        flags += f" --xla_force_host_platform_device_count={count}"
        # Eight threads on two busy cores may be late; the default is to abort.
        flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        flags += " --xla_cpu_collective_timeout_seconds=600"
        os.environ["XLA_FLAGS"] = flags


class AgreedInterruption:
    """Ctrl-C in any process, which stops all of them after the same step."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption

    @property
    def requested(self) -> bool:
        """Whether to stop; all processes have to ask at the same time."""
        mine = self._interruption.requested
        if jax.process_count() == 1:
            return mine
        return bool(multihost_utils.process_allgather(np.array(mine)).any())
