"""The example of an optimizer of one's own: its rule, and what it gets for nothing."""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from tests.assertions import assert_same_types, assert_trees_close, assert_trees_equal

# A script's own folder.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import own_optimizer
from own_optimizer import ScaleByAdagoState, adago, scale_by_adago

ROOT = Path(__file__).parent.parent
STEPS = 6
GAMMA, FLOOR = 4.0, 0.4
# A stack of three dense layers, the projections of one attention, and what else there
# is: names, and the biases beside kernels, tell what is what.
SHAPES = {
    "attention": {
        "query": {"kernel": (8, 2, 4), "bias": (2, 4)},
        "out": {"kernel": (2, 4, 8), "bias": (8,)},
    },
    "embedding": (11, 8),
    "layers": {"kernel": (3, 8, 16), "bias": (3, 16)},
}
# Axes of one matrix, and its rows, for each hidden weight of these.
HIDDEN = {
    ("attention", "out", "kernel"): ((0, 1, 2), 8),
    ("attention", "query", "kernel"): ((0, 1, 2), 8),
    ("layers", "kernel"): ((1, 2), 8),
}


def tree(seed: int, dtype: str = "float32", shapes: Any = SHAPES) -> Any:
    """Normal numbers in the shapes of the tree."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def gradients(step: int, dtype: str = "float32") -> Any:
    """Gradients that shrink, so that `gamma` counts at first and `floor` at last."""
    return jax.tree.map(lambda g: g * 0.6**step, tree(100 + step, dtype))


def run(tx: optax.GradientTransformation, params: Any, dtype: str = "float32") -> Any:
    """Updates of all steps, and the last state."""
    state, all_updates = init(tx, params), []
    step_fn = jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = step_fn(gradients(step, dtype), state, params)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
    return all_updates, state


def leaf_of(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


@pytest.fixture(autouse=True, scope="module")
def fast_compilation() -> Iterator[None]:
    """Nothing here is timed."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


def init(tx: optax.GradientTransformation, params: Any) -> Any:
    return jax.jit(tx.init)(params)


def update(tx: optax.GradientTransformation, *arguments: Any) -> Any:
    """Updates and new state."""
    return jax.jit(tx.update)(*arguments)


@pytest.fixture
def exact(monkeypatch) -> None:
    """Gives the example Newton-Schulz steps that converge, in float32.

    Eight steps of that table are exact for singular values above 1e-3 of the largest.
    """
    settings = {
        "ns_coeffs": "polar_express_paper",
        "ns_steps": 8,
        "compute_dtype": "float32",
    }
    converged = functools.partial(ox.orthogonalize_via_newton_schulz, **settings)
    monkeypatch.setattr(ox, "orthogonalize_via_newton_schulz", converged)


@pytest.fixture
def with_limits(monkeypatch) -> None:
    """Makes `gamma` and `floor` count."""
    limited = functools.partial(scale_by_adago, gamma=GAMMA, floor=FLOOR)
    monkeypatch.setattr(own_optimizer, "scale_by_adago", limited)


# The rule


def matrices_of(x: np.ndarray, over: tuple[int, ...], rows: int) -> np.ndarray:
    """(batch, rows, columns): the matrices of a weight of SHAPES."""
    return x.reshape(3 if len(over) < x.ndim else 1, rows, -1)


def transcription(
    learning_rate: float, weight_decay: float, p: np.ndarray, path: tuple[str, ...]
) -> Iterator[tuple[np.ndarray, set[str]]]:
    """Algorithm 1 of arXiv 2509.02981 on one weight in float64, matrix by matrix.

    Gives the update of each step, and which of `gamma` and `floor` counted in it.
    """
    over, rows = HIDDEN[path]
    weights = matrices_of(np.asarray(p, np.float64), over, rows)
    momentum = np.zeros_like(weights)
    sums = np.zeros(len(weights))
    for step in range(STEPS):
        g = np.asarray(leaf_of(gradients(step), path), np.float64)
        updates, counted = [], set()
        for index, matrix in enumerate(matrices_of(g, over, rows)):
            norm = np.linalg.norm(matrix)
            bounded = min(norm, GAMMA)
            momentum[index] = 0.95 * momentum[index] + 0.05 * matrix
            sums[index] += bounded**2
            length = bounded / np.sqrt(sums[index])
            counted |= {"gamma"} if norm > GAMMA else set()
            counted |= {"floor"} if length < FLOOR else set()
            u, _, v = np.linalg.svd(momentum[index], full_matrices=False)
            direction = max(FLOOR, length) * (u @ v)
            updates.append(-learning_rate * (direction + weight_decay * weights[index]))
        weights += np.stack(updates)
        yield np.stack(updates).reshape(p.shape), counted


