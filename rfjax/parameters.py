"""Parameters of the networks: their shapes, and random ones. A network goes by the name of its section and file, a key of SIZES."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rfjax import dit, quantize, umt5
from rfjax.dit import DiTConfig
from rfjax.tiny_vae import TinyDecoder, TinyVAEConfig
from rfjax.tree import flatten, unflatten
from rfjax.umt5 import UMT5Config
from rfjax.vae import VAE, VAEConfig

SIZES = {"dit": DiTConfig, "vae": VAEConfig, "tiny": TinyVAEConfig, "umt5": UMT5Config}
STATISTICS = ("latent_mean", "latent_std")  # stay float32 whatever the VAE's dtype


def initial(name: str, sizes, key: Array) -> dict[str, Any]:
    """Random parameters to train from, in the dtype that the sizes name."""
    match name:
        case "dit":
            params = dit.init(sizes, key)
        case "umt5":
            params = umt5.init(sizes, key)
        case "vae":
            side = sizes.spatial_stride
            params = VAE(sizes).init(key, jnp.zeros((1, 1, side, side, 3)))["params"]
        case "tiny":
            params = TinyDecoder(sizes).init(key, jnp.zeros((1, 1, 1, 1, sizes.z_dim)))["params"]
    flat = flatten(params)
    return unflatten({path: x if path in STATISTICS else x.astype(sizes.dtype) for path, x in flat.items()})


@functools.cache
def as_filed(name: str, sizes) -> dict[str, Any]:
    """Shapes of the parameters as a file has them, without 8-bit products; dtypes as the sizes name them."""
    return jax.eval_shape(functools.partial(initial, name, sizes), jax.random.key(0))


def abstract(name: str, sizes) -> dict[str, Any]:
    """Shapes and dtypes of the parameters as a sampler holds them."""
    shapes = as_filed(name, sizes)
    if name == "dit" and sizes.linear_dtype:
        shapes = jax.eval_shape(functools.partial(quantize.params, dtype=sizes.linear_dtype), shapes)
    return shapes


def stand_in(shapes: dict[str, Any]) -> dict[str, Any]:
    """Random parameters of these shapes and dtypes, drawn in seconds at any size: the same million numbers over and over.

    Kernels keep the variance of their input, as `initial` does, so that numbers stay finite however long a stream runs.
    """
    numbers = np.random.default_rng(0).standard_normal(1_000_003, np.float32)

    def draw(path: str, leaf) -> Array:
        kind = path.rpartition("/")[2]
        if kind in ("scale", "gamma", "latent_std"):
            return jnp.ones(leaf.shape, leaf.dtype)
        size = 0.02
        if kind == "kernel":  # [in, out], [L, in, out], or a convolution's [..., in, out]
            size = (leaf.shape[-2] if leaf.ndim < 4 else leaf.size // leaf.shape[-1]) ** -0.5
        return jnp.asarray((size * np.resize(numbers, leaf.shape)).astype(leaf.dtype))

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(shapes).items()})
