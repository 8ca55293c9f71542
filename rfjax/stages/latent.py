"""What the stages on latents share: networks, batches with encoded text, and the VAE.

Text is one of two things. The small world's words are encoded where they are used; where a config has a section `umt5`, prompts
are encoded beforehand (`python -m rfjax.data encode-prompts`, `encode-videos`) and records bring their "context", so that no text
encoder lives where a model trains.
"""

import functools
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rfjax import checkpoint, config, parameters, sampler, shapes, text
from rfjax import data as pipelines
from rfjax.dit import DiT, DiTConfig
from rfjax.errors import UserError
from rfjax.rollout import RolloutConfig
from rfjax.stages.sources import Source
from rfjax.vae import VAE, VAEConfig

ENCODE_PROMPTS = "python -m rfjax.data encode-prompts FILE --config …"
NEGATIVE = "negative.safetensors"  # beside the shards: the encoded negative prompt


class Parts(NamedTuple):
    """The pieces that a config describes."""

    dit: DiT
    rollout: RolloutConfig
    encoder: text.WordEncoder | None  # None where prompts are encoded beforehand
    frame_shape: tuple[int, int, int, int]  # (f, h, w, C) of a latent block


def parts(settings) -> Parts:
    """Builds them; UserError for a bad section."""
    sizes, codec = config.build(DiTConfig, settings, "dit"), config.build(VAEConfig, settings, "vae")
    rollout = config.build(RolloutConfig, settings, "rollout")
    frame = sampler.latent_size(video(settings), codec, sizes)
    return Parts(DiT(sizes), rollout, words(settings), (rollout.block_frames, *frame))


def words(settings) -> text.WordEncoder | None:
    """The small world's encoder; None where prompts are encoded beforehand."""
    return None if "umt5" in settings else config.build(text.WordEncoder, settings, "text")


def video(settings) -> sampler.VideoConfig:
    """What a clip looks like from outside: as the small world has it where there is one, else as the section `video` says."""
    if "world" not in settings:
        return config.build(sampler.VideoConfig, settings, "video")
    world = config.build(shapes.World, settings, "world")
    return sampler.VideoConfig(world.size, world.size, world.fps)


def whole_blocks(settings, name: str) -> None:
    """UserError unless so many latent frames are whole blocks."""
    block = settings.rollout.block_frames
    if settings[name] % block:
        raise UserError(
            f"config.{name} is {settings[name]}; set it to a multiple of the {block} frames of a block."
        )


def records(settings, field: str, leading: tuple[int, ...] = (), frames: int = 1):
    """Batches of the records in settings.data with their text encoded: {"context" [B, text_len, text_dim], field, …}.

    Args:
      field: the array that the stage is about, [*leading, F, h, w, C] in a record.
      frames: the fewest that F may be.

    Raises:
      UserError: no records, or one that lacks its text or is of another size; of the first batch now, of others when they come.
    """
    frame = parts(settings).frame_shape[1:]

    def fits(record):
        shape = record[field].shape if field in record else ()
        sizes = (*shape[: len(leading)], *shape[-3:])
        if len(shape) != len(leading) + 4 or sizes != (*leading, *frame) or shape[-4] < frames:
            wanted = [*leading, f"{frames} or more", *frame]
            raise UserError(
                f"A record in {settings.data} has {field} of {list(shape) or 'no size'}, but this config needs "
                f"[{', '.join(map(str, wanted))}]; make the records anew with `{settings.made_by}`."
            )
        return record

    read = with_context(settings, settings.data, settings.made_by)
    batches = pipelines.records(
        settings.data, settings.batch_size, settings.made_by, settings.seed, lambda record: fits(read(record))
    )
    batches[0]  # read for its mistakes
    return batches.map(_numbers)


def prompt_folder(settings) -> str:
    """Where encoded prompts are: settings.prompts, or settings.data of a stage that needs nothing else; "" for neither."""
    return settings.get("prompts") or settings.get("data") or ""


def prompts(settings, batch_size: int | None = None):
    """Endless batches {"context" [B, text_len, text_dim]} to roll out from; B is settings.batch_size where none is given.

    They are the encoded prompts of `prompt_folder`, else the small world's training captions.
    """
    folder = prompt_folder(settings)
    if folder:
        negative(settings)  # read for its mistakes
    batches = texts(settings, folder, batch_size or settings.batch_size)
    return batches.map(lambda batch: {"context": batch["context"]})  # a folder of videos has latents as well


def texts(settings, folder: str, batch_size: int):
    """Endless batches {"caption" [B], "context" [B, text_len, text_dim]}: the encoded prompts of a folder, or the small world's
    training captions where it is "". UserError as `records` has them, or where there is neither.
    """
    if folder:
        read = with_context(settings, folder, ENCODE_PROMPTS)
        batches = pipelines.records(folder, batch_size, ENCODE_PROMPTS, settings.seed, read)
        batches[0]  # read for its mistakes
        return batches
    encoder = words(settings)
    if not encoder:
        raise UserError(
            f"The config names no encoded prompts: set config.prompts to a folder that `{ENCODE_PROMPTS}` made."
        )
    world = config.build(shapes.World, settings, "world")
    return pipelines.captions(batch_size, settings.seed, world).map(
        lambda batch: batch | {"context": encoder.encode(list(batch["caption"]))}
    )


