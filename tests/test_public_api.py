"""What is public, how it is documented, and who imports whom."""

import ast
import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import optaxplus as ox
from tests.cases import CASES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "optaxplus"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first; each may import those before it and its own siblings.
LAYERS = (
    "validation",
    "numerics",
    "custom_types",
    "trees",
    "partition",
    "sharding",
    "transforms",
    "optimizers",
)
# `precision` wraps any transformation, and only named optimizers import it.
PRECISION_IMPORTS = {"validation", "numerics", "custom_types", "trees", "partition"}
# `report` looks at anything; the root says what is public.
ABOVE_ALL = {"report", "__init__", "__main__"}
# Imported by the functions that need them, where those are called.
HEAVY = {"flax", "matplotlib", "orbax", "rich"}


def public(module: Any) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__all__}


FUNCTIONS = {
    name: value
    for module in (ox, ox.numerics, ox.partition, ox.report.plots)
    for name, value in public(module).items()
    if inspect.isfunction(value)
}
FACTORIES = {
    name: value
    for name, value in FUNCTIONS.items()
    if value.__module__.split(".")[1] in ("transforms", "optimizers")
} | {"with_metrics": ox.with_metrics}

CLASSES = {
    name: value
    for module in (ox, ox.numerics)
    for name, value in public(module).items()
    if inspect.isclass(value)
}

each_function = pytest.mark.parametrize("name", sorted(FUNCTIONS))
each_factory = pytest.mark.parametrize("name", sorted(FACTORIES))
each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


# Names


def isort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff sorts imports."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


@pytest.mark.parametrize(
    "module",
    [
        "optaxplus",
        *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "optaxplus.")),
    ],
)
def test_all_is_sorted_and_importable(module: str) -> None:
    loaded = importlib.import_module(module)
    if not hasattr(loaded, "__all__"):
        assert loaded.__file__.endswith("__init__.py") or module.endswith("__main__")
        return
    assert list(loaded.__all__) == sorted(set(loaded.__all__), key=isort_key)
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None


# What several factories are made of; no transformations themselves.
BUILDING_BLOCKS = {
    "bind_hessian",
    "matrices_and_others",
    "matrix_axes_of",
    "orthogonalize",
}


def test_the_root_exports_all_that_transforms_and_optimizers_define() -> None:
    missing = set()
    for package in ("transforms", "optimizers"):
        prefix = f"optaxplus.{package}."
        for info in pkgutil.walk_packages([str(PACKAGE / package)], prefix):
            if info.ispkg:
                continue
            module = importlib.import_module(info.name)
            missing |= {
                name
                for name, value in public(module).items()
                if inspect.isfunction(value) or inspect.isclass(value)
            } - set(ox.__all__)
    assert missing == BUILDING_BLOCKS


def test_nothing_public_is_left_out_of_all() -> None:
    modules = {"numerics", "partition"}
    names = {
        name
        for name, value in vars(ox).items()
        if not name.startswith("_") and (name in modules or not inspect.ismodule(value))
    }
    assert (
        names
        == set(ox.__all__)
        - {name for name in ox.__all__ if inspect.ismodule(getattr(ox, name))}
        | modules
    )


# Functions of parameters, no transformations.
OF_PARAMS = {"decay_mask", "gauss_newton_bartlett", "hutchinson", "qk_clip"}
# Wrappers and plumbing, which are not rows of the table of cases.
NOT_RULES = {"accumulate", "chain_in_float32", *OF_PARAMS}


def test_every_factory_has_a_row_in_the_table() -> None:
    assert {case.name.split("-")[0] for case in CASES} == FACTORIES.keys() - NOT_RULES


# Docstrings


@each_function
def test_docstring(name: str) -> None:
    doc = inspect.getdoc(FUNCTIONS[name])
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert doc, name
    assert doc.split("\n")[0].endswith((".", "…")), doc.split("\n")[0]
    assert "Returns:" in doc
    assert "Example:" in doc
    if parameters and "Arguments and errors as in" not in doc:
        described = doc.partition("Args:\n")[2]
        for parameter in parameters:
            assert re.search(rf"^  \*{{0,2}}{parameter}:", described, re.M), parameter


# Ideas of nobody in particular.
WITHOUT_SOURCE = {"accumulate", "chain_in_float32", "decay_mask", "with_metrics"}


@each_factory
def test_docstring_names_sources_and_links(name: str) -> None:
    doc = inspect.getdoc(FACTORIES[name]) or ""
    assert ("References:" in doc) == (name not in WITHOUT_SOURCE)
    for link in links_of(name):
        assert re.search(rf"\b{link}\b", doc), link


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_docstring_names_attributes(name: str) -> None:
    described = (inspect.getdoc(CLASSES[name]) or "").partition("Attributes:\n")[2]
    fields = getattr(CLASSES[name], "_fields", None)
    for field in fields or [f.name for f in dataclasses.fields(CLASSES[name])]:
        assert re.search(rf"^  {field}: .", described, re.M), field


# Signatures


@each_factory
def test_factory_signature(name: str) -> None:
    parameters = inspect.signature(FACTORIES[name]).parameters.values()
    named = FACTORIES[name].__module__.startswith("optaxplus.optimizers")
    named = named and name not in OF_PARAMS
    for parameter in parameters:
        # optax.inject_hyperparams would take a callable default for a schedule.
        assert not callable(parameter.default) or (
            parameter.default is inspect.Parameter.empty
        ), parameter
        assert parameter.annotation is not inspect.Parameter.empty, parameter
        if named:
            first = parameter.name == "learning_rate"
            kinds = inspect.Parameter
            wanted = kinds.POSITIONAL_OR_KEYWORD if first else kinds.KEYWORD_ONLY
            assert parameter.kind is wanted, parameter


