"""The table that lets a user trust the split."""

import json

import jax
import jax.numpy as jnp
import pytest

import optaxplus as ox

PARAMS = {
    "wte": {"embedding": jnp.ones((16, 8))},
    "qkv": jnp.ones((8, 24)),
    "blocks": {"kernel": jnp.ones((3, 8, 32)), "bias": jnp.ones((3, 32))},
    "gain": jnp.ones(()),
}
RULES = (
    ox.Rule(r"^qkv$", ox.MatrixAxes((0,), (1,), splits=(8, 8, 8)), "hidden"),
    *ox.DEFAULT_RULES,
)


def test_every_parameter_has_its_line():
    table = ox.explain_routing(PARAMS, RULES)
    rows = {row.path: row for row in table.rows}
    assert list(rows) == [
        "blocks/bias",
        "blocks/kernel",
        "gain",
        "qkv",
        "wte/embedding",
    ]
    views = {path: (row.label, row.matrix) for path, row in rows.items()}
    assert views == {
        "blocks/bias": ("adamw", "3 x 32"),
        "blocks/kernel": ("muon", "3 x (8 -> 32)"),
        "gain": ("adamw", "1"),
        "qkv": ("muon", "(8 -> 8 | 8 | 8)"),
        "wte/embedding": ("adamw", "(16 -> 8)"),
    }
    assert rows["qkv"].rule == "^qkv$"
    assert rows["blocks/kernel"].rule == "any matrix in a stack"
    assert rows["qkv"].dtype == "float32"
    assert rows["wte/embedding"].role == "embedding"


def test_labels_agree_with_label_params():
    table = ox.explain_routing(PARAMS, RULES)
    labels = jax.tree.leaves(ox.label_params(PARAMS, RULES))
    assert [row.label for row in table.rows] == labels
    assert table.parameters_by_label() == {"adamw": 225, "muon": 960}


def test_prints_and_gives_plain_data():
    table = ox.explain_routing(PARAMS, RULES)
    lines = str(table).splitlines()
    assert len(lines) == len(table.rows) + 3
    assert lines[-1] == "adamw: 225 parameters, muon: 960 parameters"
    data = table.to_dict()
    assert data["parameters"][3]["shape"] == [8, 24]
    assert data["parameters_by_label"] == {"adamw": 225, "muon": 960}


def test_other_labels_and_empty_trees():
    table = ox.explain_routing(PARAMS, RULES, labels={"hidden": "shampoo"})
    assert table.parameters_by_label() == {"adamw": 225, "shampoo": 960}
    assert ox.explain_routing({}).rows == ()
    assert "parameter" in str(ox.explain_routing({}))


def test_undecided_is_an_error_under_its_own_name():
    with pytest.raises(ValueError, match="explain_routing: no rule decides"):
        ox.explain_routing({"mixer": jnp.ones((2, 3, 4))})


# Folding

LAYERS = {f"block_{i}": {"up": jnp.ones((4, 8)), "b": jnp.ones(8)} for i in range(11)}


def folded(tree, rules=ox.DEFAULT_RULES):
    """The paths of the printed table."""
    lines = str(ox.explain_routing(tree, rules)).splitlines()[2:]
    total = next(i for i, line in enumerate(lines) if line.endswith(" parameters"))
    return [line.split("  ")[0] for line in lines[:total]]


def test_identical_layers_share_a_line():
    table = ox.explain_routing(LAYERS)
    assert folded(LAYERS) == ["block_{0-10}/b", "block_{0-10}/up"]
    assert len(table.rows) == len(table.to_dict()["parameters"]) == 22
    assert str(table).splitlines()[-1] == "adamw: 88 parameters, muon: 352 parameters"


def test_gaps_and_several_numbers():
    one = jnp.ones((4, 8))
    assert folded({f"h{i}": one for i in (0, 2, 5)}) == ["h{0,2,5}"]
    grid = {f"h{i}": {f"w{j}": one for j in range(2)} for i in range(3)}
    assert folded(grid) == ["h{0-2}/w{0-1}"]
    del grid["h1"]["w0"]  # no longer all combinations
    assert folded(grid) == ["h0/w0", "h0/w1", "h1/w1", "h2/w0", "h2/w1"]


