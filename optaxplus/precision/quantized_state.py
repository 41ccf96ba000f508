"""Optimizer state in 8 bits, around any transformation.

    u, m <- inner(g, decode(c)),      c <- encode(m, step)

The update is that of the exact m: codes only carry it to the next step.

Codes and their sources: `optaxplus.numerics.quantization`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import PyTree
from optaxplus.numerics.quantization import CODES, dequantize, quantize
from optaxplus.partition.inference import roles_by_path
from optaxplus.partition.rules import DEFAULT_RULES, Rule, check_rules

__all__ = [
    "MOMENTS",
    "QuantizedArray",
    "QuantizedState",
    "dequantize_state",
    "quantize_state",
]

MOMENTS: Mapping[str, str] = MappingProxyType(
    {
        "ema": "signed",
        "hessian": "signed",
        "m1": "signed",
        "mu": "signed",
        "mu_diff": "signed",
        "nu": "unsigned",
        "nu_max": "unsigned",
        "sum_of_squares": "unsigned",
        "trace": "signed",
    }
)
"""Fields of states, ours and optax's, that hold averages or sums of what `update` was
given, and whether they may be negative. Not among them are fields whose exact value
counts: parameters (`slow`, masters), earlier gradients that the next ones are
subtracted from, bases, sums over micro-batches, and averages over 10,000 steps
(`mu_slow` and `m2` of AdEMAMix), which move by less than the codes resolve: they would
be off by up to a half."""

# Of optax; of all others `nu` is a mean square.
_SIGNED_NU = ("ScaleBySM3State", "SophiaState")

# They subtract the square of mu from nu, of which little is left where both are coded.
_CENTERED = ("ScaleByRStdDevState", "ScaleByRmspropState")

_FOUR_BITS = (
    "with the best code of 4 the update of Adam changes by 18 % where 8 change it by "
    "1 % (benchmarks/state_codes.py), and two codes in a byte would not lie on a mesh "
    "as their parameter does"
)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class QuantizedArray:
    """An array as codes and scales.

    In key paths, and so in checkpoints, the codes are called by what they mean,
    "signed_root" or "unsigned_dynamic": codes are bytes, which Orbax would restore into
    those of another code.

    Attributes:
      codes: One byte an entry, in the shape and sharding of the array.
      scales: At least float32, one number a block, in the shape of the array but for
        the axis along which blocks lie.
      signed: Whether entries may be negative. Static.
      code: Name of the code. Static.
      block_size: About how many entries a block has. Static.
      dtype: Name of the dtype of the array. Static.
    """

    codes: jax.Array
    scales: jax.Array
    signed: bool
    code: str
    block_size: int
    dtype: str

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """For `jax.tree_util`."""
        kind = f"{'signed' if self.signed else 'unsigned'}_{self.code}"
        key = jax.tree_util.GetAttrKey
        children = ((key(kind), self.codes), (key("scales"), self.scales))
        return children, (self.signed, self.code, self.block_size, self.dtype)

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "QuantizedArray":
        """For `jax.tree_util`."""
        return cls(*children, *static)

    def dequantize(self) -> jax.Array:
        """The array."""
        x = dequantize(
            # NNX puts variables in the place of arrays.
            jnp.asarray(self.codes),
            jnp.asarray(self.scales),
            signed=self.signed,
            code=self.code,
            block_size=self.block_size,
        )
        return x.astype(self.dtype)

    def like(self, x: jax.Array, step: jax.Array) -> "QuantizedArray":
        """The array `x` with the same dtype, code and blocks.

        Args:
          x: Real floating-point array of the same shape.
          step: Of the rounding, see `optaxplus.numerics.quantization`; shape (), int32.
        """
        codes, scales = quantize(
            x.astype(self.dtype),
            signed=self.signed,
            code=self.code,
            block_size=self.block_size,
            step=step,
        )
        return replace(self, codes=codes, scales=scales)


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
      count: Finished updates; shape (), int32.
      inner_state: State of the wrapped transformation, with a `QuantizedArray` in the
        place of every large moment.
    """

    count: jax.Array
    inner_state: Any


def dequantize_state(state: PyTree) -> PyTree:
    """Reads the codes of a state. For looking at it: `update` takes it as it is.

    Args:
      state: Any pytree.

    Returns:
      The tree with every `QuantizedArray` replaced by the array that it stands for.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> tx = ox.lion8bit(1e-4)
      >>> state = tx.init({"dense": {"kernel": jnp.ones((512, 512))}})
      >>> mu = optax.tree.get(ox.dequantize_state(state), "mu")
      >>> print(mu["dense"]["kernel"].shape, mu["dense"]["kernel"].dtype)
      (512, 512) float32
    """
    return jax.tree.map(
        lambda node: node.dequantize() if _is_quantized(node) else node,
        state,
        is_leaf=_is_quantized,
    )


