"""Numbers that other implementations produced in float64, as printed.

Two problems with fixed gradients, and one matrix for Newton-Schulz. ``expected`` is the
result after the last gradient, ``decimals`` how many decimals were printed, so that
half a unit of the last one is the whole tolerance. ``arguments`` are those of the
reference of the same name; what is not given is its default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

VECTOR_PARAMS = [1.0, -2.0, 0.5]
VECTOR_GRADS = [
    [0.1, -0.2, 0.3],
    [0.4, 0.1, -0.5],
    [-0.3, 0.2, 0.1],
    [0.05, -0.6, 0.2],
    [0.2, 0.2, -0.1],
    [0.3, -0.1, 0.4],
    [-0.2, 0.1, 0.15],
]

# Read as (fan_out, fan_in), PyTorch's orientation, by the matrix cases below.
MATRIX_PARAMS = [[1.0, -0.5, 0.25], [0.5, 2.0, -1.0]]
MATRIX_GRADS = [
    [[0.1, -0.2, 0.3], [0.4, 0.1, -0.5]],
    [[-0.3, 0.2, 0.1], [0.05, -0.6, 0.2]],
    [[0.2, 0.2, -0.1], [0.3, -0.1, 0.4]],
]

# You Jiacheng's five rows.
YOU = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


@dataclass(frozen=True)
class GoldenCase:
    """The parameters that a method reaches on one of the two problems.

    Attributes:
        name: unique name, for the test's identifier.
        method: name of the reference.
        problem: "vector" or "matrix".
        arguments: keyword arguments of the reference.
        expected: parameters after the last gradient.
        decimals: number of decimals printed in `expected`.
        source: what produced the numbers.
    """

    name: str
    method: str
    problem: Literal["vector", "matrix"]
    arguments: Mapping[str, Any]
    expected: Sequence[Any]
    decimals: int
    source: str

    @property
    def params(self) -> Sequence[Any]:
        """The initial parameters of the problem."""
        return VECTOR_PARAMS if self.problem == "vector" else MATRIX_PARAMS

    @property
    def grads(self) -> Sequence[Any]:
        """The gradients of the problem, one per step."""
        return VECTOR_GRADS if self.problem == "vector" else MATRIX_GRADS


GOLDEN_CASES = [
    GoldenCase(
        name="sgd_momentum",
        method="sgd",
        problem="vector",
        arguments={"learning_rate": 0.1, "momentum": 0.9},
        expected=[0.77486409, -1.86327728, 0.40413757],
        decimals=8,
        source="PyTorch 2.13 SGD",
    ),
    GoldenCase(
        name="sgd_dampening",
        method="sgd",
        problem="vector",
        arguments={"learning_rate": 0.1, "momentum": 0.9, "dampening": 0.5},
        expected=[0.86134689, -1.87946833, 0.37381332],
        decimals=8,
        source="PyTorch 2.13 SGD",
    ),
    GoldenCase(
        name="sgd_nesterov",
        method="sgd",
        problem="vector",
        arguments={"learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
        expected=[0.742377681, -1.846949552, 0.358723813],
        decimals=9,
        source="PyTorch 2.13 SGD",
    ),
    GoldenCase(
        name="adagrad",
        method="adagrad",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.79822417734, -1.950377400922, 0.379526063205],
        decimals=12,
        source="PyTorch 2.13 Adagrad",
    ),
    GoldenCase(
        name="adagrad_optax",
        method="adagrad",
        problem="vector",
        arguments={
            "learning_rate": 0.1,
            "eps": 0.0,
            "eps_root": 1e-7,
            "initial_accumulator": 0.1,
        },
        expected=[0.88769921166, -1.963278333156, 0.409823298578],
        decimals=12,
        source="optax 0.2.8 adagrad",
    ),
    GoldenCase(
        name="rmsprop",
        method="rmsprop",
        problem="vector",
        arguments={"learning_rate": 0.01},
        expected=[0.797770392971, -1.950963310639, 0.378330472073],
        decimals=12,
        source="PyTorch 2.13 RMSprop",
    ),
    GoldenCase(
        name="rmsprop_centered",
        method="rmsprop",
        problem="vector",
        arguments={"learning_rate": 0.01, "centered": True, "momentum": 0.9},
        expected=[0.063834060033, -1.716760267265, 0.117584568899],
        decimals=12,
        source="PyTorch 2.13 RMSprop",
    ),
    GoldenCase(
        name="rmsprop_optax",
        method="rmsprop",
        problem="vector",
        arguments={"learning_rate": 0.01, "b2": 0.9, "eps": 0.0, "eps_root": 1e-8},
        expected=[0.934660265337, -1.986308049242, 0.45791816981],
        decimals=12,
        source="optax 0.2.8 rmsprop",
    ),
    GoldenCase(
        name="adam",
        method="adam",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.658292960776, -1.804203368462, 0.370765408671],
        decimals=12,
        source="PyTorch 2.13 Adam, optax 0.2.8 adam",
    ),
    GoldenCase(
        name="adam_amsgrad",
        method="adam",
        problem="vector",
        arguments={"learning_rate": 0.1, "amsgrad": True},
        expected=[0.658292960776, -1.804203368462, 0.370765408671],
        decimals=12,
        source="PyTorch 2.13 Adam; the raw second moment never falls here",
    ),
    GoldenCase(
        name="adam_nesterov",
        method="adam",
        problem="vector",
        arguments={"learning_rate": 0.1, "nesterov": True},
        expected=[0.606329442706, -1.818834874303, 0.32770739844],
        decimals=12,
        source="optax 0.2.8 nadam",
    ),
    GoldenCase(
        name="adamw",
        method="adamw",
        problem="vector",
        arguments={"learning_rate": 0.1, "weight_decay": 0.1},
        expected=[0.603067261955, -1.676262314503, 0.341306492528],
        decimals=12,
        source="PyTorch 2.13 AdamW",
    ),
    GoldenCase(
        name="nadam",
        method="nadam",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.746105463181, -1.925317924867, 0.331161040132],
        decimals=12,
        source="PyTorch 2.13 NAdam",
    ),
    GoldenCase(
        name="radam",
        method="radam",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.942837565373, -1.959626144946, 0.481392198309],
        decimals=12,
        source="PyTorch 2.13 RAdam",
    ),
    GoldenCase(
        name="stable_adamw",
        method="stable_adamw",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.665636611902, -1.799004882621, 0.366402942644],
        decimals=12,
        source="optimi's rule",
    ),
    GoldenCase(
        name="adan",
        method="adan",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.766777604781, -1.946490386621, 0.445406189954],
        decimals=12,
        source="the rule of the authors' code",
    ),
    GoldenCase(
        name="adopt",
        method="adopt",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.811368369093, -2.036714499163, 0.710831588757],
        decimals=12,
        source="the rule of the authors' code before its release",
    ),
    GoldenCase(
        name="adopt_clipped",
        method="adopt",
        problem="vector",
        arguments={"learning_rate": 0.1, "clip": True},
        expected=[0.933582090903, -2.041712699551, 0.488980332842],
        decimals=12,
        source="optax 0.2.8 adopt",
    ),
    GoldenCase(
        name="ademamix",
        method="ademamix",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.658066109265, -1.804083396163, 0.370690230158],
        decimals=12,
        source="the rule of the authors' code",
    ),
    GoldenCase(
        name="ademamix_optax",
        method="ademamix",
        problem="vector",
        arguments={"learning_rate": 0.1, "alpha": 5.0},
        expected=[0.657725831999, -1.803903437713, 0.370577462387],
        decimals=12,
        source="optax 0.2.8 ademamix",
    ),
    GoldenCase(
        name="mars",
        method="mars",
        problem="vector",
        arguments={"learning_rate": 0.1},
        expected=[0.724338907608, -1.852127192101, 0.375234828047],
        decimals=12,
        source="the rule of the authors' code",
    ),
    GoldenCase(
        name="lion",
        method="lion",
        problem="vector",
        arguments={"learning_rate": 0.01, "weight_decay": 0.1},
        expected=[0.963150735305, -1.99603192014, 0.466580352667],
        decimals=12,
        source="optax 0.2.8 lion",
    ),
    GoldenCase(
        name="lars_optax",
        method="lars",
        problem="vector",
        arguments={"learning_rate": 1.0, "weight_decay": 0.1, "form": "optax"},
        expected=[0.986293123343, -1.979811715519, 0.48809227306],
        decimals=12,
        source="optax 0.2.8 lars",
    ),
    GoldenCase(
        name="lamb",
        method="lamb",
        problem="vector",
        arguments={"learning_rate": 0.1, "weight_decay": 0.1},
        expected=[0.101300431629, -1.385909620547, 0.249573624577],
        decimals=12,
        source="optax 0.2.8 lamb",
    ),
    GoldenCase(
        name="adafactor_torch",
        method="adafactor",
        problem="matrix",
        arguments={"learning_rate": 0.01, "min_dim_size_to_factor": 1},
        expected=[
            [1.0011252176, -0.5010304468, 0.2400879686],
            [0.4772422095, 2.0123817807, -1.0079043676],
        ],
        decimals=10,
        source="PyTorch 2.13 Adafactor; 1 / sqrt(t) is above 0.01 in all three steps",
    ),
    GoldenCase(
        # optax forms the decay rate in float32, which costs the last two decimals of
        # the 1.0011252175, -0.5010304469, 0.2400879686, 0.4772422095, 2.0123817808,
        # -1.0079043674 that it prints.
        name="adafactor_optax_factored",
        method="adafactor",
        problem="matrix",
        arguments={"learning_rate": 0.01, "min_dim_size_to_factor": 1},
        expected=[
            [1.00112522, -0.50103045, 0.24008797],
            [0.47724221, 2.01238178, -1.00790437],
        ],
        decimals=8,
        source="optax 0.2.8 adafactor",
    ),
    GoldenCase(
        name="adafactor_optax_unfactored",
        method="adafactor",
        problem="matrix",
        arguments={"learning_rate": 0.01},
        # Printed with ten decimals; eight of them survive optax's float32 decay rate.
        expected=[
            [0.99328573, -0.51036180, 0.24064220],
            [0.47635376, 2.00601331, -1.00639592],
        ],
        decimals=8,
        source="optax 0.2.8 adafactor",
    ),
    GoldenCase(
        name="came",
        method="came",
        problem="matrix",
        arguments={"learning_rate": 1e-3},
        expected=[
            [1.0022443062, -0.4856753589, 0.2232859045],
            [0.4592346287, 2.0102768894, -0.9917500869],
        ],
        decimals=10,
        source="the rule of the authors' code",
    ),
    GoldenCase(
        name="muon",
        method="muon",
        problem="matrix",
        arguments={"learning_rate": 0.02, "fan_in": 3, "fan_out": 2},
        expected=[
            [0.98994079, -0.50324469, 0.21677352],
            [0.47391462, 2.02353747, -1.00157627],
        ],
        decimals=8,
        source="Keller Jordan's rule evaluated with a float64 Newton-Schulz iteration",
    ),
]


@dataclass(frozen=True)
class GoldenPolarCase:
    """What an iteration makes of `POLAR_MATRIX`.

    Attributes:
        name: unique name, for the test's identifier.
        ns_coeffs: rows (a, b, c); None stands for the exact polar factor.
        expected: the result, printed with eight decimals.
    """

    name: str
    ns_coeffs: Sequence[tuple[float, float, float]] | None
    expected: Sequence[Sequence[float]]


POLAR_MATRIX = [[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]]
POLAR_SINGULAR_VALUES = [0.99837544, 0.05697795]  # over the Frobenius norm
POLAR_DECIMALS = 8
GOLDEN_POLAR_CASES = [
    GoldenPolarCase(
        name="jordan",
        ns_coeffs=((3.4445, -4.7750, 2.0315),) * 5,
        expected=[
            [-0.65917716, 0.19966725, 0.55250446],
            [0.55836532, 0.31845126, 0.34463033],
        ],
    ),
    GoldenPolarCase(
        name="you",
        ns_coeffs=YOU,
        expected=[
            [-0.68375255, 0.25994363, 0.6611569],
            [0.69038189, 0.45611518, 0.53006467],
        ],
    ),
    GoldenPolarCase(
        name="exact",
        ns_coeffs=None,
        expected=[
            [-0.69235943, 0.26435726, 0.67138191],
            [0.70147487, 0.46457456, 0.54046598],
        ],
    ),
]
