"""What the compiler for CPUs makes of the optimizers: no parameter-sized temporary."""

import jax
import jax.numpy as jnp
import optax
import pytest

import optaxplus as ox

PARAMS = {
    "dense": {"kernel": (256, 512), "bias": (512,)},
    "other": {"kernel": (256, 512), "bias": (512,)},
    "attn": {"query": {"kernel": (256, 4, 128)}, "out": {"kernel": (4, 128, 256)}},
    "layers": {"up": {"kernel": (2, 256, 512), "bias": (2, 512)}},
}


def temporary_bytes_per_parameter(tx) -> float:
    """Of the whole optimizer step, parameters and state donated."""
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        PARAMS,
        is_leaf=lambda node: isinstance(node, tuple),
    )

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params), params).compile()
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return compiled.memory_analysis().temp_size_in_bytes / size


@pytest.mark.parametrize(
    ("tx", "allowed"),
    [
        # Rows, columns and scalars are temporaries too: 0.1 bytes per parameter.
        pytest.param(ox.sgd(0.1, momentum=0.9), 0.1, id="momentum"),
        pytest.param(ox.adamw(0.1), 0.1, id="adamw"),
        pytest.param(
            optax.chain(ox.clip_by_global_norm(1.0), ox.adamw(0.1)), 0.1, id="clip"
        ),
        pytest.param(ox.lion(0.1), 0.1, id="lion"),
        pytest.param(ox.adafactor(0.1), 0.1, id="adafactor"),
        pytest.param(
            ox.adafactor(0.1, min_dim_size_to_factor=10_000), 0.1, id="unfactored"
        ),
        # The direction, which is stored between its norm and its use.
        pytest.param(ox.lamb(0.1, weight_decay=0.1), 4.1, id="lamb"),
    ],
)
def test_a_donated_step_has_no_parameter_sized_temporaries(tx, allowed: float):
    assert temporary_bytes_per_parameter(tx) <= allowed
