"""From rules and a tree of parameters to axes, roles and labels.

Everything here reads paths and shapes alone, so it works on arrays, tracers and
`jax.ShapeDtypeStruct`s, and gives the same answer for parameters and gradients.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from optaxplus import trees
from optaxplus.custom_types import Axes, PyTree
from optaxplus.numerics.matrix_axes import MatrixAxes, resolve_axes
from optaxplus.partition.rules import DEFAULT_RULES, Rule

__all__ = [
    "Decision",
    "axes_of",
    "decide",
    "infer_matrix_axes",
    "infer_roles",
    "label_of_role",
    "label_params",
]


class Decision(NamedTuple):
    """What the rules say of one parameter.

    Attributes:
      path: "/"-joined path.
      shape: Shape of the parameter.
      dtype: Its dtype.
      axes: Its matrix axes, non-negative.
      role: Its role.
      rule: The rule that decided.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: MatrixAxes
    role: str
    rule: Rule


def check_rules(function: str, rules: Any) -> tuple[Rule, ...]:
    """Refuses anything but a sequence of rules, and returns it as a tuple."""
    allowed = "it must be a sequence of Rule, such as (*mine, *DEFAULT_RULES)"
    if not isinstance(rules, Sequence) or isinstance(rules, str):
        raise TypeError(f"{function}: rules={rules!r} is not allowed; {allowed}.")
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"{function}: rules={rule!r} is not allowed; every entry must be a "
                "Rule. Put your own in front: (*mine, *DEFAULT_RULES)."
            )
    return tuple(rules)


def decide(
    function: str,
    params: PyTree,
    rules: Sequence[Rule] = DEFAULT_RULES,
    remedy: str = "rules=(rule, *DEFAULT_RULES)",
) -> list[Decision]:
    """Applies the rules to every parameter, in the order of the tree's leaves.

    Args:
      function: Name of the caller, for messages.
      params: Tree of arrays or abstract arrays. Empty nodes (None, `MaskedNode`) are
        passed over.
      rules: Ordered rules; the first that matches a parameter decides it.
      remedy: The argument that takes the rule which the message of an error suggests.

    Raises:
      TypeError: If `rules` holds anything but rules.
      ValueError: If a parameter is undecided, the axes of a rule do not fit it, or a
        required rule matches nothing.
    """
    rules = check_rules(function, rules)
    leaves = [
        (path, jax.numpy.shape(leaf), jax.numpy.result_type(leaf))
        for path, leaf in trees.leaves_with_paths(params)
    ]
    siblings = {} if _is_masked(params) else _siblings(leaves)
    decisions, undecided = [], []
    for path, shape, dtype in leaves:
        beside = siblings.get(_parent(path), {})
        decision = _first_match(function, path, shape, dtype, beside, rules)
        if decision is None:
            undecided.append((path, shape))
        else:
            decisions.append(decision)
    if undecided:
        raise ValueError(_undecided_message(function, undecided, not siblings, remedy))
    if leaves:
        _check_required(function, rules, [path for path, _, _ in leaves])
    return decisions


