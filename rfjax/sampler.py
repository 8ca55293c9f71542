"""From prompts to frames: text encoder, rollout and streaming decoder as one stream of blocks."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from rfjax import checkpoint, config, dit, rollout, text
from rfjax.dit import DiTConfig
from rfjax.errors import UserError
from rfjax.vae import VAE, VAEConfig


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """What a clip looks like from outside."""

    height: int
    width: int
    fps: float


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Everything that turns prompts into video, bound to its weights."""

    video: VideoConfig
    encoder: text.WordEncoder
    dit: dit.DiT
    vae: VAE
    rollout: rollout.RolloutConfig
    params: dict[str, Any]  # {"dit": …, "vae": …}

    def latents(
        self, prompts: list[str], seed: int, num_frames: int, method: str = "rolling"
    ) -> Iterator[Array]:
        """Finished blocks [B, f, h, w, C] of one clip a prompt, at least num_frames latent frames of each.

        Clip b depends on the seed, on b and on its prompt, not on the other clips. Prompts are checked now
        (UserError); blocks are computed as they are taken.
        """
        context = jnp.asarray(self.encoder.encode(prompts))
        text_kv = self.dit.apply({"params": self.params["dit"]}, context, method="text_kv")
        model = rollout.Model(self.dit, self.params["dit"], text_kv, self.rollout)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(seed), jnp.arange(len(prompts)))
        stride, block = self.vae.config.spatial_stride, self.rollout.block_frames
        frame_shape = (block, self.video.height // stride, self.video.width // stride, self.dit.config.in_dim)
        return rollout.stream(model, keys, frame_shape, method, -(-num_frames // block))

    def decode(self, blocks: Iterable[Array]) -> Iterator[np.ndarray]:
        """Latent blocks [B, n, h, w, C], from a clip's start → uint8 frames [B, m, H, W, 3] on the host.

        The first block gives 1 + 4 (n - 1) frames, each later one 4 n. The next block is under way on the
        device while the caller has the present one.
        """
        state, ready = None, None
        for block in blocks:
            frames, state = _decode(self.vae, self.params["vae"], block, state)
            if ready is not None:
                yield np.asarray(ready)
            ready = frames
        if ready is not None:
            yield np.asarray(ready)

    def latent_frames(self, frames: int) -> int:
        """Latent frames that cover so many video frames."""
        return 1 + -(-(frames - 1) // self.vae.config.temporal_stride)


@functools.partial(jax.jit, static_argnames="vae", donate_argnames="state")
def _decode(vae, params, latents, state):
    raw = vae.apply({"params": params}, latents, method="denormalise")
    video, state = vae.apply({"params": params}, raw, state, method="decode_step")
    return jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5).astype(jnp.uint8), state


def load(settings: ml_collections.ConfigDict, folder: str | Path | None = None) -> Sampler:
    """The sampler of a config, with the weights dit.safetensors and vae.safetensors of a folder.

    The default folder holds the weights that come with the package under the name `config.weights`.

    Raises:
      UserError: bad config section; missing, truncated or mis-shaped weights.
    """
    video = config.build(VideoConfig, settings, "video")
    encoder = config.build(text.WordEncoder, settings, "text")
    roll = config.build(rollout.RolloutConfig, settings, "rollout")
    network, vae = config.build(DiTConfig, settings, "dit"), VAE(config.build(VAEConfig, settings, "vae"))
    folder = Path(folder) if folder else Path(str(resources.files("rfjax"))) / "assets" / settings.weights
    if not folder.is_dir():
        raise UserError(
            f"There is no weights folder {folder}; name one with dit.safetensors and vae.safetensors."
        )
    key = jax.random.key(0)
    stride = vae.config.spatial_stride
    likes = {
        "dit": jax.eval_shape(functools.partial(dit.init, network), key),
        "vae": jax.eval_shape(vae.init, key, jnp.zeros((1, 1, stride, stride, 3)))["params"],
    }
    params = {
        name: checkpoint.load_params(folder / f"{name}.safetensors", like) for name, like in likes.items()
    }
    return Sampler(video, encoder, dit.DiT(network), vae, roll, jax.tree.map(jnp.asarray, params))