def test_numbers_written_in_two_ways_stay_apart():
    tree = {"h1": jnp.ones((4, 8)), "h01": jnp.ones((4, 8))}
    assert folded(tree) == ["h01", "h1"]


def test_layers_that_differ_do_not_share_a_line():
    tree = {"h0": jnp.ones((4, 8)), "h1": jnp.ones((4, 9)), "h2": jnp.ones((4, 8))}
    assert folded(tree) == ["h{0,2}", "h1"]
    tree["h2"] = jnp.ones((4, 8), jnp.bfloat16)
    assert folded(tree) == ["h0", "h1", "h2"]
    rules = (ox.Rule("h0", ox.MatrixAxes((0,), (1,)), "frozen"), *ox.DEFAULT_RULES)
    assert folded(tree, rules) == ["h0", "h1", "h2"]


# Notes under the table


def test_overruled_rules_are_shown():
    first = ox.Rule("up$", ox.MatrixAxes((0,), (1,)), "frozen")
    second = ox.Rule("block_[01]/", ox.MatrixAxes((0,), (1,)), "hidden", required=True)
    same = ox.Rule("up$", ox.MatrixAxes((-2,), (-1,)), "frozen", name="the same")
    tree = {f"block_{i}": {"up": jnp.ones((4, 8))} for i in range(2)}
    table = ox.explain_routing(tree, (first, second, same, *ox.DEFAULT_RULES))
    assert [row.overruled for row in table.rows] == [("block_[01]/",)] * 2
    assert str(table).splitlines()[-1] == (
        "block_{0-1}/up: your rule block_[01]/ also matches, but comes later than up$."
    )
    # A default rule that decided first is shown like any other.
    behind = ox.explain_routing(tree, (*ox.DEFAULT_RULES, first))
    assert [row.overruled for row in behind.rows] == [("up$",)] * 2


def test_the_default_rules_are_there_to_be_overruled():
    rules = (ox.Rule("up$", ox.MatrixAxes((0,), (1,)), "frozen"), *ox.DEFAULT_RULES)
    tree = {"layers": {"up": jnp.ones((4, 8))}}
    assert ox.explain_routing(tree, rules).rows[0].overruled == ()
    stacked = (rules[0], *ox.stacked("^layers/"), *ox.DEFAULT_RULES)
    assert ox.explain_routing(tree, stacked).rows[0].overruled == ()


def test_fused_projections_as_one_matrix_are_pointed_out():
    tree = {"query_key_value": {"kernel": jnp.ones((8, 24))}}
    note = "query_key_value/kernel: one matrix, though its name says that several"
    assert str(ox.explain_routing(tree)).splitlines()[-1].startswith(note)
    rule = ox.Rule("kernel$", ox.MatrixAxes((0,), (1,), splits=(8, 8, 8)), "hidden")
    assert "one matrix" not in str(ox.explain_routing(tree, (rule,)))


def test_axes_of_layers_taken_for_those_of_a_matrix_are_pointed_out():
    tree = {"l": {"up": jnp.ones((3, 4, 8)), "norm": {"scale": jnp.ones((3, 5))}}}
    rule = ox.Rule("up$", ox.MatrixAxes((0,), (2,)), "hidden")
    table = ox.explain_routing(tree, (rule, *ox.DEFAULT_RULES))
    note = "l/up: axis 0 counts 3 layers, but the rule up$ takes it for one of a matrix"
    assert str(table).splitlines()[-1].startswith(note)
    negative = ox.Rule("up$", ox.MatrixAxes((-2,), (-1,)), "hidden")
    table = ox.explain_routing(tree, (negative, *ox.DEFAULT_RULES))
    assert "counts 3 layers" not in str(table)
    assert table.rows[-1].matrix == "3 x (4 -> 8)"


def test_what_has_the_shape_of_an_output_head_is_pointed_out():
    tree = {"wte": jnp.ones((31, 8)), "out": {"kernel": jnp.ones((8, 31))}}
    note = "out/kernel: has an output for every entry of wte; if it is the output head"
    assert str(ox.explain_routing(tree)).splitlines()[-1].startswith(note)
    tree = {"wte": jnp.ones((31, 8)), "lm_head": {"kernel": jnp.ones((8, 31))}}
    assert "for every entry" not in str(ox.explain_routing(tree))


BLOCKS = {
    f"block_{i}": {"up": jnp.ones((8, 32)), "down": jnp.ones((32, 8))} for i in range(2)
}


