"""The axes of the device mesh, and what of an activation is split over which.

Context parallelism is the all-to-all form (DeepSpeed-Ulysses, arXiv 2309.14509): outside attention the tokens of a frame are
split over `context`, inside attention and in the KV cache the heads are, so that keys never travel more than once.
"""

import contextlib
import math

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

MESH = ("data", "fsdp", "context")
BATCH = ("data", "fsdp")
SPLIT = {"batch": BATCH, "tokens": ("context",), "heads": ("context",), None: ()}


def spec(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """How an array is split over the ambient mesh: dimension i by names[i] ("batch", "tokens", "heads", None: whole).

    The rest is whole, and so is a dimension that its axes do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def axes_of(name, size):
        axes = SPLIT[name]
        return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    return PartitionSpec(*map(axes_of, names, shape))


def constrain(x: Array, *names: str | None) -> Array:
    """x split by names as `spec` says. Without an ambient mesh, or on one device, x itself: the program there is the same."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, *names))


def platform() -> str:
    """That of the devices which the program is traced for: those of the ambient mesh, which need not be here, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_one_cpu() -> bool:
    """Whether the program is for a CPU and no mesh: work that is done piece by piece stays in the processor's cache there."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().empty


def on(mesh: Mesh | None):
    """The context in which programs are made for this mesh; None: as they are without."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def places() -> int:
    """Places along data and fsdp of the ambient mesh: how many parts a batch is split into. 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)
