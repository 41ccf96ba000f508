"""The devices of pods that no machine here has, and processes for their compilers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Sequence
from typing import Any

# Asks no metadata server what machine this is.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
from jax.experimental import topologies

TOPOLOGIES = {
    "v5e": {8: "2x4", 64: "8x8", 256: "16x16"},
    "v5p": {8: "2x2x2", 64: "4x4x4", 256: "4x8x8"},
    "h100": {8: "1x1x8"},
}
# What an H100 is to the compiler of XLA for GPUs.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 } device_address_bits: 64
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84942979072
  l2_cache_size: 52428800 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices_of(topology: str, chips: int) -> Sequence[Any]:
    """Devices that can be compiled for."""
    name = TOPOLOGIES[topology][chips]
    if topology == "h100":
        return topologies.get_topology_desc(
            platform="cuda", topology_name="", topology=name, target_config=H100
        ).devices
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{topology}:{name}"
    ).devices


def unavailable(topology: str) -> str | None:
    """Why a topology cannot be compiled for here."""
    needed = {"h100": "jax_plugins.xla_cuda13"}.get(topology, "libtpu")
    try:
        found = importlib.util.find_spec(needed)
    except ModuleNotFoundError:
        found = None
    return None if found else f"{needed} is not installed"


def found_apart(command: Sequence[Any], timeout: float) -> dict[str, Any]:
    """The JSON that a command prints last, or {"error": ...}.

    In a process of its own, which the compiler may end or keep busy.
    """
    environment = {
        "JAX_PLATFORMS": "cpu",
        # Other processes may hold libtpu's lock.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        **os.environ,
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    how = f"exit {done.returncode}" if done.returncode > 0 else "crash of the compiler"
    errors = re.findall(r"\w*Error: .*|.*Check failed.*", done.stderr)
    return {"error": f"{how}: {errors[-1][:300] if errors else ''}"}
