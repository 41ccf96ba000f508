"""What `with_metrics` measures, in NumPy and float64."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NAMES = (
    "grad_norm",
    "update_norm",
    "param_norm",
    "update_rms",
    "param_rms",
    "update_to_param",
)
ZEROS = dict.fromkeys(NAMES, 0.0)
# A few float32 roundings: of squares, of sums over few entries, of the root.
RTOL = 1e-6


def _entries(tree: Any) -> np.ndarray:
    wide = np.complex128 if any(map(jnp.iscomplexobj, jax.tree.leaves(tree))) else float
    return np.concatenate([np.asarray(x, wide).ravel() for x in jax.tree.leaves(tree)])


def expected(grads: Any, updates: Any, params: Any) -> dict[str, float]:
    """The six numbers of all leaves of three trees."""
    g, u, p = map(_entries, (grads, updates, params))
    return {
        "grad_norm": np.linalg.norm(g),
        "update_norm": np.linalg.norm(u),
        "param_norm": np.linalg.norm(p),
        "update_rms": np.sqrt(np.mean(np.abs(u) ** 2)),
        "param_rms": np.sqrt(np.mean(np.abs(p) ** 2)),
        "update_to_param": np.linalg.norm(u) / np.linalg.norm(p),
    }


def assert_metrics(found: Mapping[str, jax.Array], wanted: Mapping[str, float]) -> None:
    """Float32 scalars of these names and values."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].shape, found[name].dtype) == ((), jnp.float32)
        np.testing.assert_allclose(found[name], value, rtol=RTOL, err_msg=name)
