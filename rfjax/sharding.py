"""Where arrays live: a device mesh (data, fsdp, context), rules for parameters, the batch split over devices.

On one device every spec means "here", and the same code runs. Activations: `rfjax/axes.py`.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rfjax import axes, tree
from rfjax.config import build
from rfjax.dit import DiTConfig
from rfjax.errors import UserError
from rfjax.vae import VAEConfig

# Path of a leaf → its dimensions that may be split, counted from the end; the first that divides is, over fsdp and context, or
# else over fsdp alone: devices that share a clip need not each keep the whole state. Leading ones (layers, taps) stay whole:
# a loop over layers then gathers a layer at a time. The input side comes first, since accelerators pad the last dimension to
# 128. The optimiser's moments and the average end in their parameter's path, so one table places the whole train state;
# vectors (biases, scales, statistics) are small, and whole everywhere. A quantised kernel is its `qvalue`, and a scale an output.
RULES = (
    (r"(.*/)?(kernel|embedding)(/qvalue)?", (-2, -1)),
    (r"(.*/)?(head_)?modulation", (-1,)),
    (r".*", ()),
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis: batch; batch and parameters; tokens and parameters. data = -1 takes all that are left."""

    data: int = -1
    fsdp: int = 1
    context: int = 1

    def __post_init__(self):
        if self.fsdp < 1 or self.context < 1 or (self.data < 1 and self.data != -1):
            raise ValueError("an axis has 1 device or more, and data alone may be -1, all that are left")


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Mesh over all devices, or over those given; UserError when the sizes do not multiply to their number."""
    count, inner = len(devices or jax.devices()), config.fsdp * config.context
    data = max(1, count // inner) if config.data == -1 else config.data
    if data * inner != count:
        raise UserError(
            f"The mesh {data}×{config.fsdp}×{config.context} (data, fsdp, context) needs {data * inner} "
            f"devices and there are {count}; set config.mesh to match, by --config.mesh.fsdp=N and its like."
        )
    shape, kinds = (data, config.fsdp, config.context), (AxisType.Auto,) * len(axes.MESH)
    # jax.make_mesh would refuse 8×2 on a torus of 4×4, except on v5e: an axis may take part of a physical one.
    try:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except AssertionError:  # chips that are no box of the torus, such as 3 of 2×2, have no best order
        laid = np.asarray(devices or jax.devices()).reshape(shape)
    return Mesh(laid, axes.MESH, axis_types=kinds)


def check(config, mesh: Mesh) -> None:
    """UserError where the mesh does not divide what a stage's config has it split: batch, heads, tokens of a frame."""
    parts, context = math.prod(mesh.shape[axis] for axis in axes.BATCH), mesh.shape["context"]
    accumulate = config.get("accumulate", 1)
    if config.batch_size % (accumulate * parts):
        micro = f" in {accumulate} micro-batches" if accumulate > 1 else ""
        raise UserError(
            f"config.batch_size is {config.batch_size}{micro}, which the {parts} devices of mesh.data × mesh.fsdp do not "
            f"divide; make it a multiple of {accumulate * parts}."
        )
    if context == 1 or config.stage == "vae":
        return
    split = {
        f"heads of config.{name}": build(DiTConfig, config, name).num_heads
        for name in ("dit", "teacher_dit")
        if name in config
    }
    split["tokens of a frame"] = _frame_tokens(config)
    for name, count in split.items():
        if count % context:
            raise UserError(
                f"config.mesh.context is {context}, which does not divide the {count} {name}; "
                f"set it to a divisor of {math.gcd(*split.values())}."
            )


def _frame_tokens(config) -> int:
    """Tokens of a latent frame of the videos that a config trains on."""
    stride = build(VAEConfig, config, "vae").spatial_stride
    world = config.get("world")
    height, width = (world.size, world.size) if world else (config.video.height, config.video.width)
    return height * width // (stride**2 * math.prod(build(DiTConfig, config, "dit").patch_size))


def spec(path: str, shape: tuple[int, ...], mesh) -> PartitionSpec:
    """PartitionSpec of one leaf by RULES; whole where no dimension that it names is divided."""
    for split in (("fsdp", "context"), ("fsdp",)):
        split = tuple(axis for axis in split if mesh.shape[axis] > 1)
        parts = math.prod(mesh.shape[axis] for axis in split)
        for place in tree.match(RULES, path):
            if split and len(shape) >= -place and shape[place] % parts == 0:
                return PartitionSpec(*(None,) * (len(shape) + place), split)
    return PartitionSpec()


def _specs(state, mesh):
    """Tree of the PartitionSpecs of a tree's leaves."""

    def one(path, leaf):
        return spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(one, state)


def place(state, mesh: Mesh):
    """Tree of shardings for a train state, or any tree of arrays or shapes."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(state, mesh))


def placed(state, mesh: Mesh):
    """Tree of ShapeDtypeStructs of a tree of shapes, in their places."""

    def put(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(put, state, place(state, mesh))


def keep(state):
    """Inside jit: the tree (state, parameters, gradients) where `place` puts it on the ambient mesh; as it is without one.

    A state that is kept leaves a step as it came in, so that its buffers are donated and the next step is the same program.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return state
    return jax.tree.map(jax.lax.with_sharding_constraint, state, _specs(state, mesh))


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
    split, (mine, parts) = NamedSharding(mesh, PartitionSpec(axes.BATCH)), batch_parts(mesh)

    def whole(rows):
        shape = (
            len(rows) // len(mine) * parts,
            *rows.shape[1:],
        )  # said: processes may feed unequally many parts
        return jax.make_array_from_process_local_data(split, rows, shape)

    return {name: whole(rows) for name, rows in batch.items()}


def spread(batch):
    """Dict of whole batches [B, …] on the host of every process → global arrays, split over data and fsdp of the ambient mesh.

    Without a mesh they stay what they are.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return batch
    split = NamedSharding(mesh, PartitionSpec(axes.BATCH))
    return {
        name: jax.make_array_from_callback(rows.shape, split, rows.__getitem__)
        for name, rows in batch.items()
    }
