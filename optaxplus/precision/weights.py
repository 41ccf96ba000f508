"""Weights in bfloat16 or float16 that do not lose their updates.

bfloat16 has 8 significant bits: an update below 1/512 of its weight is rounded away,
and most are smaller. With weights p, the update u of the inner optimizer, and round()
to the dtype of p:

    master, 32 bits:        w <- w + u,                 p <- round(w)
    master, 24 bits:        w <- w + u to 16 bits,      p <- round(w),   c <- w - p
    stochastic rounding:    p <- one of the two numbers beside p + u, p + u on average
    compensated:            p' <- round(p + u + c),     c <- (p + u + c) - p',   p <- p'

What is emitted is the float32 number that makes `optax.apply_updates` arrive at the
new p (to 2^-24 of the old one, should a step all but cancel it). Nothing may change it:
these wrappers stand outermost. `optax.apply_if_finite`, which wants updates in the
dtype of the gradient, goes inside; `optax.MultiSteps`, `optaxplus.accumulate`,
`quantize_state` and `dynamic_loss_scale` may stand on either side.

Sources: Micikevicius et al., Mixed precision training, arXiv 1710.03740, section 3.1;
24 bits as in FlashOptim, arXiv 2602.23349, here with stochastic rounding; Kahan,
Pracniques: further remarks on reducing truncation errors, CACM 8 (1965), and Zamirai et
al., Revisiting bfloat16 training, arXiv 2010.06192, Algorithms 2 and 3, for
compensated sums and stochastic rounding of weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import PyTree
from optaxplus.numerics.rounding import (
    NARROW,
    join_weight,
    noise_key,
    round_stochastically,
    round_to,
    split_weight,
    uniform_bits,
)

__all__ = [
    "RoundedWeightsState",
    "compensated",
    "master_weights",
    "stochastic_rounding",
]


class RoundedWeightsState(NamedTuple):
    """State of `master_weights`, `stochastic_rounding` and `compensated`.

    Attributes:
      count: Finished updates; shape (), int32.
      kept: What is beside each low-precision parameter, in its shape, and None beside
        wider ones: {"master": w}, float32 (32 bits); {"correction": c}, int8, in 1/256
        of the spacing of p (24 bits); {"lost": c}, in the dtype of p (compensated); {}
        with stochastic rounding.
      inner_state: State of the wrapped optimizer.
    """

    count: jax.Array
    kept: dict[str, PyTree]
    inner_state: Any
    # Refused by what would change the updates, see `trees.check_not_outermost`.
    outermost = True


def master_weights(
    inner: optax.GradientTransformation, *, bits: int = 32, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps a more precise copy of low-precision parameters in the state.

    `inner` sees and moves the precise copy; the parameters are its rounding. Stands
    outermost, over learning rate and decay. Parameters in float32 and wider pass
    through, without a copy. Where somebody else changed a parameter since the last
    update, as `optaxplus.qk_clip` does, it wins over the copy (with 24 bits up to half
    of its last bit).

    Gradients have the dtype of what is differentiated: where they are summed over
    micro-batches (`optax.microbatch`), differentiate by `optax.tree.cast(params,
    "float32")`, or the sum is rounded.

    State beside that of `inner`: 4 bytes per low-precision parameter; with 24 bits 1.

    Args:
      inner: A whole optimizer. It gets gradients and parameters in float32.
      bits: 32, a float32 copy; or 24, the 16 bits of the parameter and 8 more, rounded
        stochastically, so that updates below their resolution (2^-16 to 2^-15 of a
        parameter in bfloat16) are kept on average. Static.
      seed: Of the noise with 24 bits, >= 0, modulo 2^32; other seeds round otherwise.
        Static.

    Returns:
      A transformation with state `RoundedWeightsState` that needs params and
      emits float32.

    Raises:
      TypeError: If `inner` is no transformation, an argument has a wrong type, or a
        parameter is not floating point, is in fewer than 16 bits, or has another dtype
        in `update` than at `init`.
      ValueError: If `bits` is another number or `seed` negative, `inner` keeps weights
        already, or `update` is called without params or with the state of another
        wrapper.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> tx = ox.master_weights(ox.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(10):
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params, round(float(state.kept["master"][0]), 4))
      [0.988281 0.988281] 0.99

    References:
      Micikevicius et al., arXiv 1710.03740, section 3.1; FlashOptim, arXiv 2602.23349
      (24 bits).
    """
    name = "master_weights"
    validation.check_transformation(name, "inner", inner)
    validation.check_int(name, minimum=1, bits=bits)
    validation.check_int(name, minimum=0, seed=seed)
    if bits not in _MASTER:
        raise ValueError(f"{name}: bits={bits} is not allowed; it must be 24 or 32.")
    return _outermost(name, inner, _MASTER[bits], seed)


