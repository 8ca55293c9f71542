"""Where arrays live: a device mesh (data, fsdp, context), rules for parameters, the batch split over devices.

On one device every spec means "here", and the same code runs.
"""

import dataclasses

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rfjax import tree
from rfjax.errors import UserError

AXES = ("data", "fsdp", "context")

# Path of a leaf → mesh axes of its *last* dimensions; leading ones (layers, taps) stay whole. The optimiser's
# moments and the average end in their parameter's path, so one table places the whole train state.
RULES = (
    (r"(.*/)?kernel", ("fsdp", None)),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis: batch, batch and parameters, tokens. data = -1 takes all that are left."""

    data: int = -1
    fsdp: int = 1
    context: int = 1


def make_mesh(config: MeshConfig) -> Mesh:
    """Mesh over all devices; UserError when the sizes do not multiply to their number."""
    devices, inner = jax.device_count(), config.fsdp * config.context
    data = devices // inner if config.data == -1 else config.data
    if data * inner != devices:
        raise UserError(
            f"The mesh {data}×{config.fsdp}×{config.context} (data, fsdp, context) needs {data * inner} "
            f"devices and there are {devices}; set config.mesh to match."
        )
    return jax.make_mesh((data, config.fsdp, config.context), AXES, (AxisType.Auto,) * len(AXES))


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """PartitionSpec of one leaf by RULES; a dimension that its axis does not divide stays whole."""
    axes = tree.match(RULES, path)
    if len(shape) < len(axes):
        return PartitionSpec()
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(
        *(
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def place(state, mesh: Mesh):
    """Tree of shardings for a train state, or any tree of arrays or shapes."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_parts(mesh: Mesh) -> tuple[list[int], int]:
    """Parts of every global batch that this process feeds, and how many there are: one for each place along data and fsdp."""
    places = mesh.devices.reshape(-1, mesh.shape["context"])
    mine = [
        number
        for number, devices in enumerate(places)
        if any(device.process_index == jax.process_index() for device in devices)
    ]
    return mine, len(places)


def put_batch(batch, mesh: Mesh):
    """Dict of this process's rows [b, …] of a global batch → global arrays [B, …], split over data and fsdp."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