def _is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


def quantize_state(
    inner: optax.GradientTransformation,
    *,
    bits: int = 8,
    block_size: int = 256,
    min_size: int = 4096,
    code: str = "root",
    keep: Collection[str] = ("embedding",),
    rules: Sequence[Rule] = DEFAULT_RULES,
    fields: Mapping[str, str] = MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the large moments of any transformation in 8 bits.

    Each moment becomes one byte an entry and a float32 scale for every `block_size`
    entries: of AdamW's 8 bytes per parameter 2.03 are left, of Lion's and Muon's 4
    1.02. Codes have the parameter's shape and lie as it does on a mesh; blocks lie
    along the last axis but one where it is long enough, see
    `optaxplus.numerics.quantization.blocks_of`. State is ordinary arrays in a pytree,
    which Orbax saves as it is; `flax.serialization` does not know `QuantizedArray`.

    Where a block lies on several devices they tell each other their largest entries.
    Nothing else moves if the axis is cut into 2^k pieces with multiples of eight rows
    and has equal blocks: all but axes with odd factors above block_size / 2 have. Up to
    eight devices that share a block have its scales each, more share them out.

    What is kept in float32: parameters with fewer than `min_size` entries or of a role
    in `keep`, whose rows meet a gradient rarely; moments of another shape than their
    parameter (row and column sums); complex moments; everything that is no moment.

    Accuracy of "root": a moment becomes one of the two codes beside it. For a first
    moment they are 1.6 % apart where it is the largest of its block, 6 % at 1/16 of it,
    25 % at 1/256, and 0 is one of them below 6.2e-5; for a second moment 1.6 %, 3 %,
    6 %. Which of them it becomes changes from step to step, so that a moment follows
    its gradients even where a step moves it by less than a gap, as with b2=0.999. What
    the codings of all the steps that a moment remembers add up to, simulated with
    independent gradients (benchmarks/slow_averages.py): first moments are 2 to 3 % off
    with b1 of 0.9 to 0.95 and 6 % with 0.99, in the norm; second moments change updates
    by 4 % with b2=0.95 and 10 % with 0.999, and by 19 % after half of the gradients of
    every block have shrunk to a tenth. There nearest codes, as of "dynamic", make it
    60 %: they stay where they are.

    A second moment never becomes 0: it is at least 2e-10 of the largest in its block,
    and 1.2e-38. Scales are exact, so that results do not depend on the size of
    gradients. NaN and infinite entries leave their block alone; a first moment forgets
    them (0), a second one stays infinite, with an update of 0. ("dynamic" makes them
    the largest of the block.)

    Restore a checkpoint with the `code` and `block_size` that it was saved with: they
    are not in it, and the bytes of one code mean nothing in another.

    Init computes the float32 state of `inner` and then its codes, one leaf after the
    other; `jax.jit(tx.init)` makes the codes alone.

    Args:
      inner: Any transformation, ours or optax's; inside of it are the moments, so it
        may be a whole optimizer.
      bits: 8, and no other number. Static.
      block_size: About how many entries share a scale: from 0.7 to 1.4 times as many,
        and up to four times where an axis cannot be halved, see `blocks_of`. >= 8.
        Static.
      min_size: Parameters with fewer entries keep float32 moments. >= 1. Static.
      code: "root", the rounded root, or "dynamic", the map of bitsandbytes, which is
        less accurate and slower, and loses what is slow. Static.
      keep: Roles whose moments stay in float32, see `optaxplus.infer_roles`. A
        parameter that `rules` cannot decide has no role. Static.
      rules: Ordered rules that give the roles; put your own in front. Static.
      fields: Names of the fields of states that are moments, with "signed" or
        "unsigned", in the place of `optaxplus.precision.quantized_state.MOMENTS`: other
        fields stay in float32. Static.

    Returns:
      A transformation with state `QuantizedState` that emits what `inner` emits.

    Raises:
      TypeError: If an argument has a wrong type.
      ValueError: If an argument is out of range, if `inner` is quantized already, has
        large state in fields with other names only, subtracts its moments from each
        other (centered RMSProp), or has a `nu` that may be negative (optax's SM3 and
        Sophia) while `fields` say that it may not.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((512, 512))}}
      >>> tx = ox.quantize_state(optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> print(sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 512**2)
      2.03...

    References:
      Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv 2110.02861.
    """
    name = "quantize_state"
    validation.check_transformation(name, "inner", inner)
    validation.check_int(name, minimum=1, bits=bits, min_size=min_size)
    validation.check_int(name, minimum=8, block_size=block_size)
    validation.check_choice(name, "code", code, CODES)
    if bits != 8:
        reason = f"; {_FOUR_BITS}" if bits == 4 else ""
        raise ValueError(f"{name}: bits={bits} is not allowed; it must be 8{reason}.")
    if not isinstance(fields, Mapping):
        raise TypeError(
            f"{name}: fields={fields!r} is not allowed; it must be a mapping from "
            "names to 'signed' or 'unsigned'."
        )
    for field_name, kind in fields.items():
        validation.check_choice(
            name, f"fields[{field_name!r}]", kind, ("signed", "unsigned")
        )
    if isinstance(keep, str) or not isinstance(keep, Collection):
        raise TypeError(
            f"{name}: keep={keep!r} is not allowed; it must be a collection of roles, "
            "such as ('embedding',)."
        )
    rules = check_rules(name, rules)
    roles_known = dict.fromkeys(rule.role for rule in (*DEFAULT_RULES, *rules))
    for role in keep:
        validation.check_choice(name, "keep", role, roles_known)
    wrapped = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> QuantizedState:
        state = wrapped.init(params)
        _check_inner(name, state, fields)
        roles = roles_by_path(name, params, rules)
        shapes = {
            path: jnp.shape(leaf)
            for path, leaf in trees.leaves_with_paths(params)
            if jnp.ndim(leaf) and jnp.size(leaf) >= min_size and roles[path] not in keep
        }
        flat, structure = jax.tree_util.tree_flatten_with_path(
            state, is_leaf=trees.is_holder
        )
        nodes, found = [], set()
        for key_path, node in flat:
            (x,) = jax.tree.leaves(node)
            field_name = _field_of(key_path, x, shapes)
            if field_name is not None:
                found.add(field_name)
            if field_name is not None and field_name in fields:
                kind = fields[field_name]
                encoded = _encoded(x, kind == "signed", code, block_size)
                # Linen's boxes are in the gradients too; NNX's are taken off by then.
                is_boxed = hasattr(node, "replace_boxed")
                node = node.replace_boxed(encoded) if is_boxed else encoded
            nodes.append(node)
        if found and not found & set(fields):
            raise ValueError(
                f"{name}: inner has no moment that is known to be one. Name those "
                f"among its fields {', '.join(map(repr, sorted(found)))}, such as "
                f"fields={{{min(found)!r}: 'signed'}}, or 'unsigned' where they are "
                "never negative."
            )
        return QuantizedState(
            jnp.zeros([], jnp.int32), jax.tree.unflatten(structure, nodes)
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, QuantizedState]:
        updates, new = wrapped.update(
            updates, dequantize_state(state.inner_state), params, **extra_args
        )
        encoded = jax.tree.map(
            lambda old, leaf: (
                old.like(leaf, state.count) if _is_quantized(old) else leaf
            ),
            state.inner_state,
            new,
            is_leaf=_is_quantized,
        )
        return updates, QuantizedState(trees.increment(state.count), encoded)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_inner(function: str, state: PyTree, fields: Mapping[str, str]) -> None:
    """Refuses a state whose moments cannot be coded."""

    def is_centered(node: Any) -> bool:
        return type(node).__name__ in _CENTERED and node.mu is not None

    def has_signed_nu(node: Any) -> bool:
        return type(node).__name__ in _SIGNED_NU

    if trees.find_nodes(state, _is_quantized):
        raise ValueError(
            f"{function}: inner is quantized already; take away one of the two."
        )
    if trees.find_nodes(state, is_centered):
        raise ValueError(
            f"{function}: the centered RMSProp inside of inner subtracts the square of "
            "a mean from a mean square, of which the rounding of both leaves little; "
            "use centered=False."
        )
    for node in trees.find_nodes(state, has_signed_nu):
        if fields.get("nu") == "unsigned":
            raise ValueError(
                f"{function}: the field 'nu' of {type(node).__name__} inside of inner "
                "may be negative; say so by fields={'nu': 'signed'}, and name its "
                "other moments there, such as 'mu': 'signed'."
            )


def _field_of(
    key_path: tuple[Any, ...], x: jax.Array, shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """The field of a state that holds `x` for a parameter in `shapes`, if one does."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return None
    for index, key in enumerate(key_path):
        path = trees.path_text(key_path[index + 1 :])
        if hasattr(key, "name") and shapes.get(path) == jnp.shape(x):
            return key.name
    return None


def _encoded(x: jax.Array, signed: bool, code: str, block_size: int) -> QuantizedArray:
    codes, scales = quantize(x, signed=signed, code=code, block_size=block_size)
    return QuantizedArray(codes, scales, signed, code, block_size, x.dtype.name)
