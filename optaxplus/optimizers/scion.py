"""Scion: every parameter steps within the ball of a norm that fits what it is."""

import re
from collections.abc import Collection, Hashable, Mapping, Sequence

import jax
import optax

from optaxplus import trees, validation
from optaxplus.custom_types import Axes, DTypeName, PyTree, Scalar, ScalarOrSchedule
from optaxplus.numerics.matrix_axes import MatrixAxes
from optaxplus.partition import names
from optaxplus.partition.routing import route
from optaxplus.partition.rules import DEFAULT_RULES, Rule, check_rules
from optaxplus.sharding.placement import Placement, check_placement, check_specs
from optaxplus.transforms.chaining import chain_in_float32
from optaxplus.transforms.clipping import clip_by_global_norm
from optaxplus.transforms.momentum import scale_by_ema
from optaxplus.transforms.norm_lmo import NORMS, scale_by_norm_lmo
from optaxplus.transforms.weight_decay import descend

__all__ = ["SCION_NORMS", "scion"]

# Role -> (norm, radius). The authors train a GPT of width 768 whose head is its
# embedding too: signs, radius 3000, over 768 inputs.
SCION_NORMS: Mapping[str, tuple[str, float]] = {
    "hidden": ("spectral", 50.0),
    "embedding": ("sign", 3000.0 / 768),
    "head": ("sign", 3000.0),
    "vector": ("rms", 50.0),
    "other": ("spectral", 50.0),
}


