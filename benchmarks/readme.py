"""Writes the tables of README.md and benchmarks/README.md from package and results.

python benchmarks/readme.py           # rewrites the marked blocks
python benchmarks/readme.py --check   # fails if that would change anything
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

import optaxplus as ox

# A script's own folder, also where the tests load it by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import checkpoint_table
import convergence_report
import guide
import measured
import memory_table
from measured import markdown_table, read
from methods import FROM_OPTAX, METHODS, WRAPPERS, Method
from routing import summary

ROOT = Path(__file__).resolve().parent.parent
MATRIX = {"dense": {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}}
# Rows of the memory table on the first page; all are in benchmarks/README.md.
SHORT = ("adamw", "muon")


# Transformations of a loss, not of gradients.
ESTIMATES = {"gauss_newton_bartlett", "hutchinson"}


def methods_table() -> str:
    """One row per optimizer and wrapper, with the measured bytes of state."""
    around = {method.name for method in WRAPPERS}
    lines = [
        *_table("optimizer", METHODS),
        "",
        "State of a 4096 x 4096 hidden weight matrix in float32. Around any of them, "
        "ours or optax's (`cautious`: around their directions), with the state that "
        "they add:",
        "",
        *_table("wrapper", WRAPPERS),
        "",
        "The links behind them, for chains of your own: "
        f"{_names(lambda name: name not in around and name not in ESTIMATES)}.",
        "",
        "What optax has in good form stays there, and is tested to work inside and "
        "around what is here:",
        "",
        "| from optax | paper | for |",
        "|---|---|---|",
        *(f"| `{name}` | {paper} | {when} |" for name, paper, when in FROM_OPTAX),
    ]
    return "\n".join(lines)


def _table(kind: str, methods: Sequence[Method]) -> list[str]:
    """The lines of a table of methods."""
    lines = [
        f"| {kind} | paper | state, bytes per parameter | use it for | not for |",
        "|---|---|---|---|---|",
    ]
    for method in methods:
        report = ox.memory_report(method.make, MATRIX)
        lines.append(
            f"| `{method.name}` | {method.paper} | "
            f"{report.state / report.num_params:.3g} | {method.when} | "
            f"{method.unless} |"
        )
    return lines


def _names(wanted: Callable[[str], bool]) -> str:
    """The transformations that are wanted, one after the other."""
    return ", ".join(
        f"`{name}`"
        for name in ox.__all__
        if inspect.isfunction(getattr(ox, name))
        and getattr(ox, name).__module__.startswith("optaxplus.transforms")
        and wanted(name)
    )


def main_job() -> str:
    """What the example prints at the end, from its committed results."""
    results = read("train_gpt")
    runs = results["runs"]
    lines = [
        "| optimizer | learning rate | final validation loss | "
        "steps to AdamW's best | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        steps, loss = run["validation"][-1]
        reached = run["steps_to_adamw_best"]
        lines.append(
            f"| {name} | {run['learning_rate']:g} | {loss:.4f} | "
            f"{'not reached' if reached is None else reached} of {steps} | "
            f"{run['seconds']:.0f} |"
        )
    arguments = results["arguments"]
    lines += [
        "",
        "A GPT on the Python standard library's source: validation loss in nats per "
        f"byte on {results['device']}, seed {results['seed']}, width "
        f"{arguments['width']}, each optimizer at the learning rate that a sweep of "
        "equally many trials found best. In the figure the same with three other "
        "seeds: median and range.",
    ]
    return "\n".join(lines)


def which_optimizer() -> str:
    """Which optimizer for what, with what was measured of it."""
    return guide.markdown(convergence_report.load(), read("train_gpt_seeds")["trials"])


def everywhere() -> str:
    """Which optimizers are as good as AdamW on every task, and which on none."""
    return guide.everywhere(convergence_report.load())


def routing() -> str:
    """What Muon gets of five models, from optax and from here."""
    return "\n".join(
        [
            "What `optax.contrib.muon` and `ox.muon` make of five Flax models, both "
            "with their defaults. All hidden weight matrices should reach Muon, every "
            "layer and expert as a matrix of its own, and nothing else:",
            "",
            *markdown_table(summary(read("routing"))),
        ]
    )


def memory() -> str:
    """Some ways to keep a model of 70 billion parameters."""
    document = read("memory_table")
    header, *rows = memory_table.table(document)
    return "\n".join(
        [
            *markdown_table([header, *(row for row in rows if row[0] in SHORT)]),
            "",
            f"Llama 2 70B, {document['rows'][0]['num_params']:,} parameters, GB of 1e9 "
            "bytes before activations, from the real states of the optimizers.",
        ]
    )


PAGES: dict[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {
        "main job": main_job,
        "guide": which_optimizer,
        "everywhere": everywhere,
        "routing": routing,
        "memory": memory,
        "checkpoints": checkpoint_table.markdown,
        "methods": methods_table,
    },
    "benchmarks/README.md": measured.BLOCKS,
}


def render(page: str, text: str) -> str:
    """A page with every marked block written anew."""
    for name, write in PAGES[page].items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{page}: the block {name!r} must occur exactly once")
        block = f"{begin}\n{write()}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args()
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        rendered = render(page, text)
        if not options.check:
            (ROOT / page).write_text(rendered, "utf-8")
        elif rendered != text:
            sys.exit(f"{page} is stale: run {Path(__file__).name}")


if __name__ == "__main__":
    main()