# (optimizer, argument): why its default differs from that of the link.
DIFFERENT_DEFAULTS = {
    ("lamb", "eps"): "the paper's, in TensorFlow Addons and optax",
    ("lars", "trust_coefficient"): "LARS's own; the link's default is LAMB's",
    ("muon", "b1"): "Muon's momentum is slower than Adam's",
    ("muon", "nesterov"): "Muon's momentum is Nesterov's",
    ("adamuon", "b1"): "as Muon's",
    ("adamuon", "nesterov"): "as Muon's",
    ("adamuon", "eps"): "of the squares; that of Newton-Schulz is another quantity",
    ("dion", "shape_scale"): "its spectral norm; the link's default is Muon's",
    ("normuon", "b1"): "as Muon's",
    ("normuon", "nesterov"): "as Muon's",
    ("normuon", "eps"): "of the neurons; that of Newton-Schulz is another quantity",
    ("sgd", "momentum"): "plain unless asked for, as in PyTorch and optax",
    ("adamw", "weight_decay"): "optax's; a chain decays only if asked to",
    ("adan", "decay"): "the authors' default form",
    ("came", "b2"): "CAME's constant rate; Adafactor's grows",
    ("came", "clip_threshold"): "the link alone only divides, as optax's",
    ("came", "eps"): "of the squared gradient; eps_confidence is the other link's",
    ("came", "min_dim_size_to_factor"): "the authors factor every matrix",
    ("lion", "weight_decay"): "optax's; a chain decays only if asked to",
    ("mars", "b1"): "MARS's own; the links' is Adam's",
    ("mars", "b2"): "MARS's own; the link's is Adam's",
    ("mars", "eps"): "Adam's; that of Newton-Schulz is another quantity",
    ("ranger", "b1"): "the author's; the link's is RAdam's",
    ("ranger", "eps"): "the author's; the link's is RAdam's",
    ("ranger", "every_k"): "the author's; the link's is Lookahead's",
    ("rmsprop", "momentum"): "none unless asked for, as in PyTorch",
    ("sophia", "weight_decay"): "the authors'; a chain decays only if asked to",
    ("stable_adamw", "weight_decay"): "optimi's; a chain decays only if asked to",
    ("adafactor", "clip_threshold"): "the link alone only divides, as optax's",
    ("adafactor", "b1"): "no momentum unless asked for, as in the paper",
}


def links_of(name: str) -> set[str]:
    """The factories that a named optimizer calls, in any function of its module."""
    tree = ast.parse(inspect.getsource(FACTORIES[name]))
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return called & FACTORIES.keys() - NOT_RULES


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, value in FACTORIES.items()
        if value.__module__.startswith("optaxplus.optimizers") and name not in OF_PARAMS
    ),
)
def test_defaults_equal_those_of_the_links(name: str) -> None:
    ours = inspect.signature(FACTORIES[name]).parameters
    links = links_of(name)
    assert links
    different = set()
    for link in links:
        theirs = inspect.signature(FACTORIES[link]).parameters
        for argument in (ours.keys() & theirs.keys()) - {"axes", "eps_root"}:
            if ours[argument].default != theirs[argument].default:
                different.add((name, argument))
    expected = {key for key in DIFFERENT_DEFAULTS if key[0] == name}
    assert different == expected


# Imports


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything that is imported anywhere below a node."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_for_types_alone(node: ast.AST) -> bool:
    """Whether it is what stands under `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@each_module
def test_layers(path: Path) -> None:
    layer = layer_of(path)
    needed = {
        name.split(".")[1]
        for name in imports(ast.parse(path.read_text()))
        if name.startswith("optaxplus.")
    }
    if layer in ABOVE_ALL:
        return
    if layer == "precision":
        allowed = PRECISION_IMPORTS
    else:
        allowed = set(LAYERS[: LAYERS.index(layer)])
        allowed |= {"precision"} if layer == "optimizers" else set()
    assert needed <= allowed | {layer}


@each_module
def test_imports_are_public_and_light(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for name in imports(tree):
        assert "._src" not in f".{name}", name
        assert name != "optaxplus" or layer_of(path) in ABOVE_ALL
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {
        name
        for node in ast.walk(tree)
        if isinstance(node, functions) or is_for_types_alone(node)
        for name in imports(node)
    }
    at_module_level = {name.split(".")[0] for name in imports(tree) - inside}
    assert not at_module_level & HEAVY


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for folder in ("optaxplus", "tests", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_stay_readable(path: Path) -> None:
    if "references" not in path.parts:
        assert len(path.read_text().splitlines()) < 500
    assert ast.get_docstring(ast.parse(path.read_text())), "says what it is for"


def test_import_is_light() -> None:
    code = (
        "import sys, json, optaxplus; "
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    loaded = set(json.loads(output))
    assert "optax" in loaded
    assert not loaded & HEAVY


def test_the_version_has_one_source() -> None:
    """What is installed has it, too: after a change of it, `pip install -e .`."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in pyproject["project"]
    assert metadata.version("optaxplus") == ox.__version__


def test_top_level_of_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    folders = {"optaxplus", "tests", "examples", "benchmarks"}
    files = {"pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= folders | files
