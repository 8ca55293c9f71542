"""rfjax against its PyTorch twin on CPU: same weights, same sizes, same numbers, in turns.

    python benchmarks/versus_torch.py [small] [large] [vae]

Needs torch, and a machine with nothing else to do: PyTorch's threads wait for each other in a loop, so work beside it slows it
down several times, and rfjax less. First checks that both give the same numbers, then lets them take turns and prints medians
and their ratio.
"""

import argparse
import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_twin
import torch_vae

from rfjax import compilation, dit, parameters, rollout, vae

SIZES = {  # network, height and width of latents
    "small": (dict(dim=192, ffn_dim=768, num_heads=6, num_layers=6, freq_dim=128, rope_base=100.0), (8, 8)),
    "large": (dict(dim=512, ffn_dim=2048, num_heads=8, num_layers=8), (16, 24)),
}
TEXT = dict(text_len=16, text_dim=48)


def random_params(name: str, sizes) -> dict:
    """Random parameters of "dit" or "vae": kernels that keep their input's variance, scales about 1, the rest small."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        std = np.prod(leaf.shape[-2 if name == "dit" else 0 : -1]) ** -0.5 if kind == "kernel" else 0.1
        mean = kind in ("scale", "gamma", "latent_std")
        return jnp.asarray(std * rng.normal(size=leaf.shape) + mean, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, parameters.abstract(name, sizes))


def rolling_model(config: dit.DiTConfig) -> rollout.Model:
    """A model of random weights on one random prompt."""
    params = random_params("dit", config)
    context = jax.random.normal(jax.random.key(1), (1, config.text_len, config.text_dim))
    text_kv = dit.DiT(config).apply({"params": params}, context, method="text_kv")
    return rollout.Model(dit.DiT(config), params, text_kv, rollout.RolloutConfig())


@functools.partial(jax.jit, donate_argnames="state")
def rolling_step(model: rollout.Model, noise, state: rollout.RolloutState):
    """`stream.stream_step` on a noise array [B, block, step, f, H, W, C]."""
    return rollout.METHODS["rolling"].step(model, rollout.array_noise(noise), rollout.ENDLESS, state)


class Rolling:
    """A stream in its steady state, and its twin; each call gives the next block."""

    def __init__(self, size: str, blocks: int, compiled: bool):
        sizes, latents = SIZES[size]
        model = rolling_model(dit.DiTConfig(**sizes, **TEXT))
        frame_shape = (model.config.block_frames, *latents, 16)
        steps = model.config.num_steps
        lead = model.config.span_blocks + steps - 1  # index of the first steady window
        self.noise = jax.random.normal(jax.random.key(2), (1, lead + blocks + 1, steps, *frame_shape))
        self.model, self.state = model, rollout.rolling_init(model, 1, frame_shape)
        for _ in range(lead):
            self.ours()
        self.twin = torch_twin.Stream(model, self.state, compiled)
        noise = np.asarray(self.noise)
        self.windows = iter([torch_twin.tensor(window_noise(noise, lead + i)) for i in range(blocks)])

    def ours(self):
        self.state, block = rolling_step(self.model, self.noise, self.state)
        return block.block_until_ready()

    def theirs(self):
        return self.twin.step(next(self.windows))


def window_noise(noise: np.ndarray, index: int) -> np.ndarray:
    """What the twin's window `index` needs of noise [B, block, step, …]: [B, S, …], of re-noised blocks, then of the newest."""
    steps = noise.shape[2]
    following = [noise[:, index - steps + 1 + place, steps - place] for place in range(1, steps)]
    return np.stack([*following, noise[:, index, 0]], 1)


class Decoding:
    """Wan's decoder in the middle of a stream, and its twin; each call decodes the same block of side×side latents."""

    def __init__(self, dim: int, side: int, frames: int = 3):
        self.vae = vae.VAE(vae.VAEConfig(dim=dim))
        self.params = random_params("vae", self.vae.config)
        self.latents = jax.random.normal(jax.random.key(3), (1, frames, side, side, 16))
        self.state = start(self.vae, self.params, self.latents)
        self.twin = torch_vae.Decoder(self.vae.config, self.params, self.state)
        self.torch_latents = torch_twin.tensor(self.latents)

    def ours(self):
        video, self.state = decode(self.vae, self.params, self.latents, self.state)
        return video.block_until_ready()

    def theirs(self):
        return self.twin(self.torch_latents)


@functools.partial(jax.jit, static_argnames="network")
def start(network, params, latents):
    """The decoder's state after a clip's first latent frame."""
    return network.apply({"params": params}, latents[:, :1], None, method="decode_normalised")[1]


@functools.partial(jax.jit, static_argnames="network", donate_argnames="state")
def decode(network, params, latents, state):
    """A later block as `sampler.decode_block` has it, one latent frame after another, without the way to bytes."""

    def frames(state, latent):
        return network.apply({"params": params}, latent, state, method="decode_normalised")[::-1]

    state, video = jax.lax.scan(frames, state, jnp.moveaxis(latents, 1, 0)[:, :, None])  # [n, B, m, H, W, 3]
    return jnp.concatenate(list(video), 1), state


def timed(call, times: int) -> list[float]:
    """Seconds of each call, after one that is not counted: whoever ran before has left the caches his."""
    call()
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return spent


def compare(name: str, pair, checked: int, rounds: int, times: int) -> None:
    """Prints the largest difference over `checked` blocks, then medians over rounds and the ratio's spread."""
    with torch.inference_mode():
        errors = [
            float(np.abs(np.asarray(pair.ours()) - pair.theirs().numpy()).max()) for _ in range(checked)
        ]
        print(f"{name}: largest difference over {checked} blocks {max(errors):.1e}", flush=True)
        ours, theirs = zip(
            *((timed(pair.ours, times), timed(pair.theirs, times)) for _ in range(rounds)), strict=True
        )
    ours, theirs = ([statistics.median(r) for r in x] for x in (ours, theirs))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    print(
        f"{name}: rfjax {statistics.median(ours) * 1e3:.1f} ms, torch {statistics.median(theirs) * 1e3:.1f} ms, "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "parts",
        nargs="*",
        metavar="part",
        help="of small, large, vae (default: all, with --compile small and large)",
    )
    add("--rounds", type=int, default=5, help="turns of each side (default %(default)s)")
    add("--times", type=int, default=4, help="timed blocks of a turn (default %(default)s)")
    add("--compile", action="store_true", help="the twin's layers by torch.compile; needs a C++ compiler")
    add("--dim", type=int, default=96, help="width of the VAE (default: Wan's %(default)s)")
    add("--side", type=int, default=256, help="pixels of the VAE's frames, each way (default %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*SIZES, "vae"}:
        parser.error(f"there is no part {min(unknown)}; choose of {', '.join(SIZES)}, vae")
    if args.compile and "vae" in args.parts:
        parser.error("--compile is for the rolling step; leave out vae")
    if args.side < 8 or args.side % 8:
        parser.error(f"--side must be a multiple of 8, the pixels of a latent, not {args.side}")
    compilation.keep_programs()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
    print(f"{torch.get_num_threads()} threads each", flush=True)
    for part in args.parts or [*SIZES, *([] if args.compile else ["vae"])]:
        checked = 2 if part == "vae" else 8  # 8: the ring of cached blocks turns once
        blocks = checked + args.rounds * (args.times + 1)
        pair = Decoding(args.dim, args.side // 8) if part == "vae" else Rolling(part, blocks, args.compile)
        compare(part, pair, checked, args.rounds, args.times)


if __name__ == "__main__":
    main()
