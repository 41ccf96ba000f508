# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What a user's program may write: every public name, with the types that it has.

pyright checks this file, in the checkout against the source and in `.ci/run` against
the installed wheel. A wrong call names the error that pyright has to find in it, and
raises when it runs. `tests/test_typing.py` runs everything.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import optaxplus as ox
from optaxplus.numerics import (
    COEFFICIENT_TABLES,
    CoefficientTable,
    inverse_root,
    polar_express_coefficients,
    polar_factor,
)
from optaxplus.report.plots import loss_curves

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 100, 1000)
PARAMS = {"dense": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}}


def version() -> str:
    return assert_type(ox.__version__, str)


def named_optimizers() -> list[optax.GradientTransformationExtraArgs]:
    """Learning rates are numbers, schedules or arrays."""
    assert_type(ox.adamw(1e-3), optax.GradientTransformationExtraArgs)
    assert_type(ox.muon(SCHEDULE), optax.GradientTransformationExtraArgs)
    return [
        ox.adafactor(1e-2),
        ox.adagrad(1e-2),
        ox.adam(SCHEDULE, b1=jnp.asarray(0.9), nesterov=True),
        ox.adam_mini(1e-3),
        ox.adamuon(1e-3),
        ox.adamw(1e-3, weight_decay=0.1, mask=ox.decay_mask, decay="cautious"),
        ox.adamw8bit(1e-3),
        ox.adan(1e-3),
        ox.ademamix(1e-3),
        ox.adopt(1e-3),
        ox.amsgrad(1e-3),
        ox.apollo(1e-2),
        ox.came(1e-3),
        ox.dion(1e-3, rank_fraction=0.5),
        ox.kron(1e-3),
        ox.lamb(1e-3),
        ox.lars(1e-1, momentum=0.9),
        ox.lion(jnp.asarray(1e-4), mu_dtype=jnp.bfloat16),
        ox.lion8bit(1e-4),
        ox.mars(1e-3),
        ox.muon(
            SCHEDULE,
            weight_decay=optax.constant_schedule(0.1),
            ns_coeffs=((3.4445, -4.7750, 2.0315),) * 5,
            rules=ox.DEFAULT_RULES,
            fallback={"adamw": ox.adam(1e-3)},
        ),
        ox.nadam(1e-3),
        ox.normuon(1e-3, placement=None),
        ox.radam(1e-3),
        ox.ranger(1e-3),
        ox.rmsprop(1e-3, mu_dtype="bfloat16"),
        ox.scion(1e-3),
        ox.sgd(1e-1, momentum=0.9),
        ox.shampoo(1e-2),
        ox.signum(1e-4),
        ox.soap(3e-3),
        ox.sophia(1e-4),
        ox.stable_adamw(1e-3),
    ]


def links_and_their_states() -> list[tuple[optax.GradientTransformation, type]]:
    """States are classes that a program may look for."""
    return [
        (ox.descend(SCHEDULE), ox.DescendState),
        (ox.factored_rms(), ox.FactoredRmsState),
        (ox.mars_correction(), ox.MarsCorrectionState),
        (ox.normalize_neurons(axes=ox.infer_matrix_axes), ox.NormalizeNeuronsState),
        (ox.scale_by_adagrad(), ox.ScaleByAdagradState),
        (ox.scale_by_adam(), ox.ScaleByAdamState),
        (ox.scale_by_adam_mini(), ox.ScaleByAdamMiniState),
        (ox.scale_by_adamuon(), ox.ScaleByAdamuonState),
        (ox.scale_by_adan(), ox.ScaleByAdanState),
        (ox.scale_by_ademamix(), ox.ScaleByAdemamixState),
        (ox.scale_by_adopt(), ox.ScaleByAdoptState),
        (ox.scale_by_apollo(), ox.ScaleByApolloState),
        (ox.scale_by_confidence(), ox.ScaleByConfidenceState),
        (ox.scale_by_dion(), ox.ScaleByDionState),
        (ox.scale_by_ema(0.95, nesterov=True), ox.ScaleByEmaState),
        (ox.scale_by_kron(), ox.ScaleByKronState),
        (ox.scale_by_lion(0.9, 0.99), ox.ScaleByLionState),
        (ox.scale_by_momentum(0.9), ox.ScaleByMomentumState),
        (ox.scale_by_nadam(), ox.ScaleByNadamState),
        (ox.scale_by_radam(), ox.ScaleByRadamState),
        (ox.scale_by_rmsprop(), ox.ScaleByRmspropState),
        (ox.scale_by_shampoo(), ox.ScaleByShampooState),
        (ox.scale_by_soap(), ox.ScaleBySoapState),
        (ox.scale_by_sophia(), ox.ScaleBySophiaState),
        (ox.scale_by_stable_adam(), ox.ScaleByStableAdamState),
        # Without state.
        (ox.centralize(), optax.EmptyState),
        (ox.clip_by_global_norm(1.0), optax.EmptyState),
        (ox.clip_update_rms(), optax.EmptyState),
        (ox.orthogonalize_via_newton_schulz(ns_steps=5), optax.EmptyState),
        (ox.scale_by_matrix_shape("keller"), optax.EmptyState),
        (ox.scale_by_norm_lmo("sign", radius=10.0), optax.EmptyState),
        (ox.scale_by_param_rms(), optax.EmptyState),
        (ox.scale_by_sign(), optax.EmptyState),
        (ox.trust_ratio(), optax.EmptyState),
    ]


