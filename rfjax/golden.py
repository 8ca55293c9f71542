"""A directory of reference numbers: what the public PyTorch implementation of Rolling Forcing computes.

config.json, vae_config.json and umt5_config.json say the sizes, which may be any; *.safetensors hold random weights under their
official names; *.npz hold inputs and outputs: video [B, F, C, H, W], noise [B, block, step, f, C, H, W].
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from rfjax.dit import DiT, DiTConfig
from rfjax.errors import UserError
from rfjax.rollout import RolloutConfig
from rfjax.umt5 import UMT5, UMT5Config
from rfjax.vae import VAE, VAEConfig

LISTS = {"patch_size", "denoising_steps", "dim_mult", "temperal_downsample"}
FRACTIONS = {"eps", "timestep_shift", "denoising_steps"}  # all other entries are integers


def read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """reader(path); UserError for a file that is missing or damaged."""
    if not path.is_file():
        raise UserError(
            f"There is no {path.name} in {path.parent}; give a complete directory of reference numbers."
        )
    try:
        return reader(path)
    except Exception as error:  # what a damaged file makes its reader raise is not one type
        raise UserError(f"{path} is damaged ({error}); copy it again.") from error


def settings(path: Path, *names: str) -> list[Any]:
    """Named entries of a JSON object; UserError if one is missing, of another type or not positive."""
    entries = read(path, lambda path: json.loads(path.read_text()))
    for name in names:
        if not isinstance(entries, dict) or name not in entries:
            raise UserError(f"{path} has no entry {name!r}; add it.")
        numbers = entries[name] if name in LISTS else [entries[name]]
        kind = int | float if name in FRACTIONS else int
        if not (numbers and isinstance(numbers, list)) or not all(
            isinstance(n, kind) and (n is False or n > 0) for n in numbers
        ):
            raise UserError(
                f"{name!r} in {path} is {entries[name]!r}; give a positive number or a list of them."
            )
    return [entries[name] for name in names]


def build(path: Path, config: type, **fields: Any) -> Any:
    """config(**fields); UserError if they do not fit together."""
    try:
        return config(**fields)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} does not describe a model: {error}.") from error


class Arrays:
    """One .npz file, checked: sizes must agree with the configuration, and arrays with each other."""

    def __init__(self, path: Path, sizes: dict[str, int], patch_size: tuple[int, int, int]):
        self.path, self.sizes, self.patch = path, dict(sizes), dict(zip("HW", patch_size[1:], strict=True))
        self.content = read(path, lambda path: dict(np.load(path, allow_pickle=False).items()))

    def take(self, name: str, axes: str | None = None) -> np.ndarray:
        """The array as float32. Named axes ("B F C H W", capitals agree within a file) are checked."""
        if name not in self.content:
            raise UserError(
                f"{self.path} has no array {name!r}; give a complete directory of reference numbers."
            )
        array = self.content[name]
        axes = [""] * array.ndim if axes is None else axes.split()
        if array.ndim != len(axes) or array.dtype.kind not in "fiub":
            raise UserError(
                f"{name!r} in {self.path} should hold numbers with axes {axes}, but has shape {array.shape}."
            )
        for axis, size in zip(axes, array.shape, strict=True):
            expected = self.sizes.setdefault(axis, size) if axis.isupper() or axis in self.sizes else size
            if size != expected or size == 0 or size % self.patch.get(axis, 1):
                raise UserError(
                    f"{name!r} in {self.path} has shape {array.shape}: {axis} = {size} does not fit."
                )
        return array.astype(np.float32)

    def latents(self, name: str, frames: str = "F") -> np.ndarray:
        """[B, F, C, H, W] → [B, F, H, W, C]."""
        return np.moveaxis(self.take(name, f"B {frames} C H W"), 2, -1)

    def noise(self, name: str) -> np.ndarray:
        """[B, block, step, f, C, H, W] → [B, block, step, f, H, W, C]."""
        return np.moveaxis(self.take(name, "B blocks step f C H W"), 4, -1)

    def context(self, name: str) -> np.ndarray:
        """Text embeddings [B, text_len, text_dim]."""
        return self.take(name, "B text_len text_dim")


class Golden:
    """A directory of reference numbers and the models that its configuration describes."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"There is no directory {self.root}; give one of reference numbers.")
        path = self.root / "config.json"
        names = "dim ffn_dim num_heads num_layers text_dim text_len in_dim freq_dim patch_size eps".split()
        sizes = dict(zip(names, settings(path, *names), strict=True))
        if len(sizes["patch_size"]) != 3:
            raise UserError(
                f"'patch_size' in {path} is {sizes['patch_size']}; give its frames, rows and columns."
            )
        self.dit = DiT(build(path, DiTConfig, **sizes))
        names = (
            "denoising_steps",
            "timestep_shift",
            "frames_per_block",
            "sink_frames",
            "max_attention_frames",
        )
        steps, shift, block, sink, span = settings(path, *names)
        if sink % block or span % block:
            raise UserError(
                f"sink_frames and max_attention_frames in {path} must be multiples of frames_per_block."
            )
        memory = dict(sink_blocks=sink // block, ring_blocks=span // block, span_blocks=span // block)
        self.rollout = build(path, RolloutConfig, steps=steps, shift=shift, block_frames=block, **memory)
        self.sizes = {name: sizes[name] for name in ("text_len", "text_dim")}
        self.sizes |= {"C": sizes["in_dim"], "step": len(steps), "f": block}

    def vae(self) -> VAE:
        """The VAE of vae_config.json."""
        path = self.root / "vae_config.json"
        names = ("dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample")
        dim, z_dim, dim_mult, num_res_blocks, temporal = settings(path, *names)
        down = dict(dim_mult=tuple(dim_mult), temporal_downsample=tuple(temporal))
        return VAE(build(path, VAEConfig, dim=dim, z_dim=z_dim, num_res_blocks=num_res_blocks, **down))

    def umt5(self) -> UMT5:
        """The text encoder of umt5_config.json."""
        path = self.root / "umt5_config.json"
        names = ("vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")
        vocab, dim, attn, ffn, heads, layers, buckets = settings(path, *names)
        sizes = dict(vocab_size=vocab, dim=dim, attn_dim=attn, ffn_dim=ffn)
        counts = dict(num_heads=heads, num_layers=layers, num_buckets=buckets)
        return UMT5(build(path, UMT5Config, **sizes, **counts))

    def arrays(self, name: str, **sizes: int) -> Arrays:
        """NAME.npz."""
        return Arrays(self.root / f"{name}.npz", self.sizes | sizes, self.dit.config.patch_size)

    def weights(self, name: str) -> dict[str, np.ndarray]:
        """NAME.safetensors, under the official names."""
        return read(self.root / f"{name}.safetensors", load_file)
