"""What the stages on latents share: the small world's networks, batches, and how their clips are judged."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rfjax import checkpoint, config, detect, dit, metrics, score, shapes, text
from rfjax import data as pipelines
from rfjax import state as train
from rfjax.dit import DiT, DiTConfig
from rfjax.errors import UserError
from rfjax.rollout import RolloutConfig
from rfjax.vae import VAE, VAEConfig


class Parts(NamedTuple):
    """The pieces that a config describes."""

    dit: DiT
    rollout: RolloutConfig
    encoder: text.WordEncoder
    frame_shape: tuple[int, int, int, int]  # (f, h, w, C) of a latent block


def parts(settings) -> Parts:
    """Builds them; UserError for a bad section."""
    sizes, codec = config.build(DiTConfig, settings, "dit"), config.build(VAEConfig, settings, "vae")
    rollout = config.build(RolloutConfig, settings, "rollout")
    side = settings.world.size // codec.spatial_stride
    encoder = config.build(text.WordEncoder, settings, "text")
    return Parts(DiT(sizes), rollout, encoder, (rollout.block_frames, side, side, sizes.in_dim))


def start_params(settings, key):
    """Parameters from settings.init_from, a .safetensors file, or random where it is empty."""
    sizes = config.build(DiTConfig, settings, "dit")
    if not settings.init_from:
        return dit.init(sizes, key)
    return load(settings.init_from, sizes)


def load(path: str, sizes: DiTConfig):
    """Parameters of a DiT of these sizes from a .safetensors file."""
    shapes_of = jax.eval_shape(functools.partial(dit.init, sizes), jax.random.key(0))
    return checkpoint.load_params(path, shapes_of)


def optimizer(settings, section: str = "optimizer"):
    """(optax transformation, its options) of a section."""
    options = config.build(train.OptimizerConfig, settings, section)
    return train.make_optimizer(options, settings.steps), options


def records(settings):
    """Batches of the records in settings.data with captions encoded: {"context" [B, text_len, text_dim], …}."""
    encoder = config.build(text.WordEncoder, settings, "text")
    batches = pipelines.records(settings.data, settings.batch_size, settings.made_by, settings.seed)
    return batches.map(functools.partial(_encode_captions, encoder))


def captions(settings, batch_size: int):
    """Endless batches {"context" [B, text_len, text_dim]} of training captions."""
    encoder, world = (
        config.build(text.WordEncoder, settings, "text"),
        config.build(shapes.World, settings, "world"),
    )
    return pipelines.captions(batch_size, settings.seed, world).map(
        functools.partial(_encode_captions, encoder)
    )


def _encode_captions(encoder, batch):
    context = encoder.encode(list(batch["caption"]))
    return {"context": context} | {name: batch[name] for name in batch if name != "caption"}


def _vae(settings):
    vae = VAE(config.build(VAEConfig, settings, "vae"))
    video = jnp.zeros((1, 1, settings.world.size, settings.world.size, 3))
    like = jax.eval_shape(lambda: vae.init(jax.random.key(0), video)["params"])
    return vae, checkpoint.load_params(settings.vae_weights, like)


def decoder(settings):
    """f(latents [B, F, h, w, C] normalised) → video [B, F', H, W, 3], by the VAE in settings.vae_weights."""
    vae, params = _vae(settings)

    @jax.jit
    def decode(latents):
        raw = vae.apply({"params": params}, latents, method="denormalise")
        return vae.apply({"params": params}, raw, method="decode")

    return decode


def video_encoder(settings):
    """f(video uint8 [B, F', H, W, 3]) → latents [B, F, h, w, C], normalised."""
    vae, params = _vae(settings)

    @jax.jit
    def encode(video):
        frames = jnp.asarray(video).astype(jnp.float32) / 127.5 - 1
        mean, _ = vae.apply({"params": params}, frames, method="encode")
        return vae.apply({"params": params}, mean, method="normalise")

    return encode


def temporal_stride(settings) -> int:
    """Video frames of every latent frame but the first."""
    return config.build(VAEConfig, settings, "vae").temporal_stride


def reencoder(settings):
    """f(latents [B, n, h, w, C], i) → the last video frame of latent frame i encoded alone, [B, 1, h, w, C]."""
    vae, params = _vae(settings)
    stride = vae.config.temporal_stride
    apply = functools.partial(vae.apply, {"params": params})

    def reencode(latents, frame):
        video = apply(apply(latents, method="denormalise"), method="decode")
        image = jax.lax.dynamic_slice_in_dim(video, stride * frame, 1, axis=1)
        return apply(apply(image, method="encode")[0], method="normalise")

    return reencode


def held_out(settings) -> list[str]:
    """The captions on which a stage shows and judges its clips."""
    world = config.build(shapes.World, settings, "world")
    return shapes.prompts(settings.judged, settings.seed, world)


def export(settings):
    """f(state) → {"dit": averaged parameters}."""
    del settings
    return lambda state: {"dit": state.ema}


def shown(settings, generate):
    """A stage's `sample`: generate(state, context, key) → latents, decoded, for a few held-out captions."""
    encoder, prompts = config.build(text.WordEncoder, settings, "text"), held_out(settings)[:4]
    decode = decoder(settings)

    def samples(state, key):
        latents = generate(state, jnp.asarray(encoder.encode(prompts)), key)
        return decode(latents), prompts

    return samples


def judged(settings, generate):
    """A stage's `evaluate`: share of held-out clips in which the detector finds each named attribute.

    UserError for a world of another size than the detector's.
    """
    if settings.world.size != detect.SIDE:
        raise UserError(
            f"config.world.size is {settings.world.size}, but clips are judged at {detect.SIDE}: set it so."
        )
    encoder, prompts = config.build(text.WordEncoder, settings, "text"), held_out(settings)
    decode = decoder(settings)

    def evaluate(state):
        latents = generate(state, jnp.asarray(encoder.encode(prompts)), jax.random.key(settings.seed))
        videos = metrics.to_uint8(decode(latents))
        found = [score.score(video, prompt)["first"] for video, prompt in zip(videos, prompts, strict=True)]
        right = {name: [row[name] for row in found if name in row] for name in score.ATTRIBUTES}
        return {f"right_{name}": float(np.mean(rows)) for name, rows in right.items() if rows}

    return evaluate