def wrappers_and_their_states() -> list[tuple[optax.GradientTransformation, type]]:
    """Around a whole optimizer, ours or optax's, or around a direction."""
    return [
        (ox.accumulate(ox.adamw(1e-3), every_k=4), ox.AccumulateState),
        (ox.cautious(ox.scale_by_lion()), ox.CautiousState),
        (ox.compensated(optax.adam(1e-3)), ox.RoundedWeightsState),
        (ox.dynamic_loss_scale(ox.sgd(0.1)), ox.LossScaleState),
        (ox.lookahead(ox.adam(1e-3), every_k=5, alpha=0.5), ox.LookaheadState),
        (ox.master_weights(ox.adamw(1e-3), bits=24), ox.RoundedWeightsState),
        (ox.quantize_state(optax.adamw(1e-3), min_size=1), ox.QuantizedState),
        (ox.stochastic_rounding(ox.lion(1e-4), seed=0), ox.RoundedWeightsState),
        (ox.with_metrics(ox.adamw(1e-3), ox.label_params), ox.MetricsState),
    ]


def one_step() -> None:
    """Chains are optax's, and so are the steps."""
    tx = optax.chain(ox.clip_by_global_norm(1.0), ox.scale_by_lion(), ox.descend(0.1))
    state = tx.init(PARAMS)
    updates, state = tx.update(PARAMS, state, PARAMS)
    optax.apply_updates(PARAMS, updates)
    rounding_once = ox.chain_in_float32(ox.scale_by_sign(), optax.scale(-0.1))
    assert_type(rounding_once, optax.GradientTransformationExtraArgs)
    injected = optax.inject_hyperparams(ox.adamw, hyperparam_dtype=jnp.float32)
    injected(learning_rate=SCHEDULE).init(PARAMS)


def fields_of_states() -> None:
    """A state is a tuple with names, its counters are arrays."""
    # optax says of any state that it is a pytree.
    adam = ox.scale_by_adam().init(PARAMS)
    assert isinstance(adam, ox.ScaleByAdamState)
    assert_type(adam.count, jax.Array)
    count, _, nu, _ = adam
    assert_type(count, jax.Array)
    assert_type(nu, Any)
    state = ox.quantize_state(ox.adam(1e-3), min_size=1).init(PARAMS)
    assert isinstance(state, ox.QuantizedState)
    assert_type(state.count, jax.Array)
    for node in jax.tree.leaves(
        state, is_leaf=lambda node: isinstance(node, ox.QuantizedArray)
    ):
        if isinstance(node, ox.QuantizedArray):
            assert_type(node.codes, jax.Array)
            assert_type(node.dequantize(), jax.Array)
    ox.dequantize_state(state)


def numbers_in_states() -> None:
    scaled = ox.dynamic_loss_scale(ox.with_metrics(ox.sgd(0.1))).init(PARAMS)
    assert_type(ox.loss_scale(scaled), jax.Array)
    assert_type(ox.skipped_steps(scaled), jax.Array)
    assert_type(ox.metrics(scaled), dict[str, dict[str, jax.Array]])


def routing() -> None:
    """Rules are data; which parameter goes where is a table."""

    def square(
        path: str, shape: tuple[int, ...], siblings: Mapping[str, tuple[int, ...]]
    ) -> ox.MatrixAxes | None:
        del path, siblings
        is_square = len(shape) == 2 and shape[0] == shape[1]
        return ox.MatrixAxes((0,), (1,)) if is_square else None

    features = ox.Rule(r"^features/", ox.MatrixAxes((0,), (1,)), "embedding")
    squares = ox.Rule(r"kernel$", square, "square", required=False)
    assert_type(ox.stacked(r"^layers/"), tuple[ox.Rule, ...])
    assert_type(ox.DEFAULT_RULES, tuple[ox.Rule, ...])
    rules = [features, squares, *ox.stacked(r"^layers/"), *ox.DEFAULT_RULES]
    params = {
        "features": {"table": jnp.ones((4, 8))},
        "layers": {"up": jnp.ones((3, 4, 8))},
        **PARAMS,
    }
    table = ox.explain_routing(params, rules, labels={"square": "adamw"})
    assert_type(table, ox.RoutingTable)
    for row in table.rows:
        assert_type(row.path, str)
        assert_type(row.label, str)
        assert_type(row.axes, ox.MatrixAxes)
    assert_type(table.to_dict(), dict[str, Any])
    roles, axes = ox.infer_roles(params, rules), ox.infer_matrix_axes(params, rules)
    assert jax.tree.structure(roles) == jax.tree.structure(axes)
    labels = ox.label_params(PARAMS, ox.DEFAULT_RULES, labels={"hidden": "adamw"})
    optax.partition({"adamw": ox.adamw(1e-3)}, labels)
    factors = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 8))}
    lora = ox.explain_routing(factors, ox.LORA_RULES)
    assert [row.label for row in lora.rows] == ["adamw", "muon"]
    assert ox.partition.infer_roles is ox.infer_roles