def _is_masked(params: PyTree) -> bool:
    def is_mask(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(map(is_mask, jax.tree.leaves(params, is_leaf=is_mask)))


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _siblings(
    leaves: Iterable[tuple[str, tuple[int, ...], Any]],
) -> dict[str, dict[str, tuple[int, ...]]]:
    """For every module, the shapes in it by name and in its neighbours by "../path"."""
    inside: dict[str, dict[str, tuple[int, ...]]] = {}
    around: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, shape, _ in leaves:
        module, _, name = path.rpartition("/")
        inside.setdefault(module, {})[name] = shape
        if module:
            outer, _, inner = module.rpartition("/")
            around.setdefault(outer, {})[f"../{inner}/{name}"] = shape
    return {
        module: names | (around.get(_parent(module), {}) if module else {})
        for module, names in inside.items()
    }


def _first_match(
    function: str,
    path: str,
    shape: tuple[int, ...],
    dtype: Any,
    siblings: Mapping[str, tuple[int, ...]],
    rules: Sequence[Rule],
) -> Decision | None:
    for rule in rules:
        if not re.search(rule.pattern, path):
            continue
        axes = rule.axes
        if not isinstance(axes, MatrixAxes):
            axes = axes(path, shape, siblings)
        if axes is None:
            continue
        if not isinstance(axes, MatrixAxes):
            raise TypeError(
                f"{function}: the rule {rule.pattern!r} gave axes={axes!r} for "
                f"parameter {path!r}; it must give MatrixAxes or None."
            )
        return Decision(
            path, shape, dtype, _fit(function, path, shape, axes), rule.role, rule
        )
    return None


def _fit(
    function: str, path: str, shape: tuple[int, ...], axes: MatrixAxes
) -> MatrixAxes:
    try:
        return resolve_axes(axes, shape)
    except ValueError as error:
        raise ValueError(f"{function}: parameter {path!r}: {error}.") from error


def _undecided_message(
    function: str,
    undecided: Sequence[tuple[str, tuple[int, ...]]],
    masked: bool,
    remedy: str,
) -> str:
    lines = [
        f"{function}: no rule decides what these parameters are:",
        *(f"  {path!r} of shape {shape}" for path, shape in undecided[:10]),
    ]
    if len(undecided) > 10:
        lines.append(f"  and {len(undecided) - 10} more")
    path, shape = undecided[0]
    rank = len(shape)
    example = f"  Rule({'^' + re.escape(path) + '$'!r}, "
    if rank >= 3:
        lines += [
            "Put a rule in front that says which axes are summed over (fan_in) and "
            "which index outputs (fan_out); the others count copies:",
            f"{example}MatrixAxes(({rank - 2},), ({rank - 1},)), 'hidden')"
            "  # a stack of matrices",
            f"{example}MatrixAxes({tuple(range(rank - 1))}, ({rank - 1},)), 'hidden')"
            "  # one matrix, all but the last axis summed over",
            f"and pass {remedy}.",
        ]
    elif rank == 2:
        lines += [
            "Put a rule in front that says what the axes are:",
            f"{example}MatrixAxes((), (1,)), 'vector')  # a stack of vectors",
            f"{example}MatrixAxes((), (0, 1)), 'vector')  # one vector",
            f"{example}MatrixAxes((0,), (1,)), 'hidden')  # a matrix",
            f"and pass {remedy}.",
        ]
    else:
        lines.append(f"Put a rule for it in front: {remedy}.")
    if masked:
        lines.append(
            "Part of the tree is masked away, so nothing beside a parameter counts as "
            "evidence: pass `axes` explicitly, or use optaxplus.route."
        )
    return "\n".join(lines)


def _check_required(function: str, rules: Sequence[Rule], paths: Sequence[str]) -> None:
    for rule in rules:
        if rule.required and not any(re.search(rule.pattern, path) for path in paths):
            raise ValueError(
                f"{function}: the rule {rule.pattern!r} matches no parameter. Correct "
                "its pattern or pass required=False; the paths are "
                f"{', '.join(map(repr, paths[:10]))}"
                f"{', …' if len(paths) > 10 else ''}."
            )


def infer_matrix_axes(params: PyTree, rules: Sequence[Rule] = DEFAULT_RULES) -> PyTree:
    """Says of every parameter which of its axes form a matrix.

    Args:
      params: Tree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      rules: Ordered rules; the first that matches decides. Put your own in front:
        `(*mine, *DEFAULT_RULES)`.

    Returns:
      A pytree of `MatrixAxes` with the structure of `params`; NNX Variables are
      replaced by their axes, as in `nnx.as_pure(state)`.

    Raises:
      ValueError: If no rule decides a parameter, axes do not fit it, or a required
        rule matches nothing.

    Example:
      >>> import jax, optaxplus as ox
      >>> params = {
      ...     "kernel": jax.ShapeDtypeStruct((64, 4, 16), "float32"),
      ...     "bias": jax.ShapeDtypeStruct((4, 16), "float32"),
      ... }
      >>> ox.infer_matrix_axes(params)["kernel"]
      MatrixAxes(fan_in=(0,), fan_out=(1, 2), splits=())
    """
    decisions = decide("infer_matrix_axes", params, rules)
    return trees.unflatten_like(params, [decision.axes for decision in decisions])


def infer_roles(params: PyTree, rules: Sequence[Rule] = DEFAULT_RULES) -> PyTree:
    """Says of every parameter what it is: "hidden", "embedding", "head", "vector", ….

    Arguments and errors as in `infer_matrix_axes`; returns a pytree of strings.
    """
    decisions = decide("infer_roles", params, rules)
    return trees.unflatten_like(params, [decision.role for decision in decisions])


def label_of_role(role: str, labels: Mapping[str, str] | None = None) -> str:
    """The label of a role: which group of the optimizer takes it.

    "hidden" goes to "muon", "frozen" stays "frozen", the other known roles go to
    "adamw", and a role of your own is its own label, unless `labels` says otherwise.
    """
    defaults = {"hidden": "muon", "frozen": "frozen"} | dict.fromkeys(
        ("embedding", "head", "vector", "other"), "adamw"
    )
    return (defaults | dict(labels or {})).get(role, role)


def label_params(
    params: PyTree,
    rules: Sequence[Rule] = DEFAULT_RULES,
    labels: Mapping[str, str] | None = None,
) -> PyTree:
    """Labels every parameter for `optax.partition` or `optax.multi_transform`.

    Args:
      params: Tree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      rules: As in `infer_matrix_axes`.
      labels: Mapping from roles to labels that replaces the defaults: "hidden" is
        "muon", "frozen" is "frozen", the other known roles are "adamw", a role of
        your own is its own label.

    Returns:
      A pytree of strings with the structure of `params`.

    Raises:
      ValueError: As in `infer_matrix_axes`.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> ox.label_params(params)
      {'dense': {'bias': 'adamw', 'kernel': 'muon'}}
      >>> tx = optax.partition(
      ...     {"muon": optax.sgd(0.1), "adamw": optax.adamw(1e-3)}, ox.label_params
      ... )
    """
    decisions = decide("label_params", params, rules)
    return trees.unflatten_like(
        params, [label_of_role(d.role, labels) for d in decisions]
    )


def axes_of(function: str, axes: Axes, tree: PyTree) -> PyTree:
    """Turns the `axes` argument of a transformation into one `MatrixAxes` a leaf.

    Args:
      function: Name of the transformation, for messages.
      axes: See `optaxplus.custom_types`.
      tree: Parameters or updates.

    Returns:
      A pytree of `MatrixAxes` with the structure of `tree`, non-negative and checked
      against the shapes.

    Raises:
      ValueError: If axes do not fit a leaf, with its path, or None leaves one
        undecided.
    """
    if axes is None:
        remedy = "axes=optaxplus.infer_matrix_axes(params, (rule, *DEFAULT_RULES))"
        decisions = decide(function, tree, DEFAULT_RULES, remedy)
        axes = trees.unflatten_like(tree, [d.axes for d in decisions])
    elif callable(axes):
        axes = axes(tree)
    try:
        spread = jax.tree.map(
            lambda entry, subtree: jax.tree.map(lambda _: entry, subtree),
            axes,
            tree,
            is_leaf=lambda node: isinstance(node, MatrixAxes),
        )
    except ValueError as error:
        raise ValueError(
            f"{function}: axes is not a prefix of the parameters' tree: {error}"
        ) from error
    values = []
    for (path, leaf), entry in zip(
        trees.leaves_with_paths(tree), jax.tree.leaves(spread), strict=True
    ):
        if not isinstance(entry, MatrixAxes):
            raise TypeError(
                f"{function}: axes={entry!r} for parameter {path!r} is not allowed; "
                "it must be MatrixAxes."
            )
        values.append(_fit(function, path, jax.numpy.shape(leaf), entry))
    return jax.tree.unflatten(jax.tree.structure(tree), values)