def stochastic_rounding(
    inner: optax.GradientTransformation, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Rounds low-precision parameters up or down at random, right on average.

    An update of a tenth of the distance to the next number moves one parameter in ten.
    Costs no state, and adds noise of up to that distance to every parameter in every
    step. Stands outermost, over learning rate and decay. Parameters in float32 and
    wider pass through.

    State beside that of `inner`: none.

    Args:
      inner: A whole optimizer. It gets gradients and parameters in float32.
      seed: Of the noise, >= 0, modulo 2^32; other seeds round otherwise. Groups of
        `optax.partition` that have a wrapper each need seeds of their own for noise of
        their own. Static.

    Returns:
      A transformation with state `RoundedWeightsState` that needs params and emits
      float32. The noise depends on the seed, the number of the step and the place of a
      number in its array, so it is the same on any number of devices, and equal for all
      members of a `jax.vmap`.

    Raises:
      TypeError: If `inner` is no transformation, an argument has a wrong type, or a
        parameter is not floating point or in fewer than 16 bits.
      ValueError: If `seed` is negative, `inner` keeps weights already, or `update` is
        called without params or with the state of another wrapper.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = jnp.ones(1000, jnp.bfloat16)
      >>> tx = ox.stochastic_rounding(ox.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(f"{params.mean(dtype=jnp.float32):.3f}")
      0.900

    References:
      Zamirai et al., arXiv 2010.06192.
    """
    name = "stochastic_rounding"
    validation.check_transformation(name, "inner", inner)
    validation.check_int(name, minimum=0, seed=seed)
    return _outermost(name, inner, _STOCHASTIC, seed)


def compensated(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Carries what rounding took from low-precision parameters to the next step.

    Kahan's compensated sum: what an update lost is added to the next one. Stands
    outermost, over learning rate and decay. Parameters in float32 and wider pass
    through. Where somebody else changed a parameter, it stays changed, up to half of
    the spacing that it had.

    The rest has the dtype of the parameter, and so 8 bits in bfloat16: updates below
    2^-17 of a weight stop counting once a quarter of its spacing has been collected.
    `master_weights(bits=24)` has no such limit, and takes one byte.

    State beside that of `inner`: 2 bytes per low-precision parameter.

    Args:
      inner: A whole optimizer. It gets gradients in float32, and parameters in float32
        with what they have lost.

    Returns:
      A transformation with state `RoundedWeightsState` that needs params and emits
      float32.

    Raises:
      TypeError: If `inner` is no transformation, or a parameter is not floating point,
        is in fewer than 16 bits, or has another dtype in `update` than at `init`.
      ValueError: If `inner` keeps weights already, or `update` is called without params
        or with the state of another wrapper.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> tx = ox.compensated(ox.sgd(1e-3))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(params)
      [0.898438 0.898438]

    References:
      Kahan, CACM 8 (1965); Zamirai et al., arXiv 2010.06192.
    """
    name = "compensated"
    validation.check_transformation(name, "inner", inner)
    return _outermost(name, inner, _COMPENSATED)


class _Rule(NamedTuple):
    """How low-precision parameters p are kept, leaf by leaf.

    Attributes:
      begin: Name of what is kept beside p, and what makes it of p; empty if nothing is.
      weight: Makes the float32 weight w of both.
      move: Given p, what is kept, w, its update u, and a function that makes random
        bits: the number that moves p, in float32, and what is kept from then on.
    """

    begin: Mapping[str, Callable[[jax.Array], jax.Array]]
    weight: Callable[[jax.Array, Any], jax.Array]
    move: Callable[
        [jax.Array, Any, jax.Array, jax.Array, Callable[[], jax.Array]],
        tuple[jax.Array, jax.Array | None],
    ]


def _outermost(
    name: str, inner: optax.GradientTransformation, rule: _Rule, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """`inner` moves the weights of the rule, and the parameters follow."""
    wrapped = optax.with_extra_args_support(inner)

    def beside(make: Callable[[jax.Array], jax.Array], params: PyTree) -> PyTree:
        return jax.tree.map(lambda p: make(p) if _is_narrow(p) else None, params)

    def init_fn(params: PyTree) -> RoundedWeightsState:
        trees.check_floating(name, params)
        _check_dtypes(name, params)
        return RoundedWeightsState(
            count=jnp.zeros([], jnp.int32),
            kept={key: beside(make, params) for key, make in rule.begin.items()},
            # State gets copies of parameters, as both may be donated.
            inner_state=_checked(name, wrapped.init(jax.tree.map(trees.widen, params))),
        )

    def weight(p: jax.Array, kept: jax.Array | None) -> jax.Array:
        return rule.weight(p, kept) if _is_narrow(p) else trees.widen(p)

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, RoundedWeightsState]:
        validation.check_params(name, params)
        _check_state(name, state, rule)
        kept = jax.tree.map(lambda _: None, params)
        for kept in state.kept.values():
            _check_kept(name, params, kept)
        weights = jax.tree.map(weight, params, kept)
        updates, inner_state = wrapped.update(
            jax.tree.map(trees.widen, updates), state.inner_state, weights, **extra_args
        )
        structure = jax.tree.structure(updates)
        indices = jax.tree.unflatten(structure, range(structure.num_leaves))

        def move(
            u: jax.Array, p: jax.Array, kept: jax.Array | None, w: jax.Array, index: int
        ) -> tuple[jax.Array, jax.Array | None]:
            if not _is_narrow(p):
                return trees.widen(u), None

            def bits() -> jax.Array:
                key = noise_key(seed % 2**32, state.count, index)
                return uniform_bits(key, p.shape)

            return rule.move(p, kept, w, u, bits)

        updates, kept = trees.map_several(
            move, 2, updates, params, kept, weights, indices
        )
        count = trees.increment(state.count)
        inner_state = trees.cast_like(inner_state, state.inner_state)
        kept = dict.fromkeys(rule.begin, kept)
        return updates, RoundedWeightsState(count, kept, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _master_weight(p: jax.Array, master: jax.Array) -> jax.Array:
    # A parameter that is not the rounding of its copy was changed by somebody.
    wide = trees.widen(p)
    return jnp.where(round_to(master, p.dtype.name) == wide, master, wide)


def _move_master(
    p: jax.Array, master: jax.Array, w: jax.Array, u: jax.Array, bits: Any
) -> tuple[jax.Array, jax.Array]:
    new = w + u
    return round_to(new, p.dtype.name) - trees.widen(p), new


def _move_split(
    p: jax.Array, correction: jax.Array, w: jax.Array, u: jax.Array, bits: Any
) -> tuple[jax.Array, jax.Array]:
    nearest, correction = split_weight(w + u, p.dtype.name, bits())
    return nearest - trees.widen(p), correction


def _move_stochastically(
    p: jax.Array, kept: None, w: jax.Array, u: jax.Array, bits: Any
) -> tuple[jax.Array, None]:
    return round_stochastically(w + u, p.dtype.name, bits()) - w, None


def _move_compensated(
    p: jax.Array, correction: jax.Array, w: jax.Array, u: jax.Array, bits: Any
) -> tuple[jax.Array, jax.Array]:
    p, step, dtype = trees.widen(p), u + trees.widen(correction), p.dtype.name
    new = round_to(p + step, dtype)
    lost = round_to(step - (new - p), dtype)
    # Rounded up to half of a spacing, it would move the parameter by itself.
    moves = round_to(new + lost, dtype) != new
    smaller = jnp.nextafter(lost.astype(dtype), jnp.zeros([], dtype))
    lost = jnp.where(jnp.isfinite(lost), lost, 0.0).astype(dtype)
    return step, jnp.where(moves & jnp.isfinite(new), smaller, lost)


_MASTER = {
    32: _Rule(begin={"master": trees.widen}, weight=_master_weight, move=_move_master),
    24: _Rule(
        begin={"correction": lambda p: jnp.zeros_like(p, jnp.int8)},
        weight=lambda p, c: join_weight(trees.widen(p), c, p.dtype.name),
        move=_move_split,
    ),
}
_STOCHASTIC = _Rule(
    begin={},
    weight=lambda p, _: trees.widen(p),
    move=_move_stochastically,
)
_COMPENSATED = _Rule(
    begin={"lost": jnp.zeros_like},
    weight=lambda p, c: trees.widen(p) + trees.widen(c),
    move=_move_compensated,
)


def _is_narrow(p: jax.Array) -> bool:
    return jnp.result_type(p).name in NARROW


def _check_dtypes(name: str, params: PyTree) -> None:
    """Refuses weights that are too narrow for any of the rules."""
    for path, p in trees.leaves_with_paths(params):
        dtype = jnp.result_type(p)
        if dtype.itemsize < 4 and not _is_narrow(p):
            raise TypeError(
                f"{name}: parameter {path!r} of dtype {dtype} is not allowed; it must "
                f"be {', '.join(NARROW)}, float32 or wider."
            )


def _check_state(name: str, state: Any, rule: _Rule) -> None:
    """Refuses the state of another wrapper, which would be added to the weights."""
    found = list(state.kept) if isinstance(state, RoundedWeightsState) else None
    if found != list(rule.begin):
        it = type(state).__name__ if found is None else f"kept={', '.join(found)!r}"
        raise ValueError(
            f"{name}: a state with {it} is not allowed; it must be of this wrapper, "
            f"with kept={', '.join(rule.begin)!r}: from its init, or from a checkpoint "
            "of it."
        )


def _check_kept(name: str, params: PyTree, kept: PyTree) -> None:
    """Refuses other dtypes than those of `init`: nothing would be kept of them."""

    def check(key_path: tuple[Any, ...], p: jax.Array, beside: Any) -> None:
        if _is_narrow(p) == (beside is None):
            raise TypeError(
                f"{name}: parameter {trees.path_text(key_path)!r} of dtype "
                f"{jnp.result_type(p)} is not allowed; it was "
                f"{'wider' if beside is None else 'narrower'} at init. Give update the "
                "parameters as they are kept, not a copy in another dtype."
            )

    jax.tree_util.tree_map_with_path(check, params, kept)


def _checked(name: str, inner_state: PyTree) -> PyTree:
    """Refuses two wrappers that both decide what the weights become."""

    def keeps_weights(node: Any) -> bool:
        return hasattr(node, "outermost")

    if trees.find_nodes(inner_state, keeps_weights):
        raise ValueError(
            f"{name}: inner decides already how weights are rounded; keep one of "
            "master_weights, stochastic_rounding and compensated, outermost."
        )
    return inner_state
