"""The recorded problem, and the script that needs PyTorch out of collection."""

import numpy as np
import pytest

from tests.references.conventions import Array
from tests.references.torch_trajectories import (
    TorchTrajectories,
    blocks,
    load_torch_trajectories,
)

collect_ignore = ["make_torch_trajectories.py"]


@pytest.fixture(scope="session")
def recorded() -> TorchTrajectories:
    """The recorded runs."""
    return load_torch_trajectories()


@pytest.fixture(scope="session")
def problem(recorded: TorchTrajectories) -> dict[str, tuple[Array, Array]]:
    """The recorded problem by block, and blocks with nothing in them."""
    result: dict[str, tuple[Array, Array]] = {}
    for leaf in recorded.params:
        pairs = zip(
            blocks(recorded.params[leaf], axis=0),
            blocks(recorded.grads[leaf], axis=1),
            strict=True,
        )
        for i, (params, grads) in enumerate(pairs):
            result[f"{leaf}_{i}"] = params.astype(float), grads.astype(float)
    params, grads = result["tall_0"]
    result["zero_params"] = np.zeros_like(params), grads
    result["zero_grads"] = params, np.zeros_like(grads)
    return result