def unconditional(settings) -> dict[str, Source]:
    """{"negative": {"context" [text_len, text_dim]}}: what guidance leads away from, among the parameters that a stage only uses.

    It is the encoded negative prompt beside the records of `prompt_folder`, or zeros for the small world's words.
    """
    path = "" if words(settings) else str(Path(prompt_folder(settings)) / NEGATIVE)
    shape = settings.dit.text_len, settings.dit.text_dim
    return {"negative": Source(lambda key: {"context": jnp.zeros(shape)}, path)}


def negative(settings) -> np.ndarray:
    """The embedding of `unconditional`, float32 [text_len, text_dim]; UserError where it is not there, or another."""
    source = unconditional(settings)["negative"]
    like = jax.eval_shape(source.init, jax.random.key(0))
    if not source.path:
        return np.zeros(like["context"].shape, np.float32)
    if not os.path.isfile(source.path):
        raise UserError(
            f"There is no encoded negative prompt {source.path}; make it with `{ENCODE_PROMPTS}`."
        )
    about = pipelines.claimed(Path(source.path).parent)
    wanted = settings.get("negative_prompt", "")
    # A config without one notes nothing of it, and has the empty one encoded; a folder without a note says nothing.
    if (encoded := about.get("negative_prompt", "" if about else wanted)) != wanted:
        raise UserError(
            f"config.negative_prompt is {wanted!r}, but {source.path} has {encoded!r} encoded; set it so, or encode the prompts "
            "anew in another folder."
        )
    return np.asarray(checkpoint.load_params(source.path, like)["context"])


def with_context(settings, folder: str, made_by: str):
    """f(record) → record with its "context" as float32 [text_len, text_dim], 0 behind the prompt's end.

    A record brings it, up to its own length, or a caption in the small world's words. f raises UserError for one of other sizes
    or without either; `folder` and the command `made_by` are for its sentence.
    """
    sizes, encoder = config.build(DiTConfig, settings, "dit"), words(settings)

    def read(record):
        if "context" in record:
            context = np.asarray(record["context"], np.float32)
        elif encoder and "caption" in record:
            context = encoder.encode([record["caption"]])[0]
        else:
            lacks = "encoded prompt (context)" + (" and no caption" if encoder else "")
            raise UserError(f"A record in {folder} has no {lacks}; make the records anew with `{made_by}`.")
        if context.ndim != 2 or len(context) > sizes.text_len or context.shape[1] != sizes.text_dim:
            raise UserError(
                f"A record in {folder} has a context of {list(context.shape)}, but config.dit wants at most "
                f"[{sizes.text_len}, {sizes.text_dim}]; make the records anew with `{made_by}`."
            )
        rest = sizes.text_len - len(context)
        return record | {"context": np.pad(context, ((0, rest), (0, 0)))}

    return read


def _numbers(batch):
    return {name: batch[name] for name in batch if name != "caption"}


def _vae(settings):
    sizes = config.build(VAEConfig, settings, "vae")
    return VAE(sizes), checkpoint.load_params(settings.vae_weights, parameters.abstract("vae", sizes))


def video_encoder(settings):
    """f(video uint8 [B, F', H, W, 3]) → latents [B, F, h, w, C], normalised; a block after another, so that long clips fit."""
    vae, params = _vae(settings)
    first, later = sampler.block_lengths(vae.config, config.build(RolloutConfig, settings, "rollout"))

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, video, state):
        frames = video.astype(jnp.float32) / 127.5 - 1
        return vae.apply({"params": params}, frames, state, method="encode_normalised")

    def encode(video):
        edges, state, blocks = [0, *range(first, video.shape[1], later), video.shape[1]], None, []
        for start, end in itertools.pairwise(edges):
            block, state = step(params, video[:, start:end], state)
            blocks.append(block)
        return jnp.concatenate(blocks, 1)

    return encode


def temporal_stride(settings) -> int:
    """Video frames of every latent frame but the first."""
    return config.build(VAEConfig, settings, "vae").temporal_stride


def codec(settings) -> Source:
    """The parameters in settings.vae_weights."""
    return Source(
        functools.partial(parameters.initial, "vae", config.build(VAEConfig, settings, "vae")),
        settings.vae_weights,
    )


def reencoder(settings):
    """f(VAE params, latents [B, n, h, w, C], i) → the last video frame of latent frame i encoded alone, [B, 1, h, w, C]."""
    vae = VAE(config.build(VAEConfig, settings, "vae"))
    stride = vae.config.temporal_stride

    def reencode(params, latents, frame):
        apply = functools.partial(vae.apply, {"params": params})
        video, _ = apply(latents, method="decode_normalised")
        image = jax.lax.dynamic_slice_in_dim(video, stride * frame, 1, axis=1)
        return apply(image, method="encode_normalised")[0]

    return reencode
