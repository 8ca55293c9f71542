"""Low-rank adapters (LoRA, arXiv 2106.09685): a kernel W learns as W + (α / r)·down·up, W itself fixed.

    python -m rfjax.lora BASE.safetensors ADAPTERS.safetensors OUT.safetensors    # merges what a run exported

Adapters are a tree like the parameters', with {"down" [L, in, r], "up" [L, r, out]} in place of every kernel [L, in, out] that is
adapted. `up` begins as zeros, so that training begins from W.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rfjax import checkpoint, tensorfile, tree
from rfjax.errors import Parser, UserError, exit_cleanly


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which kernels are adapted, and how much."""

    rank: int  # 0: no adapters, all parameters are trained
    alpha: float = 0.0  # of the scale α / r; 0 is r: a scale of 1
    targets: str = "blocks/(self|cross)_[qkvo]"  # regex of the layers' paths

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"rank {self.rank} must be 0 or more")

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


def init(config: LoRAConfig, base, key: Array) -> dict[str, Any]:
    """Adapters of base's kernels (arrays or shapes), float32; UserError where `targets` names none."""
    kernels = {
        path.removesuffix("/kernel"): leaf
        for path, leaf in tree.flatten(base).items()
        if path.endswith("/kernel")
    }
    chosen = sorted(path for path in kernels if re.fullmatch(config.targets, path))
    if not chosen:
        raise UserError(
            f"config.lora.targets {config.targets!r} matches no layer; there are {', '.join(sorted(kernels))}."
        )
    flat = {}
    for path, here in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *layers, rows, columns = kernels[path].shape
        flat[f"{path}/down"] = jax.random.normal(here, (*layers, rows, config.rank)) * rows**-0.5
        flat[f"{path}/up"] = jnp.zeros((*layers, config.rank, columns))
    return tree.unflatten(flat)


def merge(base, adapters, scale: float = 1.0):
    """base with scale·down·up added to every adapted kernel; in base's dtypes, the product in float32."""
    flat, low = tree.flatten(base), tree.flatten(adapters)
    for path in {path.rsplit("/", 1)[0] for path in low}:
        kernel = flat[f"{path}/kernel"]
        change = jnp.matmul(low[f"{path}/down"], low[f"{path}/up"], precision=jax.lax.Precision.HIGHEST)
        flat[f"{path}/kernel"] = (kernel + scale * change).astype(kernel.dtype)
    return tree.unflatten(flat)


def scaled(adapters, scale: float):
    """Adapters whose product needs no scale any more: what a file holds."""
    flat = tree.flatten(adapters)
    return tree.unflatten({path: x * scale if path.endswith("/up") else x for path, x in flat.items()})


@exit_cleanly
def main() -> None:
    parser = Parser(prog="python -m rfjax.lora", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="dit.safetensors that the adapters were trained on")
    parser.add_argument("adapters", help="lora.safetensors of a run")
    parser.add_argument("out", help="file to write: parameters that need no adapters")
    args = parser.parse_args()
    base, adapters = _read(args.base), _read(args.adapters)
    fitting = {
        path.removesuffix("kernel") + part: (*leaf.shape[:-2], leaf.shape[axis])
        for path, leaf in base.items()
        if path.endswith("/kernel")
        for part, axis in (("down", -2), ("up", -1))
    }
    for path, leaf in adapters.items():
        axis = -2 if path.endswith("/down") else -1
        if fitting.get(path) != (*leaf.shape[:-2], leaf.shape[axis]):
            raise UserError(
                f"{args.adapters} has {path} of {list(leaf.shape)}, which adapts nothing in {args.base}; "
                "give the parameters that it was trained on."
            )
    checkpoint.save_params(args.out, merge(*map(tree.unflatten, (base, adapters))))
    print(f"{args.base} with {args.adapters} is in {args.out}")


def _read(path) -> dict[str, Array]:
    source = tensorfile.read(path)
    return {name: jnp.asarray(source.load(name, None)) for name in source.kinds}


if __name__ == "__main__":
    main()