def test_agrees_with_the_papers_algorithm(exact, with_limits):
    params = tree(0)
    all_updates, _ = run(adago(0.1, ox.sgd(0.3), weight_decay=0.05), params)
    counted = set()
    for path in HIDDEN:
        expected = transcription(0.1, 0.05, leaf_of(params, path), path)
        for updates, (wanted, limits) in zip(all_updates, expected, strict=True):
            counted |= limits
            # The iteration is exact to 1e-4 in float32 for these matrices, whose
            # smallest singular values are 1e-2 of the largest.
            np.testing.assert_allclose(leaf_of(updates, path), wanted, atol=1e-5)
    assert counted == {"gamma", "floor"}


def test_everything_else_goes_to_the_other_optimizer():
    all_updates, _ = run(adago(0.1, ox.sgd(0.3)), tree(0))
    for step, updates in enumerate(all_updates):
        others = jax.tree.map(lambda g: -0.3 * g, gradients(step))
        for path in (("embedding",), ("layers", "bias"), ("attention", "out", "bias")):
            # One rounding, and XLA may fuse it.
            np.testing.assert_allclose(
                leaf_of(updates, path), leaf_of(others, path), rtol=1e-6
            )


def test_zero_gradients_leave_matrices_where_they_are():
    params = tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = adago(0.1, ox.sgd(0.3), weight_decay=0.0)
    updates, state = update(tx, zeros, init(tx, params), params)
    assert_trees_equal(updates, zeros)
    # And the first step after them has the full length.
    updates, _ = update(tx, gradients(0), state, params)
    for path, (over, rows) in HIDDEN.items():
        for matrix in matrices_of(np.asarray(leaf_of(updates, path)), over, rows):
            # Singular values after five Newton-Schulz steps in bfloat16.
            assert 0.07 < np.linalg.norm(matrix, 2) < 0.13


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"'bias'.*vector"):
        scale_by_adago(ox.MatrixAxes((), (0,))).init({"bias": jnp.ones(3)})


# What it gets for nothing


def test_low_precision_is_computed_in_float32_and_rounded_once():
    tx = adago(0.1, ox.sgd(0.3, momentum=0.9))
    narrow = tree(0, "bfloat16")
    wide = optax.tree.cast(narrow, "float32")
    state = init(tx, narrow)
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
    grads = gradients(0, "bfloat16")
    updates, new_state = update(tx, grads, state, narrow)
    exact, _ = update(tx, optax.tree.cast(grads, "float32"), init(tx, wide), wide)
    assert_trees_equal(updates, optax.tree.cast(exact, "bfloat16"))
    assert_same_types(new_state, state)


def test_a_stack_is_its_layers_one_by_one():
    params = {"layers": tree(0)["layers"]}
    grads = [{"layers": gradients(step)["layers"]} for step in range(STEPS)]
    tx = adago(0.1, ox.adamw(0.01))

    def last_updates(params: Any, grads: list[Any]) -> Any:
        state, step = init(tx, params), jax.jit(tx.update)
        for each in grads:
            updates, state = step(each, state, params)
        return updates

    stacked = last_updates(params, grads)
    for layer in range(3):
        take = functools.partial(jax.tree.map, lambda x, index=layer: x[index])
        alone = last_updates(take(params), [take(each) for each in grads])
        # The order of sums differs.
        assert_trees_close(take(stacked), alone, rtol=1e-6)


