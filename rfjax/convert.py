"""PyTorch checkpoints into rfjax parameters, by strict name tables.

A table is a list of rules (regex on the whole torch name, path template, layout). Every torch name must match
a rule, every parameter must be filled exactly once, and every shape must agree; anything else is an error.
"""

import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from rfjax.errors import UserError
from rfjax.tree import flatten, unflatten


class Rule(NamedTuple):
    """`path` may use the regex's groups (\\1). A group named `layer` stacks all layers into [L, …]."""

    pattern: str
    path: str
    layout: callable


def same(x):
    """As it is."""
    return x


def vector(x):
    """[C, 1, …] -> [C]."""
    return np.squeeze(x, tuple(range(1, x.ndim)))


def kernel(x):
    """Linear [O, I] -> [I, O] and convolution [O, I, k…] -> [k…, I, O]."""
    return np.moveaxis(x, (1, 0), (-2, -1))


def pointwise(x):
    """A convolution of window 1, [O, I, 1, …] -> [I, O]."""
    return np.squeeze(x, tuple(range(2, x.ndim))).T


def time_taps(x):
    """A convolution over time alone, [O, I, k, 1, 1] -> [k I, O], the taps side by side."""
    return np.squeeze(x, (3, 4)).transpose(2, 1, 0).reshape(-1, x.shape[0])


def patch_kernel(x):
    """The patch embedding's convolution [D, C, 1, p, q] -> [p q C, D], a linear map of flattened patches."""
    return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def unbatched(x):
    """[1, n, D] -> [n, D]."""
    return x.reshape(x.shape[1:])


_LAYER = r"blocks\.(?P<layer>\d+)\."

DIT_TABLE = [
    Rule(r"patch_embedding\.weight", r"patch_embedding/kernel", patch_kernel),
    Rule(r"patch_embedding\.bias", r"patch_embedding/bias", same),
    Rule(r"(time|text)_embedding\.0\.weight", r"\1_in/kernel", kernel),
    Rule(r"(time|text)_embedding\.0\.bias", r"\1_in/bias", same),
    Rule(r"(time|text)_embedding\.2\.weight", r"\1_out/kernel", kernel),
    Rule(r"(time|text)_embedding\.2\.bias", r"\1_out/bias", same),
    Rule(r"time_projection\.1\.weight", r"time_projection/kernel", kernel),
    Rule(r"time_projection\.1\.bias", r"time_projection/bias", same),
    Rule(r"head\.head\.weight", r"head/kernel", kernel),
    Rule(r"head\.head\.bias", r"head/bias", same),
    Rule(r"head\.modulation", r"head_modulation", unbatched),
    Rule(_LAYER + r"modulation", r"blocks/modulation", unbatched),
    Rule(_LAYER + r"cross_attn\.(k|v)\.weight", r"text_layers/\2/kernel", kernel),
    Rule(_LAYER + r"cross_attn\.(k|v)\.bias", r"text_layers/\2/bias", same),
    Rule(_LAYER + r"cross_attn\.norm_k\.weight", r"text_layers/norm_k/scale", same),
    Rule(_LAYER + r"(self|cross)_attn\.(q|k|v|o)\.weight", r"blocks/\2_\3/kernel", kernel),
    Rule(_LAYER + r"(self|cross)_attn\.(q|k|v|o)\.bias", r"blocks/\2_\3/bias", same),
    Rule(_LAYER + r"(self|cross)_attn\.norm_(q|k)\.weight", r"blocks/\2_norm_\3/scale", same),
    Rule(_LAYER + r"norm3\.weight", r"blocks/norm3/scale", same),
    Rule(_LAYER + r"norm3\.bias", r"blocks/norm3/bias", same),
    Rule(_LAYER + r"ffn\.0\.weight", r"blocks/ffn_in/kernel", kernel),
    Rule(_LAYER + r"ffn\.0\.bias", r"blocks/ffn_in/bias", same),
    Rule(_LAYER + r"ffn\.2\.weight", r"blocks/ffn_out/kernel", kernel),
    Rule(_LAYER + r"ffn\.2\.bias", r"blocks/ffn_out/bias", same),
]

_SIDE = r"(encoder|decoder)\."
_BLOCK = _SIDE + r"(middle|downsamples|upsamples)\.(\d+)\."

