"""Weights, activations and cached keys and values in 8 bits, through qwix.

A quantised array is a `qwix.QArray`: 8-bit values, and a float32 scale for each slice along one axis, the largest magnitude
of the slice over the largest 8-bit number. Parameters of the transformer say by their type how a product is computed: where a
kernel is a QArray, the activations that meet it are quantised as they come (a scale a token), both are multiplied in 8 bits,
sums are kept in int32 or float32, and the scales are put on the result. `LINEAR` names the kernels that are quantised, all
in the layers: the others are less than a thousandth of the work, and some would do much of the harm (docs/quantization.md).
"""

import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import dtypes
from jax import Array
from ml_collections import ConfigDict

from rfjax import tree
from rfjax.errors import UserError

LINEAR = ((r"blocks/(self|cross)_[qkvo]/kernel|blocks/ffn_(in|out)/kernel", True), (r".*", False))
INT8, FP8 = "int8", "float8_e4m3fn"
DTYPES = ("", INT8, FP8)
OLDER_TPUS = tuple(f"TPU v{generation}" for generation in range(2, 7))


class Mode(NamedTuple):
    """What is kept and multiplied in 8 bits: fields of a config's sections."""

    linear_dtype: str  # config.dit's: of the kernels of LINEAR, and of the activations that they meet
    int8_cache: bool  # config.rollout's: keys and values of past blocks


MODES = {
    "int8": Mode(INT8, False),
    "fp8": Mode(FP8, False),
    "kv8": Mode("", True),
    "int8+kv8": Mode(INT8, True),
    "fp8+kv8": Mode(FP8, True),
}


def configured(settings: ConfigDict, name: str) -> ConfigDict:
    """A copy of a config that samples in this mode; UserError where there is no such mode."""
    if name not in MODES:
        raise UserError(f"There is no quantisation {name!r}; give one of {', '.join(MODES)}.")
    settings = settings.copy_and_resolve_references()
    settings.dit.linear_dtype, settings.rollout.int8_cache = MODES[name]
    return settings


def named(mode: Mode) -> str | None:
    """The name of a mode; None of the one that quantises nothing."""
    return next((name for name, other in MODES.items() if other == mode), None)


def check(mode: Mode, device: jax.Device | None = None) -> None:
    """Whether a mode can run on a device, by default the first.

    Raises:
      UserError: a chip without such products, or qwix is not installed.
    """
    if not any(mode):
        return
    device = jax.devices()[0] if device is None else device
    if mode.linear_dtype == FP8 and not _multiplies_fp8(device):
        raise UserError(
            f"{device.device_kind} has no products in fp8; set config.dit.linear_dtype = 'int8', or give --quantize "
            f"{named(mode._replace(linear_dtype=INT8))}."
        )
    _qwix()


def _qwix() -> ModuleType:
    """The package; UserError where it is not installed."""
    try:
        import qwix
    except ImportError as error:
        raise UserError("Quantisation takes the package qwix: pip install -e '.[quantize]'.") from error
    return qwix


def _multiplies_fp8(device: jax.Device) -> bool:
    """NVIDIA from compute capability 8.9 on (Ada, Hopper), TPUs from the seventh generation on; a CPU computes as if."""
    if device.platform == "gpu":
        major, dot, minor = str(device.compute_capability).partition(".")  # of AMD a name, such as gfx90a
        return bool(dot) and (int(major), int(minor)) >= (8, 9)
    return not device.device_kind.startswith(OLDER_TPUS)


@functools.partial(jax.jit, static_argnames=("dtype", "over"))
def quantized(x: Array, dtype: str, over: int = -1):
    """x as a QArray of 8-bit values, one scale for each slice along axis `over`: in int8 off by half a scale at most."""
    scaled = [axis for axis in range(x.ndim) if axis != over % x.ndim]
    return _qwix().quantize(x.astype(jnp.float32), dtype, channelwise_axes=scaled)


def params(dit: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The transformer's parameters with the kernels of LINEAR [L, in, out] quantised, a scale for each layer and output."""
    flat = tree.flatten(dit)
    return tree.unflatten(
        {path: quantized(x, dtype, -2) if tree.match(LINEAR, path) else x for path, x in flat.items()}
    )


def is_quantized(leaf) -> bool:
    return hasattr(leaf, "qvalue")


def plain(x, dtype) -> Array:
    """A quantised array as numbers of `dtype`; any other as it is."""
    if not is_quantized(x):
        return x
    return _qwix().dequantize(x).astype(dtype)


def promote(*arrays, dtype) -> list:
    """Flax's promotion of inputs, kernel and bias, which leaves a quantised kernel as it is."""
    plain_ones = dtypes.promote_dtype(*(None if is_quantized(a) else a for a in arrays), dtype=dtype)
    return [old if new is None else new for old, new in zip(arrays, plain_ones, strict=True)]


def dot_general(x: Array, kernel, dimensions, precision=None) -> Array:
    """`jax.lax.dot_general` of activations with a kernel, in 8 bits where the kernel is quantised; of x's dtype."""
    if not is_quantized(kernel):
        return jax.lax.dot_general(x, kernel, dimensions, precision)
    ((over,), _), _ = dimensions
    with jax.numpy_dtype_promotion("standard"):  # of its sums in int32 with its scales
        return _qwix().dot_general(quantized(x, kernel.qtype, over), kernel, dimensions).astype(x.dtype)
