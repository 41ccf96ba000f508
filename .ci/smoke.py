"""Uses the installed package as someone does who has it and what it needs, no more.

python -I .ci/smoke.py

Run by the interpreter of a virtual environment into which nothing but the wheel was
installed; `-I` keeps the checkout from being found in its place.
"""

import importlib.util
import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import optaxplus as ox

# Of the extras, and of those who work on the package.
ABSENT = ("flax", "matplotlib", "orbax", "pytest", "rich", "sklearn")


def command(*words: str) -> str:
    """What the command line of the package prints."""
    return subprocess.run(
        [sys.executable, "-I", "-m", "optaxplus", *words],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def check(name: str, is_so: bool) -> None:
    """Ends the program if something is not so."""
    if not is_so:
        sys.exit(f"smoke: {name}: failed")
    print(f"smoke: {name}: passed")


def main() -> None:
    """All checks."""
    here = Path(ox.__file__).resolve()
    check("it is the installed one", here.is_relative_to(Path(sys.prefix).resolve()))
    present = [name for name in ABSENT if importlib.util.find_spec(name)]
    check(f"without extras, found {present}", not present)
    check("the version", metadata.version("optaxplus") == ox.__version__)
    check("its types", resources.files("optaxplus").joinpath("py.typed").is_file())
    params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
    tx = ox.master_weights(ox.quantize_state(ox.muon(0.1), min_size=1))
    step = jax.jit(tx.update)
    updates, _ = step(params, jax.jit(tx.init)(params), params)
    moved = optax.apply_updates(params, updates)
    largest = max(float(jnp.max(leaf)) for leaf in jax.tree.leaves(moved))
    check(f"a step of muon down to {largest:.3f}", 0 < largest < 1)
    check("routing", "(4 -> 8)" in str(ox.explain_routing(params)))
    check("memory", "total" in str(ox.memory_report(tx, params)))
    words = ("--model", "gpt2-small", "--optimizer", "muon", "--state", "8bit")
    check("the command line", "124,439,808 parameters" in command("memory", *words))


if __name__ == "__main__":
    main()
