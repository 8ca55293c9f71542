"""The axes of the device mesh, and what of an activation is split over which.

Context parallelism is the all-to-all form (DeepSpeed-Ulysses, arXiv 2309.14509): outside attention the tokens of a frame are
split over `context`, inside attention and in the KV cache the heads are, so that keys never travel more than once.
"""

import math

import jax
from jax import Array
from jax.sharding import PartitionSpec

MESH = ("data", "fsdp", "context")
BATCH = ("data", "fsdp")
SPLIT = {"batch": BATCH, "tokens": ("context",), "heads": ("context",), None: ()}


def constrain(x: Array, *names: str | None) -> Array:
    """x with dimension i split by names[i] ("batch", "tokens", "heads", None: whole) over the ambient mesh; the rest are whole.

    A dimension that its axes do not divide stays whole, as in the few clips that a stage shows. Without an ambient mesh, or on
    one device, x itself: sampling and training there are the same program.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return x

    def axes_of(name, size):
        axes = SPLIT[name]
        return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    spec = map(axes_of, names, x.shape)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))
