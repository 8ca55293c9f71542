"""From prompts to frames: text encoder, rollout and streaming decoder as one stream of blocks."""

import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax import Array

from rfjax import (
    attention,
    axes,
    checkpoint,
    config,
    dit,
    parameters,
    placement,
    prompts,
    rollout,
    text,
    weights,
)
from rfjax import quantize as quantization
from rfjax.compilation import host
from rfjax.dit import DiTConfig
from rfjax.errors import UserError
from rfjax.stream import Stream, method_of
from rfjax.tiny_vae import TinyDecoder, TinyVAEConfig
from rfjax.umt5 import UMT5Config
from rfjax.vae import VAE, VAEConfig

RANDOM = "random"  # as a name of weights: numbers in their place, which cost the same time


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
    encoder: text.WordEncoder | text.Unread | prompts.PromptEncoder
    dit: dit.DiT
    vae: VAE  # its sizes; its weights where it decodes or where something is given
    decoder: VAE | TinyDecoder
    rollout: rollout.RolloutConfig
    params: dict[str, Any]  # {"dit": …, "vae" and "tiny" where they are needed: …}
    where: placement.Placement = placement.HERE  # the devices of its parameters
    method: str = "rolling"  # by which clips are rolled out, where nothing else is asked for

    def over(self, devices: placement.Devices) -> "Sampler":
        """The same sampler on these devices, which `check_devices` has seen."""
        where = placement.place(devices)
        params = {
            name: placement.whole(tree, where.network if name == "dit" else where.decoder)
            for name, tree in self.params.items()
        }
        return dataclasses.replace(self, params=params, where=where)

    def listening(self) -> "Sampler":
        """The same sampler for prompts that come at any time: UMT5 is loaded for the first, and stays in the host's memory."""
        return dataclasses.replace(self, encoder=getattr(self.encoder, "resident", self.encoder))

    def bind(self, captions: list[str]) -> rollout.Model:
        """The network bound to its weights and to one prompt a clip, which is checked (UserError)."""
        context = jnp.asarray(self.encoder.encode(captions))
        with axes.on(self.where.network):
            kv = text_kv(self.dit, self.params["dit"], context)
        return rollout.Model(self.dit, self.params["dit"], kv, self.rollout)

    def latents(
        self,
        captions: list[str],
        seed: int,
        num_frames: int,
        method: str | None = None,
        given: Iterable[Array] = (),
        recall: bool = False,
    ) -> Stream:
        """Finished blocks [B, f, H, W, C] of one clip a prompt, at least num_frames latent frames of each.

        Clip b depends on the seed, on b and on its prompt, not on the other clips. They begin with the `given` blocks
        [B or 1, f, h, w, C]. Prompts are checked now (UserError); blocks are computed as they are taken. `method` is a name of
        `rollout.METHODS`, by default the sampler's own; `recall` is for prompts that shall change by recaching.
        """
        model, clips, mesh = self.bind(captions), len(captions), self.where.network
        blocks = -(-num_frames // self.rollout.block_frames)
        given = (placement.split(jnp.broadcast_to(x, (clips, *x.shape[1:])), mesh) for x in given)
        keys, method = clip_keys(seed, clips), method or self.method
        return Stream(model, keys, self.frame_shape, method, blocks, given, recall, mesh)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(f, h, w, C) of a block."""
        return self.rollout.block_frames, *latent_size(self.video, self.vae.config, self.dit.config)

    @property
    def decoder_params(self) -> dict[str, Any]:
        """The parameters of what decodes."""
        return self.params["tiny" if isinstance(self.decoder, TinyDecoder) else "vae"]

    def decode(self, blocks: Iterable[Array]) -> Iterator[np.ndarray]:
        """Latent blocks [B, n, h, w, C], from a clip's start → uint8 frames [B, m, H, W, 3] on the host.

        The first block gives 1 + 4 (n - 1) frames, each later one 4 n. The first is handed out at once; from then on the next
        block is under way on the device while the caller has the present one.
        """
        coming, ready = self.frames(blocks), None
        for frames in itertools.islice(coming, 1):  # seen before the program for later blocks is compiled
            yield fetched(frames)
        for frames in coming:
            if ready is not None:
                yield fetched(ready)
            ready = frames
        if ready is not None:
            yield fetched(ready)

    def frames(self, blocks: Iterable[Array]) -> Iterator[Array]:
        """As `decode`, but left on the device: nothing waits for it."""
        # A CPU runs what one thread asks for in order: asked for by another, decoding a block goes on beside the next step.
        state, worker = None, ThreadPoolExecutor(1)
        try:
            for block in blocks:
                frames, state = worker.submit(self._decode, block, state).result()
                yield frames
        finally:
            worker.shutdown(wait=False)  # Ctrl-C does not wait for a program that is being compiled

    def _decode(self, block: Array, state):
        mesh = self.where.decoder
        with axes.on(mesh):
            return decode_block(self.decoder, self.decoder_params, placement.split(block, mesh), state)

    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[Array]:
        """Frames uint8 [B, H, W, 3], from a clip's start → latent blocks [B, f, h, w, C]; an unfinished block is left out."""
        (first, later), frames, state = block_lengths(self.vae.config, self.rollout), iter(frames), None
        for length in itertools.chain([first], itertools.repeat(later)):
            chunk = list(itertools.islice(frames, length))
            if len(chunk) < length:
                return
            with axes.on(self.where.decoder):
                latents, state = _encode(self.vae, self.params["vae"], np.stack(chunk, 1), state)
            yield latents

    def latent_frames(self, frames: int) -> int:
        """Latent frames that cover so many video frames."""
        return 1 + -(-(frames - 1) // self.vae.config.temporal_stride)


def fetched(frames: Array) -> np.ndarray:
    """An array once it is there. It is asked for in between, since who waits in XLA hears no Ctrl-C."""
    while not frames.is_ready():
        time.sleep(0.0005)
    return np.asarray(frames)


def clip_keys(seed: int, clips: int) -> Array:
    """Random keys [B] of the clips of a seed; UserError for a seed outside 0 … 2^32 - 1."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise UserError(f"A seed is a whole number from 0 to 2^32 - 1, not {seed!r}.")
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.PRNGKey(seed), jnp.arange(clips))


@functools.partial(jax.jit, static_argnames="network")
def text_kv(network: dit.DiT, params: dict[str, Any], context: Array) -> dit.KV:
    """Encoded prompts [B, text_len, text_dim] → their keys and values [L, B, text_len, A, K], on the devices of the parameters."""
    return network.apply({"params": params}, context, method="text_kv")


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="state")
def decode_block(decoder, params, latents, state):
    """Latents [B, n, h, w, C] → (uint8 frames [B, m, H, W, 3], the decoder's state after them); `state` is donated.

    One latent frame after another: what lies in memory meanwhile is of one. On CPU one clip after another besides, so that it
    stays in the processor's cache.
    """

    def of_one(clip):
        alone = jax.tree.map(lambda leaf: leaf[None], clip)
        return jax.tree.map(lambda leaf: leaf[0], _decode_frames(decoder, params, *alone))

    if latents.shape[0] > 1 and axes.on_one_cpu():
        return jax.lax.map(of_one, (latents, state))
    return _decode_frames(decoder, params, latents, state)


def _decode_frames(decoder, params, latents, state):
    """As `decode_block`, all clips at once."""

    def frames(state, latents):
        video, state = decoder.apply({"params": params}, latents, state, method="decode_normalised")
        state = jax.tree.map(lambda past: axes.constrain(past, "batch"), state)  # on a mesh it stays there
        return state, jnp.round((jnp.clip(video.astype(jnp.float32), -1, 1) + 1) * 127.5).astype(jnp.uint8)

    done, rest = [], latents
    if state is None:  # a clip's first latent frame gives one frame, every other one as many as the next
        state, first = frames(state, latents[:, :1])
        done, rest = [first], latents[:, 1:]
    state, video = jax.lax.scan(frames, state, jnp.moveaxis(rest, 1, 0)[:, :, None])  # [n, B, m, H, W, 3]
    return jnp.concatenate([*done, *video], 1), state


@functools.partial(jax.jit, static_argnames="vae", donate_argnames="state")
def _encode(vae, params, video, state):
    video = video.astype(jnp.float32) / 127.5 - 1
    return vae.apply({"params": params}, video, state, method="encode_normalised")


def block_lengths(vae: VAEConfig, roll: rollout.RolloutConfig) -> tuple[int, int]:
    """Video frames of a clip's first block and of every later one."""
    later = vae.temporal_stride * roll.block_frames
    return later - vae.temporal_stride + 1, later


def latent_size(video: VideoConfig, vae: VAEConfig, network: DiTConfig) -> tuple[int, int, int]:
    """(h, w, C) of a latent frame; UserError with the nearest legal sizes if the patches do not tile it."""
    stride = tuple(vae.spatial_stride * side for side in network.patch_size[1:])
    size = (video.height, video.width)
    nearest = tuple(
        sorted({step * max(1, side // step), step * -(-side // step)})
        for side, step in zip(size, stride, strict=True)
    )
    if any(side < 1 or side % step for side, step in zip(size, stride, strict=True)):
        raise UserError(
            f"{video.width}x{video.height} is no size that this network makes: the width must be a multiple of {stride[1]} and "
            f"the height of {stride[0]}; near it are widths of {' or '.join(map(str, nearest[1]))} "
            f"and heights of {' or '.join(map(str, nearest[0]))}."
        )
    return video.height // vae.spatial_stride, video.width // vae.spatial_stride, network.in_dim


def resize(settings: ml_collections.ConfigDict, size: str) -> None:
    """Puts a size such as "832x480" into the config; UserError for a word that is none."""
    match = re.fullmatch(r"([0-9]{1,5})[x×]([0-9]{1,5})", size)
    if not match:
        raise UserError(f"--size must be like 832x480, width and height in pixels, not {size}.")
    settings.video.width, settings.video.height = map(int, match.groups())


def sections(settings: ml_collections.ConfigDict):
    """The sections of every config: (VideoConfig, DiTConfig, VAEConfig, RolloutConfig); UserError for bad ones."""
    network, codec = config.build(DiTConfig, settings, "dit"), config.build(VAEConfig, settings, "vae")
    config.same("vae.z_dim", codec.z_dim, "dit.in_dim", network.in_dim)
    roll = config.build(rollout.RolloutConfig, settings, "rollout")
    return config.build(VideoConfig, settings, "video"), network, codec, roll


def check(network: DiTConfig, roll: rollout.RolloutConfig) -> None:
    """UserError where this machine lacks the attention kernel or the 8-bit products that a config asks for."""
    attention.check(network.attention, network.dtype, network.head_dim)
    quantization.check(quantization.Mode(network.linear_dtype, roll.int8_cache))


def check_devices(
    settings: ml_collections.ConfigDict,
    devices: placement.Devices,
    clips: int,
    there: Sequence[jax.Device] | None = None,
) -> None:
    """UserError where these devices are not `there`, or do not divide so many clips, the network's heads, or a frame's tokens."""
    video, network, codec, _ = sections(settings)
    height, width, _ = latent_size(video, codec, network)
    placement.check(devices, clips, network, height * width // math.prod(network.patch_size), there)


def load(
    settings: ml_collections.ConfigDict,
    place: str | None = None,
    given: bool = False,
    quantize: str | None = None,
) -> Sampler:
    """The sampler of a config, with its weights in the dtypes that the config says.

    Args:
      place: a folder or a hub repository, see `weights.locate`; default `config.weights`, which may also be the name of
        weights that come with the package, or RANDOM.
      given: whether clips shall begin with something given, for which the VAE's weights are needed.
      quantize: one of `quantize.MODES`; default: what the config's fields say.

    Raises:
      UserError: a bad section or size; a kernel or quantisation that this machine lacks; missing or damaged weights.
    """
    if quantize is not None:
        settings = quantization.configured(settings, quantize)
    video, network, codec, roll = sections(settings)
    latent_size(video, codec, network)
    check(network, roll)
    tiny, reader, method = tiny_decoder(settings), prompts.configured(settings, network), method_of(settings)
    sizes = (
        {"dit": network} | ({"tiny": tiny} if tiny else {}) | ({"vae": codec} if given or not tiny else {})
    )
    readers = prompts.FILES if isinstance(reader, UMT5Config) else []
    folder = _folder(place, settings.get("weights", ""), [f"{name}.safetensors" for name in sizes], readers)
    params = {name: _params(folder, name, size) for name, size in sizes.items()}
    if network.linear_dtype:
        params["dit"] = quantization.params(params["dit"], network.linear_dtype)
    vae = VAE(codec)
    decoder = TinyDecoder(tiny) if tiny else vae
    encoder = prompts.encoder(reader, folder, network)
    return Sampler(video, encoder, dit.DiT(network), vae, decoder, roll, params, method=method)


def _params(folder: Path | None, name: str, sizes) -> dict[str, Any]:
    """Parameters of "dit", "vae" or "tiny" from their file, or without a folder random ones."""
    shapes = parameters.as_filed(name, sizes)
    if folder is None:
        return parameters.stand_in(shapes)
    return checkpoint.load_params(folder / f"{name}.safetensors", shapes)


def tiny_decoder(settings) -> TinyVAEConfig | None:
    """The sizes of the tiny decoder where the config wants it in place of the VAE's; UserError for another word."""
    kind = settings.get("decoder", "vae")
    if kind not in ("vae", "tiny"):
        raise UserError(f"config.decoder is {kind!r}; it must be 'vae' or 'tiny'.")
    if kind == "vae":
        return None
    tiny = config.build(TinyVAEConfig, settings, "tiny")
    config.same("tiny.z_dim", tiny.z_dim, "dit.in_dim", settings.dit.get("in_dim", DiTConfig.in_dim))
    return tiny


def _folder(place: str | None, default: str, networks: list[str], readers: list[str]) -> Path | None:
    """Where these files of weights are; None for RANDOM."""
    if not (place or default):
        raise UserError("The config names no weights; give --weights, or set config.weights.")
    if (place or default) == RANDOM:
        return None
    packaged = Path(str(resources.files("rfjax"))) / "assets" / default
    if place is None and packaged.is_dir():
        return packaged
    if not weights.here(place or default, readers):
        host()  # which is to read prompts: asked for before its gigabytes are fetched
    return weights.locate(place or default, [*networks, *readers])
