"""How the state of an optimizer is sharded, before there is any."""

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from optaxplus import validation
from optaxplus.custom_types import PyTree
from optaxplus.sharding.placement import Placement, placement_like, specs_of

__all__ = ["state_sharding"]


def state_sharding(
    tx: optax.GradientTransformation,
    params: PyTree,
    placement: Placement | None = None,
) -> PyTree:
    """The sharding of every array of the state that `tx.init(params)` makes.

    Under a mesh with Auto axes a compiled `init` puts its zeros on one device unless it
    is told where they belong, and a checkpoint is restored to where it was saved:

        shardings = ox.state_sharding(tx, params)
        state = jax.jit(tx.init, out_shardings=shardings)(params)

    A moment lies as its parameter does, a statistic with axes of size 1 as what is left
    of it, and counters, and what has nothing of a parameter's shape, on every device.
    The shardings are read from the types that `tx.init` gives its results when every
    axis of the mesh is Explicit, so any transformation will do, and nothing is
    allocated. State of other shapes than the parameters', as the history of
    `optax.lbfgs`, comes out whole on every device: look before you pay for it.

    Args:
      tx: Any gradient transformation.
      params: Arrays with a `NamedSharding`, or `jax.ShapeDtypeStruct`s with one; of
        any kind if `placement` says how they lie.
      placement: The mesh and the specs of the parameters; None reads them from
        `params`, as `Placement.like` does.

    Returns:
      A pytree of `jax.sharding.NamedSharding`s with the structure of the state.

    Raises:
      TypeError: If `tx` is no gradient transformation.
      ValueError: If neither `params` nor `placement` says how the parameters lie, or a
        spec does not fit its parameter.

    Example:
      >>> import jax, optaxplus as ox
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> params = {"dense": {"kernel": jax.ShapeDtypeStruct((8, 4), "float32")}}
      >>> placement = ox.Placement(mesh, {"dense": {"kernel": P("fsdp", None)}})
      >>> shardings = ox.state_sharding(ox.adamw(1e-3), params, placement)
      >>> print({s.spec for s in jax.tree.leaves(shardings)} == {P("fsdp", None), P()})
      True
    """
    name = "state_sharding"
    validation.check_transformation(name, "tx", tx)
    if placement is None:
        placement = placement_like(name, params)
    specs = specs_of(name, placement, params)
    mesh = placement.mesh
    explicit = AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )
    leaves, structure = jax.tree.flatten(params)
    typed = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(explicit, spec))
        for x, spec in zip(leaves, specs, strict=True)
    ]
    # Whatever mesh the caller has set, these types are of this one.
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(tx.init, jax.tree.unflatten(structure, typed))

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        given = leaf.sharding
        spec = given.spec if isinstance(given, NamedSharding) else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, state)
