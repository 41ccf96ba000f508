"""Every named optimizer trains Flax models, linen and NNX, with decay and a mask."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import optaxplus as ox
from tests.assertions import assert_finite, assert_same_types
from tests.cases import FAMILIES, NAMED, Case

# One row of every factory, of one of each family by default; decay and masks are what
# meets the boxes around parameters.
BY_DEFAULT = {case.factory for case in NAMED if case.name in (*FAMILIES, "soap")}
each_factory = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=[] if factory in BY_DEFAULT else [pytest.mark.slow],
        )
        for factory, case in {case.factory: case for case in NAMED}.items()
    ],
)

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
Y = jnp.sin(X[:, :2])


def decaying(case: Case):
    """The row with weight decay, and without decay of vectors where it has a mask."""
    arguments = {
        name: value
        for name, value in {"weight_decay": 0.1, "mask": ox.decay_mask}.items()
        if name in case.parameters
    }
    return case.make(0.01, **arguments)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.hidden(x)))


@each_factory
def test_nnx(case: Case) -> None:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, decaying(case), wrt=nnx.Param)

    def loss(model):
        return jnp.mean((model(X) - Y) ** 2)

    before = [jnp.copy(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    types = jax.eval_shape(lambda state: state, nnx.state(optimizer))
    for _ in range(1 + case.silent_steps):
        optimizer.update(model, nnx.grad(loss)(model))
    after = nnx.state(model, nnx.Param)
    assert_finite(after)
    for old, new in zip(before, jax.tree.leaves(after), strict=True):
        assert (old != new).any()
    assert_same_types(jax.tree.leaves(nnx.state(optimizer)), jax.tree.leaves(types))


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(0.1), (None, "model"))
        return nn.Dense(2, kernel_init=init, name="head")(nn.Dense(8)(x))


@each_factory
def test_linen_with_boxes(case: Case) -> None:
    model = Boxed()
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=decaying(case))

    def loss(params):
        return jnp.mean((model.apply({"params": params}, X) - Y) ** 2)

    after = state
    for _ in range(1 + case.silent_steps):
        after = after.apply_gradients(grads=jax.grad(loss)(after.params))
    assert_finite(after.params)
    assert jax.tree.structure(after.opt_state) == jax.tree.structure(state.opt_state)
    for old, new in zip(
        jax.tree.leaves(params), jax.tree.leaves(after.params), strict=True
    ):
        assert (old != new).any()


@pytest.mark.parametrize("name", ["muon", "lamb", "adamw"])
def test_a_module_is_a_tree_though_it_can_be_called(name: str) -> None:
    # Of its structure are the axes that are made for it.
    model = Model(nnx.Rngs(0))
    tx = getattr(ox, name)(0.01, mask=ox.decay_mask)
    state = tx.init(model)
    updates, after = tx.update(model, state, model)
    assert_same_types(after, state)
    assert_finite(updates)


def test_a_mask_may_have_the_structure_of_a_module() -> None:
    model = Model(nnx.Rngs(0))
    mask = jax.tree.map(lambda p: p.ndim > 1, model)
    tx = ox.adamw(0.01, mask=mask)
    updates, _ = tx.update(model, tx.init(model), model)
    free = ox.adamw(0.01, weight_decay=0.0)
    plain, _ = free.update(model, free.init(model), model)
    assert (updates.norm.scale[...] == plain.norm.scale[...]).all()
    assert (updates.hidden.kernel[...] != plain.hidden.kernel[...]).any()
