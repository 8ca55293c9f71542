"""PyTorch's names for our parameters, both ways: one table of templates for each layout of each network.

A rule pairs a torch name with the path of ours and says how the array is laid out. `{part:q|k}` in the torch name is a field
with the regex of what it may be; the path uses it as `{part}`. A field `layer` counts the layers that we stack into [L, …].
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_FIELD = re.compile(r"\{(\w+)(?::([^}]*))?\}")


class Layout(NamedTuple):
    """Torch's array → ours, and back."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]


class Rule(NamedTuple):
    """A torch name, where it goes, and its layout."""

    torch: str
    path: str
    layout: Layout


SAME = Layout(lambda x: x, lambda x: x)
# Linear [O, I] ↔ [I, O] and convolution [O, I, k…] ↔ [k…, I, O]
KERNEL = Layout(lambda x: np.moveaxis(x, (1, 0), (-2, -1)), lambda x: np.moveaxis(x, (-1, -2), (0, 1)))
# [1, n, D] ↔ [n, D]
UNBATCHED = Layout(lambda x: x.reshape(x.shape[1:]), lambda x: x[None])
# A convolution over time alone, [O, I, k, 1, 1] ↔ [k I, O], its k = 3 taps side by side
TIME_TAPS = Layout(
    lambda x: np.squeeze(x, (3, 4)).transpose(2, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(3, -1, x.shape[1]).transpose(2, 1, 0)[..., None, None],
)
# The patch embedding's convolution [D, C, 1, 2, 2] ↔ [2·2·C, D], a linear map of flattened patches
PATCH = Layout(
    lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(1, 2, 2, -1, x.shape[1]).transpose(4, 3, 0, 1, 2),
)


def vector(ones: int) -> Layout:
    """[C, 1, …] ↔ [C]."""
    return Layout(lambda x: np.squeeze(x, tuple(range(1, 1 + ones))), lambda x: x.reshape(-1, *(1,) * ones))


def pointwise(ones: int) -> Layout:
    """A convolution of window 1, [O, I, 1, …] ↔ [I, O]."""
    return Layout(
        lambda x: np.squeeze(x, tuple(range(2, 2 + ones))).T, lambda x: x.T.reshape(*x.T.shape, *(1,) * ones)
    )


@functools.cache
def _patterns(rule: Rule) -> tuple[re.Pattern, re.Pattern]:
    fields = dict(_FIELD.findall(rule.torch))

    def compiled(template: str) -> re.Pattern:
        parts, at = [], 0
        for field in _FIELD.finditer(template):
            allowed = fields[field[1]] or r"\d+"
            parts += [re.escape(template[at : field.start()]), f"(?P<{field[1]}>{allowed})"]
            at = field.end()
        return re.compile("".join(parts) + re.escape(template[at:]))

    return compiled(rule.torch), compiled(rule.path)


class Place(NamedTuple):
    """Where a weight belongs on the other side."""

    name: str
    layer: int | None
    layout: Layout


def ours(name: str, table: Sequence[Rule]) -> Place | None:
    """Our path for a torch name, and which of the stacked layers it is; None where no rule knows it."""
    for rule in table:
        if match := _patterns(rule)[0].fullmatch(name):
            fields = match.groupdict()
            layer = fields.pop("layer", None)
            return Place(rule.path.format(**fields), None if layer is None else int(layer), rule.layout)
    return None


def theirs(path: str, table: Sequence[Rule]) -> tuple[Callable[[int], str], bool, Layout] | None:
    """(layer → torch name, whether the path stacks layers, layout) for one of our paths; None where no rule knows it."""
    for rule in table:
        if match := _patterns(rule)[1].fullmatch(path):
            template = _FIELD.sub(r"{\1}", rule.torch)
            name = functools.partial(_named, template, match.groupdict())
            return name, "{layer}" in template, rule.layout
    return None


def _named(template: str, fields: dict[str, str], layer: int) -> str:
    return template.format(layer=layer, **fields)


def _linear(torch: str, path: str) -> list[Rule]:
    return [Rule(f"{torch}.weight", f"{path}/kernel", KERNEL), Rule(f"{torch}.bias", f"{path}/bias", SAME)]


WAN_DIT = [
    Rule("patch_embedding.weight", "patch_embedding/kernel", PATCH),
    Rule("patch_embedding.bias", "patch_embedding/bias", SAME),
    *_linear("{what:time|text}_embedding.0", "{what}_in"),
    *_linear("{what:time|text}_embedding.2", "{what}_out"),
    *_linear("time_projection.1", "time_projection"),
    *_linear("head.head", "head"),
    Rule("head.modulation", "head_modulation", UNBATCHED),
    Rule("blocks.{layer}.modulation", "blocks/modulation", UNBATCHED),
    *_linear("blocks.{layer}.cross_attn.{part:k|v}", "text_layers/{part}"),
    Rule("blocks.{layer}.cross_attn.norm_k.weight", "text_layers/norm_k/scale", SAME),
    *_linear("blocks.{layer}.cross_attn.{part:q|o}", "blocks/cross_{part}"),
    Rule("blocks.{layer}.cross_attn.norm_q.weight", "blocks/cross_norm_q/scale", SAME),
    *_linear("blocks.{layer}.self_attn.{part:q|k|v|o}", "blocks/self_{part}"),
    Rule("blocks.{layer}.self_attn.norm_{part:q|k}.weight", "blocks/self_norm_{part}/scale", SAME),
    Rule("blocks.{layer}.norm3.weight", "blocks/norm3/scale", SAME),
    Rule("blocks.{layer}.norm3.bias", "blocks/norm3/bias", SAME),
    *_linear("blocks.{layer}.ffn.0", "blocks/ffn_in"),
    *_linear("blocks.{layer}.ffn.2", "blocks/ffn_out"),
]

_EMBEDDER = "condition_embedder."
DIFFUSERS_DIT = [
    Rule("patch_embedding.weight", "patch_embedding/kernel", PATCH),
    Rule("patch_embedding.bias", "patch_embedding/bias", SAME),
    *_linear(_EMBEDDER + "{what:time|text}_embedder.linear_1", "{what}_in"),
    *_linear(_EMBEDDER + "{what:time|text}_embedder.linear_2", "{what}_out"),
    *_linear(_EMBEDDER + "time_proj", "time_projection"),
    *_linear("proj_out", "head"),
    Rule("scale_shift_table", "head_modulation", UNBATCHED),
    Rule("blocks.{layer}.scale_shift_table", "blocks/modulation", UNBATCHED),
    *_linear("blocks.{layer}.attn2.to_{part:k|v}", "text_layers/{part}"),
    Rule("blocks.{layer}.attn2.norm_k.weight", "text_layers/norm_k/scale", SAME),
    *_linear("blocks.{layer}.attn2.to_q", "blocks/cross_q"),
    *_linear("blocks.{layer}.attn2.to_out.0", "blocks/cross_o"),
    Rule("blocks.{layer}.attn2.norm_q.weight", "blocks/cross_norm_q/scale", SAME),
    *_linear("blocks.{layer}.attn1.to_{part:q|k|v}", "blocks/self_{part}"),
    *_linear("blocks.{layer}.attn1.to_out.0", "blocks/self_o"),
    Rule("blocks.{layer}.attn1.norm_{part:q|k}.weight", "blocks/self_norm_{part}/scale", SAME),
    Rule("blocks.{layer}.norm2.weight", "blocks/norm3/scale", SAME),
    Rule("blocks.{layer}.norm2.bias", "blocks/norm3/bias", SAME),
    *_linear("blocks.{layer}.ffn.net.0.proj", "blocks/ffn_in"),
    *_linear("blocks.{layer}.ffn.net.2", "blocks/ffn_out"),
]

WAN_UMT5 = [
    Rule("token_embedding.weight", "token_embedding/embedding", SAME),
    Rule("blocks.{layer}.attn.{part:q|k|v|o}.weight", "blocks/attn_{part}/kernel", KERNEL),
    Rule("blocks.{layer}.pos_embedding.embedding.weight", "blocks/position_bias", SAME),
    Rule("blocks.{layer}.ffn.gate.0.weight", "blocks/ffn_gate/kernel", KERNEL),
    Rule("blocks.{layer}.ffn.fc1.weight", "blocks/ffn_in/kernel", KERNEL),
    Rule("blocks.{layer}.ffn.fc2.weight", "blocks/ffn_out/kernel", KERNEL),
    Rule("blocks.{layer}.norm{n:1|2}.weight", "blocks/norm{n}/scale", SAME),
    Rule("norm.weight", "norm/scale", SAME),
]

_T5 = "encoder.block.{layer}.layer."
TRANSFORMERS_UMT5 = [
    Rule("shared.weight", "token_embedding/embedding", SAME),
    Rule(_T5 + "0.SelfAttention.{part:q|k|v|o}.weight", "blocks/attn_{part}/kernel", KERNEL),
    Rule(_T5 + "0.SelfAttention.relative_attention_bias.weight", "blocks/position_bias", SAME),
    Rule(_T5 + "0.layer_norm.weight", "blocks/norm1/scale", SAME),
    Rule(_T5 + "1.DenseReluDense.wi_0.weight", "blocks/ffn_gate/kernel", KERNEL),
    Rule(_T5 + "1.DenseReluDense.wi_1.weight", "blocks/ffn_in/kernel", KERNEL),
    Rule(_T5 + "1.DenseReluDense.wo.weight", "blocks/ffn_out/kernel", KERNEL),
    Rule(_T5 + "1.layer_norm.weight", "blocks/norm2/scale", SAME),
    Rule("encoder.final_layer_norm.weight", "norm/scale", SAME),
]

_BLOCK = r"{side:encoder|decoder}.{part:middle|downsamples|upsamples}.{n:\d+}."
_PATH = "{side}/{part}_{n}/"


def _resnet(torch: str, path: str, names: Sequence[str]) -> list[Rule]:
    """A residual block, whose parts torch calls `names`: norm1, conv1, norm2, conv2, shortcut."""
    norm1, conv1, norm2, conv2, shortcut = (torch + name for name in names)
    return [
        Rule(f"{norm1}.gamma", f"{path}norm1/gamma", vector(3)),
        Rule(f"{norm2}.gamma", f"{path}norm2/gamma", vector(3)),
        *_linear(conv1, f"{path}conv1"),
        *_linear(conv2, f"{path}conv2"),
        *_pointwise(shortcut, f"{path}shortcut", 3),
    ]


def _pointwise(torch: str, path: str, ones: int) -> list[Rule]:
    return [
        Rule(f"{torch}.weight", f"{path}/kernel", pointwise(ones)),
        Rule(f"{torch}.bias", f"{path}/bias", SAME),
    ]


def _attention(torch: str, path: str) -> list[Rule]:
    rules = [Rule(f"{torch}norm.gamma", f"{path}norm/gamma", vector(2))]
    return rules + [rule for part in ("to_qkv", "proj") for rule in _pointwise(torch + part, path + part, 2)]


def _resample(torch: str, path: str) -> list[Rule]:
    return [
        *_linear(f"{torch}resample.1", f"{path}resample"),
        Rule(f"{torch}time_conv.weight", f"{path}time_conv/kernel", TIME_TAPS),
        Rule(f"{torch}time_conv.bias", f"{path}time_conv/bias", SAME),
    ]


WAN_VAE = [
    Rule("latent_{what:mean|std}", "latent_{what}", SAME),  # ours alone: Wan keeps them in its code
    *_pointwise("{conv:conv1|conv2}", "{conv}", 3),
    *_linear("{side:encoder|decoder}.conv1", "{side}/conv1"),
    Rule("{side:encoder|decoder}.head.0.gamma", "{side}/norm/gamma", vector(3)),
    *_linear("{side:encoder|decoder}.head.2", "{side}/head"),
    *_resnet(_BLOCK, _PATH, ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut")),
    *_attention(_BLOCK, _PATH),
    *_resample(_BLOCK, _PATH),
]


def diffusers_vae(res_blocks: int = 2, levels: int = 4) -> list[Rule]:
    """Diffusers nests the decoder's blocks; Wan and we count them through: each level has res_blocks + 1, then its upsampler."""
    names = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
    side, mid = "{side:encoder|decoder}.", "{side:encoder|decoder}.mid_block."
    down = r"encoder.down_blocks.{n:\d+}."
    rules = [
        *_pointwise("quant_conv", "conv1", 3),
        *_pointwise("post_quant_conv", "conv2", 3),
        *_linear(side + "conv_in", "{side}/conv1"),
        Rule(side + "norm_out.gamma", "{side}/norm/gamma", vector(3)),
        *_linear(side + "conv_out", "{side}/head"),
        *_resnet(mid + "resnets.0.", "{side}/middle_0/", names),
        *_attention(mid + "attentions.0.", "{side}/middle_1/"),
        *_resnet(mid + "resnets.1.", "{side}/middle_2/", names),
        *_resnet(down, "encoder/downsamples_{n}/", names),
        *_resample(down, "encoder/downsamples_{n}/"),
    ]
    for level in range(levels):
        up, first = f"decoder.up_blocks.{level}.", level * (res_blocks + 2)
        for block in range(res_blocks + 1):
            rules += _resnet(f"{up}resnets.{block}.", f"decoder/upsamples_{first + block}/", names)
        rules += _resample(f"{up}upsamplers.0.", f"decoder/upsamples_{first + res_blocks + 1}/")
    return rules


def taehv(levels: int = 3) -> list[Rule]:
    """The decoder, which TAEHV counts through with all that has no weights; each level has 3 memory blocks and 3 more parts."""
    rules = _linear("decoder.1", "conv_in") + _linear(f"decoder.{6 * levels + 4}", "conv_out")
    for level in range(levels):
        first = 3 + 6 * level
        for block in range(3):
            for part in range(3):
                rules += _linear(
                    f"decoder.{first + block}.conv.{2 * part}", f"memory_{level}_{block}/conv{part + 1}"
                )
        rules.append(Rule(f"decoder.{first + 4}.conv.weight", f"grow_{level}/kernel", pointwise(2)))
        rules.append(Rule(f"decoder.{first + 5}.weight", f"conv_{level}/kernel", KERNEL))
    return rules


TABLES = {
    "dit": {"wan": WAN_DIT, "diffusers": DIFFUSERS_DIT},
    "vae": {"wan": WAN_VAE, "diffusers": diffusers_vae()},
    "tiny": {"taehv": taehv()},
    "umt5": {"wan": WAN_UMT5, "transformers": TRANSFORMERS_UMT5},
}