def scion(
    learning_rate: ScalarOrSchedule,
    *,
    clip_norm: Scalar | None = None,
    b1: Scalar = 0.9,
    norms: Mapping[str, tuple[str, Scalar]] | None = None,
    one_hot_roles: Collection[str] = ("embedding",),
    constrained: bool = True,
    ns_steps: int = 5,
    ns_coeffs: str | Sequence[Sequence[float]] = "gram_newton_schulz",
    method: str = "auto",
    normalization: str = "schatten",
    compute_dtype: str = "bfloat16",
    rules: Sequence[Rule] = DEFAULT_RULES,
    mu_dtype: DTypeName = "float32",
    placement: Placement | str | None = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Scion: momentum, and the point of a norm ball that lies farthest against it.

    Hidden matrices move as in Muon, embeddings and heads by signs, vectors by their
    normalised momentum; no AdamW, and one learning rate for all. What differs between
    layers is the radius of their balls, in units in which it should transfer to models
    of another width. State: 4 bytes per parameter.

    ===========  ====================  ======  =======================================
    role         norm                  radius  direction times radius
    ===========  ====================  ======  =======================================
    "hidden"     "spectral"            50      50·√(fan_out/fan_in) · polar factor
    "embedding"  "sign", one-hot       3.9     3.9 · signs
    "head"       "sign"                3000    3000/fan_in · signs
    "vector"     "rms"                 50      50 · itself over its root mean square
    "other"      "spectral"            50      as "hidden"
    ===========  ====================  ======  =======================================

    The radii are those of the authors' GPT of width 768, which has no vectors (their
    image models give those the radius of hidden matrices) and one table for embedding
    and head; 3.9 is 3000/768. A tied table is an embedding here: at another width give
    it ("sign", 3000 / width) to have their rule. Vectors under the role of an
    embedding, a head or "other" go with "vector", and a layer that reads patches of an
    image, whose inputs are not one-hot, with "other". The factors depend on what is
    fan_in: print `ox.explain_routing(params)` once.

    `constrained` takes the place of weight decay: a parameter moves a part
    `learning_rate` of the way to a point of its ball and never leaves it, as far as
    Newton-Schulz keeps singular values below 1; without, it moves by
    learning_rate * radius, with no bound.

    To start with:

    - learning_rate=2^-12 to 3.6e-4 (GPT, batches of 512 x 1024 tokens), up to 2^-4 with
      b1=0.5 (small CNN, short run); constant, then linearly to 0, without warm-up. Tune
      it and the radii on a narrow model.
    - Constrained parameters have to start inside their balls, else they shrink into
      them by (1 - learning_rate) a step. With the default radii those of Flax's
      initializers do. For small radii the authors start on the boundary:
      `jax.nn.initializers.orthogonal(radius * (fan_out / fan_in) ** 0.5)` for
      "spectral"; random signs times radius / fan_in for "sign", of tables times the
      radius; zero biases.
    - Their models have RMS norms without scales, and activations times √2.

    Links: `clip_by_global_norm`, `scale_by_ema`, `scale_by_norm_lmo`, `descend`.

    Args:
      learning_rate: See `optaxplus.custom_types`. At most 1 if constrained.
      clip_norm: Largest Euclidean norm of the gradients of all trainable parameters
        together, clipped before they are split into groups; > 0, or None for no
        clipping. Static if None.
      b1: Decay rate of the momentum, in [0, 1). The authors' `momentum` is 1 - b1.
      norms: Mapping from roles to pairs (norm, radius > 0), norms as in
        `optaxplus.scale_by_norm_lmo`; roles that are missing keep the default. A role
        of your own needs an entry. The norms are static.
      one_hot_roles: Roles of matrices whose inputs are one-hot, whose fan_in counts as
        1. Static.
      constrained: Whether parameters stay in their balls, which makes `update` need
        params. Static.
      ns_steps: Newton-Schulz steps, >= 1. Static.
      ns_coeffs: Name of a coefficient table or rows (a, b, c), see
        `optaxplus.orthogonalize_via_newton_schulz`. Static.
      method: "standard", "gram" or "auto", whichever multiplies less, see
        `optaxplus.numerics.polar_factor`. Static.
      normalization: "schatten", "frobenius" or "aol", see there. Static.
      compute_dtype: Dtype of the operands of the matrix products. Static.
      rules: What each parameter is, see `optaxplus.infer_matrix_axes`; "frozen"
        parameters have no state and do not move. Static.
      mu_dtype: Dtype of the momentum, see `optaxplus.custom_types`. Static.
      placement: Which device orthogonalizes which matrices, see
        `optaxplus.custom_types`. Static.

    Returns:
      A transformation whose update has the dtype of the gradient and needs params if
      constrained. Its state, the momentum, does not depend on norms and roles, but that
      frozen parameters have none.

    Raises:
      TypeError: If an argument has a wrong type or a parameter is not floating point,
        or complex under "spectral".
      ValueError: If an argument is out of range; at `init`, if no rule decides a
        parameter, a role has no norm, or a vector has a norm of matrices; if `update`
        is called without the params that it needs.

    Example:
      >>> import jax.numpy as jnp, optax, optaxplus as ox
      >>> params = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
      >>> tx = ox.scion(2**-7, norms={"hidden": ("spectral", 3.0)})
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Pethick et al., Training deep learning models with norm-constrained LMOs, arXiv
      2502.07529; LIONS-EPFL/scion, which has ns_coeffs="jordan" and
      normalization="frobenius". Its ScionLight keeps the momentum in the gradient's own
      memory and is left out: gradients in JAX are new arrays in every step.
    """
    name = "scion"
    validation.check_flag(name, constrained=constrained)
    validation.check_learning_rate(name, learning_rate)
    if constrained and not callable(learning_rate):
        validation.check_at_most(name, 1, learning_rate=learning_rate)
    if clip_norm is not None:
        validation.check_positive(name, clip_norm=clip_norm)
    validation.check_decay_rate(name, b1=b1)
    validation.check_floating_dtype(name, mu_dtype=mu_dtype)
    check_placement(name, placement)
    given = {rule.role for rule in check_rules(name, rules)}
    moving = {*SCION_NORMS, *given} - {"frozen"}
    balls = _checked_norms(norms, moving)
    _check_one_hot(one_hot_roles, moving)

    def lmo(role: str, axes: Axes) -> optax.GradientTransformation:
        norm, radius = balls[role]
        return scale_by_norm_lmo(
            norm,
            radius=radius,
            one_hot=role in one_hot_roles,
            ns_steps=ns_steps,
            ns_coeffs=ns_coeffs,
            method=method,
            normalization=normalization,
            compute_dtype=compute_dtype,
            axes=axes,
            placement=placement,
        )

    clip = optax.identity() if clip_norm is None else clip_by_global_norm(clip_norm)
    momentum = optax.chain(clip, scale_by_ema(b1, mu_dtype=mu_dtype))
    step = descend(learning_rate, 1.0 if constrained else 0.0)
    lmo("hidden", None)  # Refuses bad arguments now rather than at init.

    def build(roles: PyTree, axes: PyTree) -> optax.GradientTransformation:
        labels = _labels(roles, axes, balls)
        moves = jax.tree.map(lambda label: label != "frozen", labels)
        groups: dict[Hashable, optax.GradientTransformation] = {
            **{role: lmo(role, axes) for role in balls},
            "frozen": optax.set_to_zero(),
        }
        return optax.chain(
            optax.masked(momentum, moves),
            optax.partition(groups, lambda _: labels),
            optax.masked(step, moves),
        )

    routed = route(build, rules, name=name)

    def init_fn(params: PyTree) -> optax.OptState:
        check_specs(name, placement, params, is_whole=True)
        return routed.init(params)

    return chain_in_float32(
        optax.GradientTransformationExtraArgs(init_fn, routed.update),
        requires_params=name if constrained else None,
    )


def _checked_norms(
    norms: Mapping[str, tuple[str, Scalar]] | None, roles: Collection[str]
) -> dict[str, tuple[str, Scalar]]:
    """The norm and radius of every role, the defaults included."""
    if not isinstance(norms, Mapping | None):
        raise TypeError(
            f"scion: norms={norms!r} is not allowed; it must be a mapping from roles "
            "to pairs (norm, radius)."
        )
    for role, ball in (norms or {}).items():
        argument = f"norms[{role!r}]"
        _check_role(argument, role, roles)
        if not isinstance(ball, tuple | list) or len(ball) != 2:
            raise TypeError(
                f"scion: {argument}={ball!r} is not allowed; it must be a pair (norm, "
                "radius), such as ('spectral', 50.0)."
            )
        norm, radius = ball
        validation.check_choice("scion", f"{argument}[0]", norm, NORMS)
        validation.check_positive("scion", **{f"{argument}[1]": radius})
    return {**SCION_NORMS, **(norms or {})}


def _check_one_hot(one_hot_roles: Collection[str], roles: Collection[str]) -> None:
    if not isinstance(one_hot_roles, Collection) or isinstance(one_hot_roles, str):
        raise TypeError(
            f"scion: one_hot_roles={one_hot_roles!r} is not allowed; it must be a "
            "collection of roles, such as ('embedding',)."
        )
    for role in one_hot_roles:
        _check_role(f"one_hot_roles={one_hot_roles!r}", role, roles)


def _check_role(argument: str, role: str, roles: Collection[str]) -> None:
    if role not in roles:
        raise ValueError(
            f"scion: {argument} is not allowed; no rule gives the role {role!r}. Those "
            f"that have a norm are {', '.join(map(repr, sorted(roles)))}."
        )


def _labels(roles: PyTree, axes: PyTree, balls: Collection[str]) -> PyTree:
    """Which of the groups takes each parameter."""
    by_path = trees.leaves_with_paths(roles)
    paths = {path for path, _ in by_path}
    labels = []
    for (path, role), leaf_axes in zip(by_path, jax.tree.leaves(axes), strict=True):
        if role != "frozen" and role not in balls:
            raise ValueError(
                f"scion: parameter {path!r} has the role {role!r}, which has no norm; "
                f"pass norms={{{role!r}: ('spectral', 50.0)}}, or give the parameter "
                "another role in `rules`."
            )
        labels.append(_label(path, role, leaf_axes, paths))
    return jax.tree.unflatten(jax.tree.structure(roles), labels)


def _label(path: str, role: str, axes: MatrixAxes, paths: Collection[str]) -> str:
    if role in ("embedding", "head", "other") and not axes.is_matrix:
        return "vector"
    if role == "embedding" and _reads_patches(path, paths):
        return "other"
    return role


def _reads_patches(path: str, paths: Collection[str]) -> bool:
    """Whether an embedding is a layer: nothing looks up an entry of a kernel."""
    path = path.replace(".", "/")
    if not re.search(names.PATCHES, path):
        return False
    module, _, array = path.rpartition("/")
    beside = {f"{module}/bias", f"{module}/b"}
    return array == "kernel" or any(p.replace(".", "/") in beside for p in paths)