def optimizer_of_ones_own() -> optax.GradientTransformationExtraArgs:
    def build(roles: Any, axes: Any) -> optax.GradientTransformation:
        return optax.partition(
            {"hidden": ox.trust_ratio(axes=axes), "vector": optax.identity()},
            lambda _: roles,
        )

    return assert_type(ox.route(build), optax.GradientTransformationExtraArgs)


def memory() -> None:
    """Of arrays, of shapes and of models that have a name."""
    report = ox.memory_report(ox.muon(1e-3), PARAMS, grads_dtype="float32")
    assert_type(report, ox.MemoryReport)
    assert_type(report.total, int)
    assert_type(report.bytes_per_param, float)
    assert_type(report.by_label, dict[str, int])
    shapes = ox.abstract_params("gpt2-small")
    assert ox.memory_report(ox.adamw(1e-3), shapes).num_params > 1e8


def placement() -> None:
    mesh = jax.make_mesh((1,), ("fsdp",))
    specs = {"dense": {"kernel": P("fsdp", None), "bias": P()}}
    how = ox.Placement(mesh, specs, comm_dtype="bfloat16")
    plan = ox.plan_placement(PARAMS, how)
    assert_type(plan, ox.PlacementPlan)
    assert_type(plan.flops, float)
    tx = ox.muon(1e-3, placement=how)
    shardings = ox.state_sharding(tx, PARAMS, how)
    jax.eval_shape(jax.jit(tx.init, out_shardings=shardings), PARAMS)


def functions_of_params() -> None:
    """Masks, estimates of a Hessian, clipped queries and keys."""
    mask = ox.decay_mask(PARAMS)
    assert mask == {"dense": {"kernel": True, "bias": False}}
    key = jax.random.key(0)

    def loss_fn(params: Any) -> jax.Array:
        return jnp.sum(params["dense"]["kernel"] ** 2)

    def logits_fn(params: Any) -> jax.Array:
        return jnp.ones((2, 4)) @ params["dense"]["kernel"]

    jax.eval_shape(lambda: ox.hutchinson(loss_fn, PARAMS, key))
    hessian = jax.eval_shape(lambda: ox.gauss_newton_bartlett(logits_fn, PARAMS, key))
    assert hessian["dense"]["kernel"].shape == (4, 8)
    heads = {
        "query": {"kernel": jnp.ones((4, 2, 2))},
        "key": {"kernel": jnp.ones((4, 2, 2))},
    }
    ox.qk_clip(heads, jnp.asarray([1.0, 200.0]), threshold=100.0)


def numerics() -> None:
    """Algorithms on plain arrays."""
    x = jnp.eye(4)
    assert_type(polar_factor(x, compute_dtype="float32"), jax.Array)
    assert_type(inverse_root(x, 4), jax.Array)
    assert_type(COEFFICIENT_TABLES["jordan"], CoefficientTable)
    rows = polar_express_coefficients(5)
    polar_factor(x, ns_steps=5, ns_coeffs=rows)
    assert ox.numerics.polar_factor is polar_factor


def plots() -> Callable[..., Any]:
    """matplotlib is imported by a call, not by this."""
    return loss_curves


@contextmanager
def refused(*errors: type[Exception]) -> Iterator[None]:
    """A call that has to raise."""
    try:
        yield
    except errors:
        return
    raise AssertionError(f"nothing raised {errors}")


def wrong_calls() -> None:
    """An ignored error that pyright does not find is an error itself."""
    report = ox.memory_report(ox.sgd(0.1), PARAMS)
    with refused(TypeError):
        ox.adamw("fast")  # pyright: ignore[reportArgumentType]
    with refused(TypeError):
        ox.adamw(1e-3, 0.9)  # pyright: ignore[reportCallIssue]
    with refused(TypeError):
        ox.muon()  # pyright: ignore[reportCallIssue]
    with refused(TypeError):
        ox.muon(1e-3, rulez=())  # pyright: ignore[reportCallIssue]
    with refused(TypeError):
        ox.muon(1e-3, rules="^layers/")  # pyright: ignore[reportArgumentType]
    with refused(TypeError):
        ox.muon(1e-3, ns_steps=4.5)  # pyright: ignore[reportArgumentType]
    with refused(TypeError):
        ox.quantize_state("adamw")  # pyright: ignore[reportArgumentType]
    with refused(TypeError):
        ox.accumulate(ox.sgd(0.1), every_k="4")  # pyright: ignore[reportArgumentType]
    with refused(TypeError):
        ox.MatrixAxes(0, 1)  # pyright: ignore[reportArgumentType]
    with refused(TypeError):
        ox.Rule("kernel$", (0, 1), "hidden")  # pyright: ignore[reportArgumentType]
    with refused(AttributeError):
        report.total = 0  # pyright: ignore[reportAttributeAccessIssue]
    with refused(AttributeError):
        ox.lars8bit  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018
