"""Aliases that recur in signatures, with the text that explains them.

learning_rate (`ScalarOrSchedule`)
    A finite number >= 0, a scalar array (traced or not), or a schedule: a function
    from the number of finished updates (0 before the first) to a scalar. Steps are
    taken against the update, so it has no minus sign.
other numbers (`Scalar`)
    A Python or NumPy number, or a JAX array of shape (), traced or not. Ranges are
    checked for the former; of an array only the shape is, as its value may not be known
    yet.
Static
    What shapes the compiled program: a Python value and never a JAX array.
    `optax.inject_hyperparams` makes arrays of numbers, and schedules of functions,
    unless they are named in its `static_args`; texts, bools and None it leaves alone.
    "Static if 0" (or None): as an array the value works too, but the program that would
    do without, such as that which needs no params, is not chosen.
axes (`Axes`)
    How each parameter is a batch of matrices or vectors, for statistics that belong
    to one matrix. One `MatrixAxes` for every parameter, a pytree of them (a prefix
    of the parameters' tree is enough; entries at masked leaves are ignored), a
    function from the parameters to such a pytree, or None, which infers them from
    names and shapes with `optaxplus.partition.DEFAULT_RULES`. Static if a function:
    `optax.inject_hyperparams` would call it as a schedule.
mask (`Mask`)
    A pytree of bools, a prefix of the parameters' tree, or a function from the
    parameters to one, as in `optax.masked`. True where the step applies. Static if a
    function, as `axes`.
placement
    Which device does the matrix work where parameters are sharded over a mesh. "auto"
    reads how they lie from their types under a mesh with Explicit axes. Under one with
    Auto axes, where types do not tell, it guesses, and the compiler moves what lies
    otherwise once more; give `update` the parameters, from which it knows where the
    rest of the update belongs. An `optaxplus.Placement` says how they lie. A matrix is
    moved once there and once back, and computed by one device, or by a few where there
    are more devices than matrices. None leaves everything to the compiler, as is needed
    where `jax.vmap` goes over what is sharded. Inside of `jax.shard_map` and `jax.pmap`
    arrays are what one device has: what is a part of a matrix there is orthogonalized
    as if it were all. On one device it makes no difference. Static.
mu_dtype, nu_dtype (`DTypeName`)
    The floating-point dtype in which first and second moments are stored; the
    arithmetic is float32 whatever it is. "float32", the default whatever the
    parameters' dtype, stands for the width of the arithmetic: float64 for float64
    parameters, complex64 for complex64 ones. First moments of complex parameters have
    no other.

What docstrings say of results:

emits float32
    Updates are float32 for gradients in float32 and narrower dtypes; float64, complex64
    and complex128 gradients give updates of their own dtype.
like the parameters (attributes of states)
    The parameters' tree, every leaf in the shape and sharding of its parameter. "real":
    real for complex parameters, too.
State: n bytes per parameter
    With the default dtypes and parameters in float32 or less. Counters are left out.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import optax

from optaxplus.numerics.hyperparameters import Scalar
from optaxplus.numerics.matrix_axes import MatrixAxes

__all__ = ["Axes", "DTypeName", "Mask", "PyTree", "Scalar", "ScalarOrSchedule"]

PyTree = Any
Axes = MatrixAxes | PyTree | Callable[[PyTree], PyTree] | None
Mask = PyTree | Callable[[PyTree], PyTree] | None
DTypeName = str | type | np.dtype
ScalarOrSchedule = optax.ScalarOrSchedule