def test_the_momentum_can_be_kept_in_8_bits():
    params = {"dense": {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)}}
    grads = jax.tree.map(
        lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    plain = adago(0.1, ox.adamw(0.01), weight_decay=0.0)
    tx = ox.quantize_state(plain)
    state, plain_state = init(tx, params), init(plain, params)
    step, plain_step = jax.jit(tx.update), jax.jit(plain.update)
    for _ in range(3):
        updates, state = step(grads, state, params)
        exact, plain_state = plain_step(grads, plain_state, params)
    ours = next(
        node
        for node in jax.tree.leaves(
            state, is_leaf=lambda node: isinstance(node, ScaleByAdagoState)
        )
        if isinstance(node, ScaleByAdagoState)
    )
    codes = ours.mu["dense"]["kernel"]
    assert isinstance(codes, ox.QuantizedArray)
    assert codes.codes.shape == (64, 256) and codes.codes.dtype.itemsize == 1
    assert ours.sum_of_squares["dense"]["kernel"].dtype == jnp.float32
    # Codes are 1 % apart, and the polar factor makes more of what the smallest singular
    # values lose by that: 3 % here.
    change = np.asarray(updates["dense"]["kernel"] - exact["dense"]["kernel"])
    size = np.linalg.norm(exact["dense"]["kernel"])
    assert 0 < np.linalg.norm(change) < 0.05 * size


def test_the_state_lies_on_a_mesh_as_the_parameters_do(exact):
    rng = np.random.default_rng(0)
    params = {
        "layers": {
            "kernel": jnp.asarray(rng.normal(size=(4, 8, 16)), jnp.float32),
            "bias": jnp.zeros((4, 16)),
        }
    }
    mesh = jax.make_mesh((2, 4), ("layer", "fsdp"), (AxisType.Auto,) * 2)
    specs = {"layers": {"kernel": P("layer", "fsdp"), "bias": P()}}
    placed = jax.tree.map(
        lambda p, spec: jax.device_put(p, NamedSharding(mesh, spec)), params, specs
    )
    tx = adago(0.1, ox.adamw(0.01))
    shardings = ox.state_sharding(tx, placed)
    groups = shardings[0].inner_states["adago"].inner_state[0]
    assert groups.mu["layers"]["kernel"].spec == P("layer", "fsdp", None)
    assert groups.sum_of_squares["layers"]["kernel"].spec == P("layer", None, None)
    state = jax.jit(tx.init, out_shardings=shardings)(placed)
    step = jax.jit(tx.update, out_shardings=(None, shardings))
    updates, state = step(placed, state, placed)
    expected, _ = update(tx, params, init(tx, params), params)
    # Sums over four devices in another order, through eight iterations in float32.
    assert_trees_close(updates, expected, rtol=1e-5)


def test_schedules_and_decay_are_those_of_descend():
    params = tree(0)
    schedule = optax.piecewise_constant_schedule(0.0, {0: 0.0})
    all_updates, _ = run(adago(schedule, ox.sgd(0.0)), params)
    for updates in all_updates:
        assert_trees_equal(updates, jax.tree.map(jnp.zeros_like, params))
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = adago(0.5, ox.sgd(0.3), weight_decay=0.2)
    updates, _ = update(tx, zeros, init(tx, params), params)
    for path in HIDDEN:
        np.testing.assert_allclose(
            leaf_of(updates, path), -0.1 * leaf_of(params, path), rtol=1e-6
        )


# The script


def test_it_is_thirty_lines_on_public_names_alone():
    source = inspect.getsource(own_optimizer)
    lines, module = source.splitlines(), ast.parse(source)
    imported = [node.module for node in module.body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in imported if name.startswith("optaxplus")]
    count = 0
    for node in module.body:
        if getattr(node, "name", None) in {
            "ScaleByAdagoState",
            "scale_by_adago",
            "adago",
        }:
            docstring = node.body[0]
            documented = range(docstring.lineno, docstring.end_lineno + 1)
            count += sum(
                bool(lines[number - 1].split("#")[0].strip())
                for number in range(node.lineno, node.end_lineno + 1)
                if number not in documented
            )
    assert 0 < count <= 30


class Bigrams(nn.Module):
    """Predicts a byte from the one before it; compiles sooner than the GPT."""

    config: own_optimizer.GPTConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(256, 32, name="token_embedding")(tokens)
        x = nn.relu(nn.Dense(128, use_bias=False, name="up")(x))
        return nn.Dense(256, use_bias=False, name="lm_head")(x)


def test_the_readme_shows_the_example():
    def definitions(source: str) -> dict[str, str]:
        """Without docstrings and annotations of the module, by name."""
        found = {}
        for node in ast.parse(source).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
                found[node.name] = ast.unparse(node)
        return found

    readme = (ROOT / "README.md").read_text("utf-8")
    section = readme.partition("## Write your own")[2]
    shown = definitions(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0])
    assert shown.keys() == {"ScaleByAdagoState", "scale_by_adago", "adago"}
    example = definitions(inspect.getsource(own_optimizer))
    assert shown == {name: example[name] for name in shown}


@pytest.mark.slow
def test_the_script_shows_routing_memory_and_losses(monkeypatch, capsys):
    monkeypatch.setattr(own_optimizer, "GPT", Bigrams)
    monkeypatch.setattr(own_optimizer, "BATCH", 2)
    monkeypatch.setattr(own_optimizer, "VALIDATION_BATCHES", 1)
    assert own_optimizer.main(["--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "up/kernel" in printed and "adago: 4,096 parameters" in printed
    assert printed.count("state of adago") == 2
    table = printed.split("2 steps")[1].splitlines()
    rows = {line[1:14].strip(): line[14:].split() for line in table if "." in line}
    assert list(rows) == ["adamw", "adago", "adago, 8 bits"]
    # Untrained, all bytes are about equally likely.
    for loss, _ in rows.values():
        assert float(loss) == pytest.approx(np.log(256), abs=0.8)


@pytest.mark.slow
def test_it_learns_faster_than_adamw_as_a_user_runs_it():
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        [sys.executable, "examples/own_optimizer.py", "--steps", "small"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    losses = [float(number) for number in re.findall(r" (\d\.\d{4}) ", printed)]
    adamw, ours, in_8_bits = losses
    # 3.00, 2.71 and 2.72 where it was written.
    assert ours < adamw - 0.1
    assert abs(in_8_bits - ours) < 0.03
