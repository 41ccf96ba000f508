"""From rules and a tree of parameters to axes, roles and labels.

Everything here reads paths and shapes alone, so it works on arrays, tracers and
`jax.ShapeDtypeStruct`s, and gives the same answer for parameters and gradients.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from optaxplus import trees
from optaxplus.custom_types import Axes, PyTree
from optaxplus.numerics.matrix_axes import MatrixAxes, resolve_axes
from optaxplus.partition.layouts import Undecided
from optaxplus.partition.messages import Stack, stack_candidates, undecided_message
from optaxplus.partition.rules import (
    DEFAULT_RULES,
    LORA_RULES,
    InStack,
    Rule,
    check_rules,
    stacked,
)
from optaxplus.partition.stacks import Shape, layer_shape, with_layer_axes
from optaxplus.partition.views import View

__all__ = [
    "ROLES",
    "Decision",
    "axes_of",
    "check_labels",
    "decide",
    "infer_matrix_axes",
    "infer_roles",
    "label_of_role",
    "label_params",
    "roles_by_path",
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
      overruled: Rules of one's own behind it that say otherwise.
      layers: Axes that the shapes of the whole tree prove to count layers.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: MatrixAxes
    role: str
    rule: Rule
    overruled: tuple[Rule, ...]
    layers: tuple[int, ...]


def decide(
    function: str,
    params: PyTree,
    rules: Sequence[Rule] = DEFAULT_RULES,
    remedy: str = "rules={rules}",
) -> list[Decision]:
    """Applies the rules to every parameter, in the order of the tree's leaves.

    Args:
      function: Name of the caller, for messages.
      params: Tree of arrays or abstract arrays. Empty nodes (None, `MaskedNode`) are
        passed over.
      rules: Ordered rules; the first that matches a parameter decides it.
      remedy: The argument that takes the rules which the message of an error suggests,
        in place of "{rules}".

    Raises:
      TypeError: If `rules` holds anything but rules.
      ValueError: If a parameter is undecided, the axes of a rule do not fit it, a
        required rule matches nothing, or two parameters have the same path.
    """
    rules = check_rules(function, rules)
    _check_order(function, rules)
    named = [repr(known) for known in (DEFAULT_RULES, LORA_RULES) if known == rules]
    leaves = _by_path(function, params)
    shapes = {path: jax.numpy.shape(leaf) for path, leaf in leaves.items()}
    view = View(function, shapes, is_masked=_is_masked(params))
    decisions, undecided = [], {}
    for path, leaf in leaves.items():
        answers = _answers(rules, path, view)
        first = next(answers, None)
        if first is None:
            undecided[path] = shapes[path]
            continue
        rule, axes = first
        overruled = tuple(
            other
            for other, other_axes in answers
            if (other.role, other_axes) != (rule.role, axes)
        )
        decisions.append(
            Decision(
                path=path,
                shape=shapes[path],
                dtype=jax.numpy.result_type(leaf),
                axes=axes,
                role=rule.role,
                rule=rule,
                overruled=overruled,
                layers=view.layers[path],
            )
        )
    if undecided:
        raise ValueError(
            undecided_message(
                function,
                undecided,
                shapes,
                remedy,
                given=named[0] if named else "rules",
                stacks=_stacks_that_decide(undecided, rules, view),
                has_defaults=not all(map(_is_own, rules)),
                is_masked=view.is_masked,
            )
        )
    if leaves:
        _check_required(function, rules, list(shapes))
    return decisions


def roles_by_path(
    function: str, params: PyTree, rules: Sequence[Rule] = DEFAULT_RULES
) -> dict[str, str | None]:
    """The role of every parameter, None where the rules do not decide it.

    Arguments and errors as in `decide`, but for parameters that are undecided.
    """
    rules = check_rules(function, rules)
    _check_order(function, rules)
    leaves = _by_path(function, params)
    shapes = {path: jax.numpy.shape(leaf) for path, leaf in leaves.items()}
    view = View(function, shapes, is_masked=_is_masked(params))
    firsts = {path: next(_answers(rules, path, view), None) for path in leaves}
    return {path: first and first[0].role for path, first in firsts.items()}


def _check_order(function: str, rules: Sequence[Rule]) -> None:
    """Refuses stacks that are declared where the default rules have decided already."""
    is_behind = False
    for rule in rules:
        if isinstance(rule.axes, InStack) and is_behind:
            raise ValueError(
                f"{function}: the rules of stacked({rule.pattern!r}) stand behind "
                "default rules, which decide first; put them in front."
            )
        is_behind |= not isinstance(rule.axes, InStack) and not _is_own(rule)


def _stacks_that_decide(
    undecided: Mapping[str, Shape], rules: Sequence[Rule], view: View
) -> list[Stack]:
    """Stacks with which no parameter in them would be undecided."""
    found = []
    for stack in stack_candidates(undecided, view.shapes):
        tried = (*stacked(stack.pattern, stack.axis), *rules)
        inside = [path for path in undecided if re.search(stack.pattern, path)]
        if stack.fits(view.shapes) and all(
            next(_answers(tried, path, view), None) for path in inside
        ):
            found.append(stack)
    return found


def _by_path(function: str, params: PyTree) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for path, leaf in trees.leaves_with_paths(params):
        if path in leaves:
            raise ValueError(
                f"{function}: two parameters have the path {path!r}, and rules tell "
                "parameters by their paths; rename one of them."
            )
        leaves[path] = leaf
    return leaves


def _is_masked(params: PyTree) -> bool:
    def is_mask(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return any(map(is_mask, jax.tree.leaves(params, is_leaf=is_mask)))


# Whatever is not among them somebody wrote for the model at hand.
_OURS = frozenset((*DEFAULT_RULES, *LORA_RULES))


def _is_own(rule: Rule) -> bool:
    while isinstance(rule.axes, InStack):
        rule = rule.axes.rule
    try:
        return rule not in _OURS
    except TypeError:  # a function without a hash is none of ours
        return True


def _answers(
    rules: Sequence[Rule], path: str, view: View
) -> Iterator[tuple[Rule, MatrixAxes]]:
    """The first rule that decides and its axes, then one's own behind it.

    Default rules are no longer asked of what one of them recognised but could not read,
    or of what is declared a stack: they would take its axis of layers for something
    else.
    """
    is_closed = is_in_stack = False
    for rule in rules:
        is_stack = isinstance(rule.axes, InStack)
        if (is_closed or (is_in_stack and not is_stack)) and not _is_own(rule):
            continue
        is_in_stack |= is_stack and bool(re.search(rule.pattern, path))
        try:
            axes = _axes_by(rule, path, view)
        except Undecided:
            is_closed = True
            continue
        if axes is not None:
            is_closed = True
            yield rule, axes


def _axes_by(rule: Rule, path: str, view: View) -> MatrixAxes | None:
    """The axes that a rule gives a parameter, non-negative; None if it does not."""
    known_as = view.slashed[path] if rule.per_layer else path
    if not re.search(rule.pattern, known_as):
        return None
    axes, shape = rule.axes, view.shapes[path]
    layers = view.layers[path] if rule.per_layer else ()
    if isinstance(axes, InStack):
        layers = (axes.axis,)
        axes = _axes_by(axes.rule, path, view.without(rule.pattern, axes.axis))
    elif not isinstance(axes, MatrixAxes):
        beside = view.siblings_in_layer if rule.per_layer else view.siblings
        axes = axes(known_as, layer_shape(shape, layers), beside(known_as))
    if axes is None:
        return None
    if not isinstance(axes, MatrixAxes):
        raise TypeError(
            f"{view.function}: the rule {rule.pattern!r} gave axes={axes!r} for "
            f"parameter {path!r}; it must give MatrixAxes or None."
        )
    try:
        return with_layer_axes(axes, shape, layers)
    except ValueError as error:
        raise ValueError(f"{view.function}: parameter {path!r}: {error}.") from error


def _check_required(function: str, rules: Sequence[Rule], paths: Sequence[str]) -> None:
    for rule in rules:
        if rule.required and not any(re.search(rule.pattern, path) for path in paths):
            there = ", ".join(map(repr, paths[:10]))
            there += ", …" if len(paths) > 10 else ""
            if rule in LORA_RULES:
                raise ValueError(
                    f"{function}: no parameter is a factor {rule.name[-1]} of a "
                    "low-rank update (lora_a, lora_b), which ox.LORA_RULES are for, "
                    f"and everything would be frozen; the paths are {there}."
                )
            raise ValueError(
                f"{function}: the rule {rule.pattern!r} matches no parameter. Correct "
                f"its pattern or pass required=False; the paths are {there}."
            )


def infer_matrix_axes(params: PyTree, rules: Sequence[Rule] = DEFAULT_RULES) -> PyTree:
    """Says of every parameter which of its axes form a matrix.

    Axes say nothing of roles: what a rule freezes stays still by its label, see
    `label_params`, not by its axes.

    Args:
      params: Tree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      rules: Ordered rules; the first that matches decides. Put your own in front:
        `(*mine, *DEFAULT_RULES)`.

    Returns:
      A pytree of `MatrixAxes` with the structure of `params`; NNX Variables are
      replaced by their axes, as in `nnx.as_pure(state)`.

    Raises:
      TypeError: If `rules` holds anything but rules.
      ValueError: If no rule decides a parameter, axes do not fit it, a required rule
        matches nothing, rules of `stacked` stand behind default ones, or two parameters
        have the same path.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> params = {"kernel": jnp.ones((64, 4, 16)), "bias": jnp.ones((4, 16))}
      >>> ox.infer_matrix_axes(params)["kernel"]
      MatrixAxes(fan_in=(0,), fan_out=(1, 2), splits=())
    """
    decisions = decide("infer_matrix_axes", params, rules)
    return trees.unflatten_like(params, [decision.axes for decision in decisions])


def infer_roles(params: PyTree, rules: Sequence[Rule] = DEFAULT_RULES) -> PyTree:
    """Says of every parameter what it is: "hidden", "embedding", "head", "vector", ….

    Arguments and errors as in `infer_matrix_axes`.

    Returns:
      A pytree of strings with the structure of `params`.

    Example:
      >>> import jax.numpy as jnp, optaxplus as ox
      >>> ox.infer_roles({"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}})
      {'dense': {'bias': 'vector', 'kernel': 'hidden'}}
    """
    decisions = decide("infer_roles", params, rules)
    return trees.unflatten_like(params, [decision.role for decision in decisions])


ROLES = ("hidden", "embedding", "head", "vector", "other", "frozen")
_LABELS = dict.fromkeys(ROLES, "adamw") | {"hidden": "muon", "frozen": "frozen"}


def label_of_role(role: str, labels: Mapping[str, str] | None = None) -> str:
    """The label of a role, with the `labels` of `label_params`."""
    return (_LABELS | dict(labels or {})).get(role, role)


def check_labels(
    function: str, labels: Mapping[str, str] | None, rules: Sequence[Rule]
) -> None:
    """Refuses labels for roles that no rule gives."""
    roles = {*_LABELS, *(rule.role for rule in check_rules(function, rules))}
    for role in labels or ():
        if role not in roles:
            raise ValueError(
                f"{function}: labels[{role!r}] is not allowed; no rule gives this "
                f"role. The roles are {', '.join(map(repr, sorted(roles)))}."
            )


def label_params(
    params: PyTree,
    rules: Sequence[Rule] = DEFAULT_RULES,
    labels: Mapping[str, str] | None = None,
) -> PyTree:
    """Labels every parameter for `optax.partition` or `optax.multi_transform`.

    Args:
      params: Tree of arrays, tracers or `jax.ShapeDtypeStruct`s.
      rules: As in `infer_matrix_axes`.
      labels: Mapping from roles to labels, for roles that are to have others than the
        default: "hidden" is "muon", "frozen" is "frozen", the other known roles are
        "adamw", a role of your own is its own label.

    Returns:
      A pytree of strings with the structure of `params`.

    Raises:
      TypeError: As in `infer_matrix_axes`.
      ValueError: As in `infer_matrix_axes`, or if no rule gives a role in `labels`.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> ox.label_params(params)
      {'dense': {'bias': 'adamw', 'kernel': 'muon'}}
      >>> groups = {"muon": optax.sgd(0.1), "adamw": optax.adamw(1e-3)}
      >>> tx = optax.partition(groups, ox.label_params)
    """
    check_labels("label_params", labels, rules)
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
        remedy = "axes=ox.infer_matrix_axes(params, {rules})"
        decisions = decide(function, tree, DEFAULT_RULES, remedy)
        axes = trees.unflatten_like(tree, [d.axes for d in decisions])
    elif trees.is_function(axes):
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
        try:
            values.append(resolve_axes(entry, jax.numpy.shape(leaf)))
        except ValueError as error:
            raise ValueError(f"{function}: parameter {path!r}: {error}.") from error
    return jax.tree.unflatten(jax.tree.structure(tree), values)