VAE_TABLE = [
    Rule(r"latent_(mean|std)", r"latent_\1", same),
    Rule(r"(conv1|conv2)\.weight", r"\1/kernel", pointwise),
    Rule(r"(conv1|conv2)\.bias", r"\1/bias", same),
    Rule(_SIDE + r"conv1\.weight", r"\1/conv1/kernel", kernel),
    Rule(_SIDE + r"conv1\.bias", r"\1/conv1/bias", same),
    Rule(_SIDE + r"head\.0\.gamma", r"\1/norm/gamma", vector),
    Rule(_SIDE + r"head\.2\.weight", r"\1/head/kernel", kernel),
    Rule(_SIDE + r"head\.2\.bias", r"\1/head/bias", same),
    Rule(_BLOCK + r"residual\.0\.gamma", r"\1/\2_\3/norm1/gamma", vector),
    Rule(_BLOCK + r"residual\.2\.weight", r"\1/\2_\3/conv1/kernel", kernel),
    Rule(_BLOCK + r"residual\.2\.bias", r"\1/\2_\3/conv1/bias", same),
    Rule(_BLOCK + r"residual\.3\.gamma", r"\1/\2_\3/norm2/gamma", vector),
    Rule(_BLOCK + r"residual\.6\.weight", r"\1/\2_\3/conv2/kernel", kernel),
    Rule(_BLOCK + r"residual\.6\.bias", r"\1/\2_\3/conv2/bias", same),
    Rule(_BLOCK + r"norm\.gamma", r"\1/\2_\3/norm/gamma", vector),
    Rule(_BLOCK + r"(shortcut|to_qkv|proj)\.weight", r"\1/\2_\3/\4/kernel", pointwise),
    Rule(_BLOCK + r"(shortcut|to_qkv|proj|time_conv)\.bias", r"\1/\2_\3/\4/bias", same),
    Rule(_BLOCK + r"time_conv\.weight", r"\1/\2_\3/time_conv/kernel", time_taps),
    Rule(_BLOCK + r"resample\.1\.weight", r"\1/\2_\3/resample/kernel", kernel),
    Rule(_BLOCK + r"resample\.1\.bias", r"\1/\2_\3/resample/bias", same),
]

UMT5_TABLE = [
    Rule(r"token_embedding\.weight", r"token_embedding/embedding", same),
    Rule(_LAYER + r"attn\.(q|k|v|o)\.weight", r"blocks/attn_\2/kernel", kernel),
    Rule(_LAYER + r"pos_embedding\.embedding\.weight", r"blocks/position_bias", same),
    Rule(_LAYER + r"ffn\.gate\.0\.weight", r"blocks/ffn_gate/kernel", kernel),
    Rule(_LAYER + r"ffn\.fc1\.weight", r"blocks/ffn_in/kernel", kernel),
    Rule(_LAYER + r"ffn\.fc2\.weight", r"blocks/ffn_out/kernel", kernel),
    Rule(_LAYER + r"norm(1|2)\.weight", r"blocks/norm\2/scale", same),
    Rule(r"norm\.weight", r"norm/scale", same),
]

# The published statistics of Wan 2.1's latents, which its checkpoint does not hold.
WAN_LATENT_STATISTICS = {
    "latent_mean": np.float32(
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
        + [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
    ),
    "latent_std": np.float32(
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
        + [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
    ),
}


def from_torch(weights, table, like):
    """{torch name: array} -> nested parameters with the names and shapes of `like`.

    `like` is a tree of anything with a shape, such as jax.eval_shape of `init`. Raises UserError for a name
    that no rule or parameter expects, a missing one, one given twice, or a wrong shape.
    """
    found = defaultdict(dict)
    for name, array in weights.items():
        path, layer, array = place(name, array, table)
        if layer in found[path]:
            raise UserError(f"two checkpoint weights map to {path}; the second is {name}.")
        found[path][layer] = array
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(like).items()}
    _same_names(set(found), set(shapes))
    return unflatten({path: _assembled(path, found[path], shape) for path, shape in shapes.items()})


def place(name, array, table):
    """Where one torch weight (or its gradient) goes: (path, layer or None, the array in our layout)."""
    for rule in table:
        if match := re.fullmatch(rule.pattern, name):
            layer = match.groupdict().get("layer")
            return (
                match.expand(rule.path),
                None if layer is None else int(layer),
                _laid_out(rule, name, array),
            )
    raise UserError(f"the checkpoint holds {name}, which this model does not know; is it for another model?")


def _laid_out(rule, name, array):
    try:
        return rule.layout(array)
    except (ValueError, IndexError) as error:
        raise UserError(f"checkpoint weight {name} has an unexpected shape {tuple(array.shape)}.") from error


def _same_names(found, expected):
    if missing := sorted(expected - found):
        raise UserError(
            f"the checkpoint lacks {len(missing)} parameters of this configuration: {_some(missing)}."
        )
    if unknown := sorted(found - expected):
        raise UserError(
            f"the checkpoint holds {len(unknown)} parameters that this configuration lacks: {_some(unknown)}."
        )


def _some(names, most=5):
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _assembled(path, layers, shape):
    if None in layers:
        array = layers[None]
    else:
        expected = set(range(shape[0]))
        if set(layers) != expected:
            wrong = sorted(expected ^ set(layers))
            raise UserError(f"{path} has {shape[0]} layers here; the checkpoint differs in layers {wrong}.")
        sizes = {layers[i].shape for i in layers}
        if len(sizes) > 1:
            raise UserError(f"the layers of {path} differ in shape in the checkpoint: {sorted(sizes)}.")
        array = np.stack([layers[i] for i in range(shape[0])])
    if array.shape != shape:
        raise UserError(f"{path} has shape {shape} here but {array.shape} in the checkpoint.")
    return np.ascontiguousarray(array)