def notes(tree, rules=ox.DEFAULT_RULES):
    """What stands under the totals."""
    lines = str(ox.explain_routing(tree, rules)).splitlines()
    total = next(i for i, line in enumerate(lines) if line.endswith(" parameters"))
    return dict(line.split(": ", 1) for line in lines[total + 1 :])


def test_hidden_layers_need_no_note():
    assert notes(BLOCKS) == {}
    ends = {"wte": jnp.ones((31, 8)), "lm_head": {"kernel": jnp.ones((8, 5))}}
    assert notes(BLOCKS | ends) == {}
    # What one bias proves, and a block by itself.
    assert notes({"mlp": BLOCKS["block_0"]}) == {}


def test_ends_of_the_model_under_unusual_names_are_pointed_out():
    found = notes(BLOCKS | {"features": jnp.ones((31, 8))})
    assert list(found) == ["features"]
    assert found["features"].startswith("nothing else has the size of its input, 31;")
    assert "'embedding'" in found["features"]
    last = {"classify": {"kernel": jnp.ones((8, 5)), "bias": jnp.ones(5)}}
    found = notes(BLOCKS | last)
    assert list(found) == ["classify/kernel"]
    assert "size of its output, 5;" in found["classify/kernel"]
    assert "'head'" in found["classify/kernel"]


def test_an_embedding_and_a_head_that_only_have_each_other_are_pointed_out():
    pair = {"features": jnp.ones((31, 8)), "classify": {"kernel": jnp.ones((8, 31))}}
    found = notes(BLOCKS | pair)
    assert sorted(found) == ["classify/kernel", "features"]
    assert found["features"].startswith("only classify/kernel has its size 31, too;")
    # Where the ends are known, the two are something else.
    wte = {"wte": jnp.ones((17, 8))}
    assert notes(BLOCKS | pair | wte) == {}
    # As an up- and a down-projection are, side by side.
    assert notes(BLOCKS | {"mlp": pair}) == {}


def test_a_router_under_an_unusual_name_is_pointed_out():
    def moe():
        up, down = jnp.ones((4, 8, 32)), jnp.ones((4, 32, 8))
        pick = {"kernel": jnp.ones((8, 4))}
        return {"moe": {"experts": {"up": up, "down": down}, "pick": pick}}

    tree = {"wte": jnp.ones((31, 8)), "block_0": moe(), "block_1": moe()}
    found = notes(tree)
    assert list(found) == ["block_{0-1}/moe/pick/kernel"]
    (note,) = found.values()
    assert note.startswith("has an output for each of the 4 experts of block_0/moe/")
    rule = ox.Rule("pick/kernel$", ox.MatrixAxes((0,), (1,)), "other")
    assert notes(tree, (rule, *ox.DEFAULT_RULES)) == {}


def test_a_misspelt_role_is_pointed_out():
    axes = ox.MatrixAxes((0,), (1,))
    tree = {"features": jnp.ones((31, 8))}
    found = notes(tree, (ox.Rule("features", axes, "embeding"),))
    assert found == {
        "features": "the role 'embeding' is a word of your own; is 'embedding' meant?"
    }
    assert notes(tree, (ox.Rule("features", axes, "sparse"),)) == {}


def test_many_equal_splits_are_counted():
    axes = ox.MatrixAxes((0,), (1,), splits=(16,) * 6)
    rule = ox.Rule("heads$", axes, "hidden")
    (row,) = ox.explain_routing({"heads": jnp.ones((8, 96))}, (rule,)).rows
    assert row.matrix == "(8 -> 6 of 16)"


def test_a_table_shows_itself():
    table = ox.explain_routing(PARAMS, RULES)
    assert repr(table) == str(table)


def test_data_is_json():
    data = json.loads(json.dumps(ox.explain_routing(PARAMS, RULES).to_dict()))
    (row,) = [row for row in data["parameters"] if row["path"] == "blocks/kernel"]
    assert row == {
        "path": "blocks/kernel",
        "shape": [3, 8, 32],
        "dtype": "float32",
        "role": "hidden",
        "label": "muon",
        "axes": {"fan_in": [1], "fan_out": [2], "splits": []},
        "matrix": "3 x (8 -> 32)",
        "rule": "any matrix in a stack",
        "overruled": [],
        "layers": [0],
    }
