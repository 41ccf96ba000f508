"""The texts: the source code of the Python standard library and Python's manual.

Both are on every machine that runs Python, so the examples need no download. Tests and
generated tables are left out, as they teach a language model little. Whole files, and
whole topics of the manual, go to either part, by a checksum of their path or name, so
nothing in the validation text was seen in training and the split hardly changes from
one Python version to the next.
"""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Not written by hand, or not the library itself.
EXCLUDED_DIRECTORIES = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",  # tables of characters
        "ensurepip",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",  # generated documentation
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
# One file in this many is for validation; of the topics, which are few, one in these.
VALIDATION_SHARE = 20
TOPIC_VALIDATION_SHARE = 5


@dataclass(frozen=True)
class Text:
    """A text in two parts, one byte a token.

    Attributes:
        train: (tokens,), uint8.
        validation: (tokens,), uint8, from other files than `train`.
        files: Number of files, or topics, in both parts.
    """

    train: np.ndarray
    validation: np.ndarray
    files: int

    @property
    def digest(self) -> str:
        """A short checksum; two texts with the same one are the same."""
        checksum = hashlib.sha256(self.train.tobytes())
        checksum.update(self.validation.tobytes())
        return checksum.hexdigest()[:16]


def standard_library() -> Text:
    """Reads the source of the Python standard library, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if is_excluded(relative):
            continue
        name = relative.as_posix().encode()
        is_validation = zlib.crc32(name) % VALIDATION_SHARE == 0
        parts[is_validation].append(path.read_bytes().replace(b"\r\n", b"\n"))
    if not parts[False] or not parts[True]:
        raise FileNotFoundError(
            f"standard_library: found no Python source to learn from in {root}"
        )
    return joined(parts)


def python_manual() -> Text:
    """Reads the topics of Python's manual that `help()` shows, in a fixed order."""
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, topic in sorted(distinct_topics()):
        is_validation = zlib.crc32(name.encode()) % TOPIC_VALIDATION_SHARE == 0
        parts[is_validation].append(topic.encode())
    return joined(parts)


def distinct_topics() -> Iterator[tuple[str, str]]:
    """Names and texts of the topics that are not a section of a longer one."""
    # Only this text needs it, and some distributions of Python leave it out.
    from pydoc_data.topics import topics

    longer: list[set[str]] = []
    for name, topic in sorted(topics.items(), key=lambda item: -len(item[1])):
        # The lines under titles differ between a topic and the same as a section.
        lines = {line for line in topic.splitlines() if " " in line}
        if not any(lines <= other for other in longer):
            longer.append(lines)
            yield name, topic


def joined(parts: dict[bool, list[bytes]]) -> Text:
    """Makes a text of its files for training (False) and for validation (True)."""
    train, validation = (
        np.frombuffer(b"\n".join(parts[key]), np.uint8) for key in (False, True)
    )
    return Text(train, validation, files=len(parts[False]) + len(parts[True]))


def is_excluded(path: Path) -> bool:
    """Whether a file of the standard library, by its relative path, is left out."""
    directories = path.parts[:-1]
    generated = path.name.startswith("_sysconfigdata")
    return generated or any(
        name in EXCLUDED_DIRECTORIES or name.startswith("config-")
        for name in directories
    )


def training_batch(
    tokens: np.ndarray, *, seed: int, step: int, batch: int, context: int
) -> np.ndarray:
    """Cuts random windows out of a text.

    The windows depend on `seed` and `step` alone. Every optimizer therefore sees the
    same data in the same order, and a resumed run needs no saved position.

    Args:
        tokens: (tokens,), uint8.
        seed: The seed of the run.
        step: The step whose batch is wanted.
        batch: Number of windows.
        context: Number of tokens that the model reads.

    Returns:
        (batch, context + 1), int32: the inputs, and the targets one place further on.
    """
    generator = np.random.default_rng((seed, step))
    starts = generator.integers(len(tokens) - context, size=batch)
    return tokens[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def validation_batches(
    tokens: np.ndarray, *, batches: int, batch: int, context: int
) -> np.ndarray:
    """Cuts equally spaced windows out of a text: always the same ones.

    Args:
        tokens: (tokens,), uint8.
        batches: Number of batches.
        batch: Number of windows in a batch.
        context: Number of tokens that the model reads.

    Returns:
        (batches, batch, context + 1), int32.
    """
    starts = np.linspace(0, len(tokens) - context - 1, batches * batch).astype(int)
    windows = tokens[starts[:, None] + np.arange(context + 1)].astype(np.int32)
    return windows.reshape(batches, batch, context + 1)
