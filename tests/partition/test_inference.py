"""Boxes, labels and axes, and the errors where nothing decides."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optaxplus as ox
from optaxplus import DEFAULT_RULES, MatrixAxes, Rule
from optaxplus.partition.inference import axes_of, label_of_role
from tests.partition.routing_tables import abstract, routing

# Abstract values and nodes without arrays


def test_shapes_arrays_and_tracers_are_the_same():
    shapes = abstract({"m/kernel": (3, 4, 5), "m/bias": (3, 5)})
    arrays = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    numbers = jax.tree.map(lambda x: np.zeros(x.shape), shapes)
    expected = ox.infer_matrix_axes(shapes)
    seen = []

    def traced(params):
        seen.append(ox.infer_matrix_axes(params))
        return params

    jax.eval_shape(traced, shapes)
    jax.jit(traced)(arrays)
    for tree in (*seen, ox.infer_matrix_axes(arrays), ox.infer_matrix_axes(numbers)):
        assert tree == expected
    assert expected["m"]["kernel"] == MatrixAxes((1,), (2,))


@pytest.mark.parametrize(
    "tree",
    [
        {"a": None, "w": jnp.ones((2, 3))},
        {"a": optax.MaskedNode(), "w": jnp.ones((2, 3))},
        {"a": {}, "w": jnp.ones((2, 3))},
        [jnp.ones((2, 3)), (), None],
    ],
    ids=["none", "masked", "empty", "list"],
)
def test_nodes_without_arrays_pass(tree):
    roles = ox.infer_roles(tree)
    assert jax.tree.structure(roles) == jax.tree.structure(tree)
    assert jax.tree.leaves(roles) == ["hidden"]
    assert ox.infer_roles({}) == {}


def test_paths_are_the_names_on_the_way():
    named_tuple = optax.MaskedState(inner_state={"w": jnp.ones((2, 3))})
    tree = {"a": [named_tuple, jnp.ones((2, 3))], "b": (jnp.ones(3),)}
    assert set(routing(tree)) == {"a/0/inner_state/w", "a/1", "b/0"}


def test_two_parameters_of_one_path_are_refused():
    tree = {"a/b": jnp.ones((2, 3)), "a": {"b": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="two parameters have the path 'a/b'"):
        ox.infer_roles(tree)


# Labels


def test_labels():
    tree = abstract(
        {"wte": (11, 6), "w": (6, 6), "b": (6,), "lm_head": (6, 11), "base/w": (6, 6)}
    )
    rules = (Rule(r"^base/", MatrixAxes((0,), (1,)), "frozen"), *DEFAULT_RULES)
    assert ox.label_params(tree, rules) == {
        "wte": "adamw",
        "w": "muon",
        "b": "adamw",
        "lm_head": "adamw",
        "base": {"w": "frozen"},
    }
    renamed = ox.label_params(tree, rules, {"embedding": "slow", "hidden": "adamw"})
    assert renamed["wte"] == "slow"
    assert renamed["w"] == "adamw"
    assert renamed["base"] == {"w": "frozen"}


def test_a_role_of_ones_own_is_its_label():
    assert label_of_role("gate") == "gate"
    assert label_of_role("gate", {"gate": "adamw"}) == "adamw"
    assert label_of_role("other") == "adamw"
    rules = (Rule("gate", MatrixAxes((0,), (1,)), "gate"), *DEFAULT_RULES)
    assert ox.label_params(abstract({"gate": (2, 3)}), rules) == {"gate": "gate"}


@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
def test_label_params_is_a_callable_for_optax(combine):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    tx = combine(
        {"muon": optax.scale(-2.0), "adamw": optax.scale(-3.0)}, ox.label_params
    )
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], np.full((2, 3), -2.0))
    np.testing.assert_array_equal(updates["b"], np.full(3, -3.0))


# Errors


INFER = [ox.infer_matrix_axes, ox.infer_roles, ox.label_params]


def suggested_rules(message: str) -> list[Rule]:
    """The rules that an error offers, as a reader would paste them."""
    line = r"^  (?:rule_\d = |# or: )(ox\.Rule\(.*\))  # "
    texts = re.findall(line, message, re.MULTILINE)
    return [eval(text, {"ox": ox}) for text in texts]


@pytest.mark.parametrize("infer", INFER)
@pytest.mark.parametrize("path", ["mixer/w_in", "block.0/mlp-in/kernel", "a b/c+d"])
def test_undecided_parameters_name_rules_that_work(infer, path: str):
    tree = abstract({path: (8, 6, 24), "w": (2, 3)})
    with pytest.raises(ValueError, match=f"{infer.__name__}: no rule decides") as error:
        infer(tree)
    message = str(error.value)
    assert f"{path!r} of shape (8, 6, 24)" in message
    assert "'w'" not in message
    decided = [
        routing(tree, (rule, *DEFAULT_RULES))[path] for rule in suggested_rules(message)
    ]
    matrices = [
        ("hidden", (1,), (2,)),
        ("hidden", (0, 1), (2,)),
        ("hidden", (0,), (1, 2)),
    ]
    # What is called a kernel is no table and no vector.
    others = [("embedding", (1,), (2,)), ("vector", (), (0, 1, 2))]
    assert decided == matrices + ([] if "kernel" in path else others)
    # The first ones can be pasted as they are, the others are comments.
    pasted = {}
    lines = message.splitlines()
    exec("\n".join(x.strip() for x in lines if "ox.Rule(" in x), {"ox": ox}, pasted)
    passed = re.search(r"^and pass rules=(.*)\.$", message, re.MULTILINE)
    assert passed is not None
    rules = eval(passed[1], {"ox": ox, **pasted})
    assert routing(tree, rules)[path] == ("hidden", (1,), (2,))


def test_undecided_biases_name_rules_that_work():
    tree = abstract({"m/bias": (3, 5)})
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(tree)
    decided = [
        routing(tree, (rule, *DEFAULT_RULES))["m/bias"]
        for rule in suggested_rules(str(error.value))
    ]
    assert decided == [
        ("vector", (), (1,)),
        ("vector", (), (0, 1)),
        ("hidden", (0,), (1,)),
    ]


def test_undecided_weights_are_offered_the_order_of_equinox():
    tree = abstract({"convs/0/weight": (8, 4, 3, 3), "w": (2, 3)})
    with pytest.raises(ValueError, match="36 -> 8: Equinox's") as error:
        ox.infer_roles(tree)
    rule = suggested_rules(str(error.value))[0]
    decided = routing(tree, (rule, *DEFAULT_RULES))["convs/0/weight"]
    assert decided == ("hidden", (1, 2, 3), (0,))


def test_one_suggestion_serves_all_that_differ_in_numbers():
    shapes = {f"block_{i}/mixer_{j}": (4, 5, 6) for i in range(12) for j in range(2)}
    tree = abstract(shapes | {"w": (2, 3)})
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(tree)
    rules = suggested_rules(str(error.value))
    assert len(rules) == 5
    routed = routing(tree, (rules[0], *DEFAULT_RULES))
    assert {routed[path] for path in shapes} == {("hidden", (1,), (2,))}


def test_a_stack_without_proof_is_offered_as_a_stack():
    shapes = {"layers/up": (4, 5, 6), "layers/deep/down": (4, 6, 5), "wte": (11, 5)}
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(abstract(shapes))
    message = str(error.value)
    assert "If the first axis of all 2 parameters under 'layers/', of size 4" in message
    rules = re.search(r"^  rules=(\(\*ox\.stacked.*\))$", message, re.MULTILINE)
    assert rules is not None
    routed = routing(abstract(shapes), eval(rules[1], {"ox": ox}))
    assert routed["layers/up"] == routed["layers/deep/down"] == ("hidden", (1,), (2,))


def test_stacks_that_differ_in_numbers_are_offered_together():
    shapes = {f"g{i}/l/{name}": (12, 6, 7) for i in range(12) for name in ("up", "v")}
    shapes |= {"wte": (31, 6)}
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(abstract(shapes))
    rules = re.search(r"^  rules=(.*)$", str(error.value), re.MULTILINE)
    assert rules is not None
    routed = routing(abstract(shapes), eval(rules[1], {"ox": ox}))
    assert {routed[path] for path in shapes if path != "wte"} == {
        ("hidden", (1,), (2,))
    }


def test_every_stack_of_a_model_is_offered():
    shapes = {"a_table": (1, 7, 5), "final/scale": (5,)}
    for stack, layers in (("decoder", 4), ("encoder", 6)):
        shapes |= {f"{stack}/up": (layers, 5, 9), f"{stack}/down": (layers, 9, 5)}
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(abstract(shapes))
    message = str(error.value)
    offered = re.findall(r"^  rules=(.*)$", message, re.MULTILINE)
    assert offered == [
        "(*ox.stacked('^decoder/'), *ox.DEFAULT_RULES)",
        "(*ox.stacked('^encoder/'), *ox.DEFAULT_RULES)",
        "(*ox.stacked('^decoder/'), *ox.stacked('^encoder/'), *ox.DEFAULT_RULES)",
    ]
    # The table, which is none, is offered as a table first.
    table = suggested_rules(message)[0]
    routed = routing(abstract(shapes), (table, *eval(offered[-1], {"ox": ox})))
    assert routed["encoder/up"] == ("hidden", (1,), (2,))
    assert routed["a_table"] == ("embedding", (1,), (2,))


def test_matrices_without_default_rules_are_offered_every_role():
    tree = abstract({"features/embedding": (30, 8), "last/kernel": (8, 30), "b": (3,)})
    rule = Rule("^b$", MatrixAxes((), (0,)), "vector")
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(tree, (rule,))
    offered = [(r.pattern, r.role) for r in suggested_rules(str(error.value))]
    assert offered == [
        *(
            ("^features/embedding$", role)
            for role in ("embedding", "hidden", "head", "vector", "vector")
        ),
        *(("^last/kernel$", role) for role in ("hidden", "head", "vector", "vector")),
    ]


@pytest.mark.parametrize("pattern", ["^deep/", "^deep", ""])
def test_an_axis_that_cannot_count_layers_is_refused(pattern: str):
    tree = abstract({"deep/up": (4, 5, 9), "deep/down": (4, 9, 5)})
    rules = (*ox.stacked(pattern, axis=0), *DEFAULT_RULES)
    assert routing(tree, rules)["deep/up"] == ("hidden", (1,), (2,))
    rules = (*ox.stacked(pattern, axis=1), *DEFAULT_RULES)
    with pytest.raises(ValueError, match=r"9 entries in 'deep/down'.*but 5 in 'deep/"):
        ox.infer_roles(tree, rules)


def test_stacks_of_different_depth_may_share_a_pattern():
    shapes = {f"segment_{i}/up": (layers, 5, 9) for i, layers in enumerate((4, 6))}
    rules = (*ox.stacked("^segment"), *DEFAULT_RULES)
    routed = routing(abstract(shapes), rules)
    assert {*routed.values()} == {("hidden", (1,), (2,))}


def test_a_stack_is_not_offered_where_the_first_axes_differ():
    shapes = {"layers/up": (4, 5, 6), "layers/down": (3, 6, 5)}
    with pytest.raises(ValueError, match="no rule decides") as error:
        ox.infer_roles(abstract(shapes))
    assert "stacked" not in str(error.value)


def test_many_undecided_parameters_are_counted():
    tree = abstract({f"e{index:02}": (2, 3, 4) for index in range(13)})
    with pytest.raises(ValueError, match=r"(?s)'e00' .*'e09' .*and 3 more") as error:
        ox.infer_roles(tree)
    assert "'e10'" not in str(error.value)


def test_rules_without_a_default_leave_vectors_undecided():
    rules = (Rule("w", MatrixAxes((0,), (1,)), "hidden"),)
    message = r"(?s)'b' of shape \(3,\).*rules=\(rule_1, \*rules\)"
    with pytest.raises(ValueError, match=message):
        ox.infer_roles(abstract({"w": (2, 3), "b": (3,)}), rules)


def test_required_rules_that_match_nothing():
    tree = abstract({"block/w": (2, 3)})
    required = Rule(r"blok/w", MatrixAxes((0,), (1,)), "hidden")
    message = r"infer_roles: the rule 'blok/w' matches no parameter.*'block/w'"
    with pytest.raises(ValueError, match=message):
        ox.infer_roles(tree, (required, *DEFAULT_RULES))
    optional = Rule(r"blok/w", MatrixAxes((0,), (1,)), "hidden", required=False)
    assert ox.infer_roles(tree, (optional, *DEFAULT_RULES)) == {
        "block": {"w": "hidden"}
    }
    # A required rule need not be the one that decides.
    behind = Rule(r"block", MatrixAxes((0,), (1,)), "other")
    assert ox.infer_roles(tree, (*DEFAULT_RULES, behind)) == {"block": {"w": "hidden"}}
    # A tree without parameters has nothing that a rule could match.
    assert ox.infer_roles({}, (required,)) == {}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (MatrixAxes((0,), (2,)), "axis 2 is out of range"),
        (MatrixAxes((0,), (-2,)), "names an axis twice"),
        (MatrixAxes((0,), (1,), (2, 2)), "the splits add up to 4"),
        (lambda *_: MatrixAxes((3,), ()), "axis 3 is out of range"),
    ],
)
def test_rules_whose_axes_do_not_fit(axes, message: str):
    message = f"infer_matrix_axes: parameter 'm/w': .*{message}"
    with pytest.raises(ValueError, match=message):
        ox.infer_matrix_axes(abstract({"m/w": (2, 3)}), (Rule("w", axes, "hidden"),))


def test_rules_whose_function_gives_nonsense():
    rule = Rule("w", lambda *_: (0, 1), "hidden")
    message = r"the rule 'w' gave axes=\(0, 1\) for parameter 'm/w'"
    with pytest.raises(TypeError, match=message):
        ox.infer_roles(abstract({"m/w": (2, 3)}), (rule,))


def test_a_forgotten_star_is_pointed_out():
    tree = abstract({"w": (2, 3)})
    for rules in ([DEFAULT_RULES], (ox.stacked("w"), *DEFAULT_RULES)):
        with pytest.raises(TypeError, match=r"rules\[0\] is a .*Put a star before it"):
            ox.infer_roles(tree, rules)


def test_forgotten_defaults_are_pointed_out():
    mine = (Rule("w", MatrixAxes((0,), (1,)), "hidden"),)
    message = r"No default rule is among `rules`: is \*ox.DEFAULT_RULES missing"
    with pytest.raises(ValueError, match=message):
        ox.infer_roles(abstract({"w": (2, 3), "b": (3,)}), mine)


def test_stacks_declared_behind_the_defaults_are_refused():
    message = r"the rules of stacked\('l/'\) stand behind default rules"
    with pytest.raises(ValueError, match=message):
        ox.infer_roles(abstract({"l/w": (2, 3)}), (*DEFAULT_RULES, *ox.stacked("l/")))


@pytest.mark.parametrize("function", [ox.label_params, ox.explain_routing])
def test_labels_for_roles_that_there_are_not_are_refused(function):
    message = rf"{function.__name__}: labels\['hiden'\] is not allowed; .*'hidden'"
    with pytest.raises(ValueError, match=message):
        function(abstract({"w": (2, 3)}), labels={"hiden": "muon"})


@pytest.mark.parametrize("rules", [["w"], [MatrixAxes((0,), (1,))]])
def test_things_that_are_no_rules(rules):
    with pytest.raises(TypeError, match=r"infer_roles: rules=.* must be a Rule"):
        ox.infer_roles(abstract({"w": (2, 3)}), rules)


# The `axes` argument of transformations


def test_axes_of_every_form():
    tree = {"a": {"w": jnp.ones((4, 2, 3)), "v": jnp.ones((4, 2, 3))}, "b": jnp.ones(3)}
    stack, vector = MatrixAxes((1,), (2,)), MatrixAxes((), (0,))
    expected = {"a": {"w": stack, "v": stack}, "b": vector}
    negative = MatrixAxes((-2,), (-1,))
    for axes in (
        expected,
        {"a": stack, "b": vector},  # a prefix
        {"a": negative, "b": vector},
        lambda params: {"a": negative, "b": vector},
    ):
        assert axes_of("test", axes, tree) == expected
    assert axes_of("test", negative, tree["a"]) == expected["a"]
    decided = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    assert axes_of("test", None, decided) == {"w": MatrixAxes((0,), (1,)), "b": vector}


def test_axes_at_masked_leaves_are_ignored():
    tree = {"w": jnp.ones((2, 3)), "m": optax.MaskedNode(), "n": None}
    axes = {"w": MatrixAxes((0,), (1,)), "m": MatrixAxes((5,), (6,)), "n": None}
    assert axes_of("test", axes, tree)["w"] == MatrixAxes((0,), (1,))


def test_masked_trees_give_no_evidence():
    kernel = jnp.ones((3, 4, 5))
    whole = {"m": {"kernel": kernel, "bias": jnp.ones((3, 5))}}
    masked = {"m": {"kernel": kernel, "bias": optax.MaskedNode()}}
    assert axes_of("test", None, whole)["m"]["kernel"] == MatrixAxes((1,), (2,))
    message = (
        r"(?s)test: no rule .*'m/kernel' of shape \(3, 4, 5\).*masked away.*axes=ox.inf"
    )
    with pytest.raises(ValueError, match=message):
        axes_of("test", None, masked)
    # Evidence that is still there does not count either: the mask may hide more.
    other = {**whole, "x": optax.MaskedNode()}
    with pytest.raises(ValueError, match="nothing beside a parameter counts"):
        axes_of("test", None, other)


@pytest.mark.parametrize(
    ("error", "axes", "message"),
    [
        (TypeError, {"w": 3, "b": 4}, "test: axes=4 for parameter 'b' is not allowed"),
        (
            ValueError,
            {"w": MatrixAxes((0,), (1,))},
            "test: axes is not a prefix",
        ),
        (ValueError, [MatrixAxes((0,), (1,))] * 2, "test: axes is not a prefix"),
        (ValueError, MatrixAxes((0,), (1,)), "test: parameter 'b': .* out of range"),
    ],
)
def test_wrong_axes_are_refused(error, axes, message: str):
    tree = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    with pytest.raises(error, match=message):
        axes_of("test", axes, tree)
