"""The table that lets a user trust the split."""

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
    assert rows["qkv"].rule == "'^qkv$'"
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
