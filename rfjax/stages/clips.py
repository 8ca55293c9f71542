"""How a stage shows and judges its clips: rolled out on the mesh that it trains on, decoded by each process for itself.

As many are rolled out at a time as a micro-batch of training has, filled up until data × fsdp divides them. So a device holds the
clips, and their KV cache, that it holds in training, and fewer where fewer are wanted. Decoding takes one clip at a time, on the
first device of each process, and no process waits for another there.
"""

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from rfjax import axes, config, detect, distributed, sampler, score, shapes, sharding
from rfjax.rollout import RolloutConfig
from rfjax.stages import latent, sources, student
from rfjax.vae import VAE, VAEConfig

SHOWN = 4  # clips among a stage's samples


def wanted(settings: ConfigDict) -> int:
    """The most clips that a stage of the transformer rolls out at a save; 0 without settings.vae_weights: nothing is shown."""
    if not settings.get("vae_weights"):
        return 0
    return max(SHOWN, settings.judged) if "world" in settings else SHOWN


def group(settings: ConfigDict, count: int) -> int:
    """How many of `count` clips go through a network at a time on the ambient mesh; data × fsdp divides it."""
    places = axes.places()
    return min(settings.batch_size // settings.get("accumulate", 1), -(-count // places) * places)


def in_groups(settings: ConfigDict, function, rows) -> np.ndarray:
    """function(batch [b, …]) → [b, …], over all rows {name: [N, …]}: [N, …] on the host of every process, which all must ask.

    The rows are alike in all processes.
    """
    count, found = len(next(iter(rows.values()))), []
    size = group(settings, count)
    for start in range(0, count, size):
        index = np.arange(start, start + size) % count  # the last group is filled up: one program serves all
        out = function(sharding.spread({name: array[index] for name, array in rows.items()}))
        found.append(distributed.whole(out[: count - start]))
    return np.concatenate(found)


def roller(settings: ConfigDict, generate):
    """The compiled f(averaged params, frozen params, {"context" [B, text_len, text_dim], "key" uint32 [B, 2]}) → latents.

    It is generate(params, frozen params, context, keys) → [B, F, h, w, C], with parameters in the dtype of the computation, as
    sampling has them.
    """
    whole = student.working(settings)

    @jax.jit
    def roll(average, fixed, batch):
        return generate(whole(average, fixed), fixed, batch["context"], batch["key"])

    return roll


def _rolled(settings, generate):
    """f(averaged params, frozen params, context [N, text_len, text_dim], key) → latents [N, F, h, w, C] on the host."""
    roll = roller(settings, generate)

    def rolled(average, fixed, context, key):
        keys = np.asarray(jax.random.key_data(jax.random.split(key, len(context))))
        rows = {"context": np.asarray(context), "key": keys}
        return in_groups(settings, functools.partial(roll, average, fixed), rows)

    return rolled


def decoder(settings: ConfigDict):
    """f(latents [N, F, h, w, C] on the host, normalised) → uint8 [N, F', H, W, 3], by the VAE in settings.vae_weights.

    A clip at a time and a block after another, on this process's first device. UserError where there is no such file.
    """
    here = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.local_devices()[:1])
    vae = VAE(config.build(VAEConfig, settings, "vae"))
    params = sources.load({"vae": latent.codec(settings)}, jax.random.key(0), here)["vae"]
    block = config.build(RolloutConfig, settings, "rollout").block_frames

    def clip(latents):
        state, frames = None, []
        for start in range(0, latents.shape[1], block):
            video, state = sampler.decode_block(vae, params, latents[:, start : start + block], state)
            frames.append(np.asarray(video))
        return np.concatenate(frames, 1)

    def decode(latents):
        with jax.set_mesh(here):  # not that of training, over which the VAE would be split
            return np.concatenate([clip(latents[row : row + 1]) for row in range(len(latents))])

    return decode


def held_out(settings: ConfigDict) -> list[str]:
    """The captions on which a stage shows and judges its clips."""
    world = config.build(shapes.World, settings, "world")
    return shapes.prompts(settings.judged, settings.seed, world)


def shown(settings: ConfigDict, generate):
    """A stage's `sample`: SHOWN clips by `generate` (see `roller`), decoded, and their captions.

    These are held-out ones of the small world; elsewhere those of records in `latent.prompt_folder`, and without
    settings.vae_weights nothing is shown.
    """
    if not wanted(settings):
        return lambda state, fixed, key: (np.zeros((0, 1, 1, 1, 3), np.uint8), [])
    if latent.words(settings):
        captions = held_out(settings)[:SHOWN]
        context = latent.words(settings).encode(captions)
    else:
        texts = latent.texts(
            settings, latent.prompt_folder(settings), 1
        )  # one by one: there may be fewer than SHOWN
        batches = [texts[index] for index in range(SHOWN)]
        captions = [str(batch["caption"][0]) for batch in batches]
        context = np.concatenate([batch["context"] for batch in batches])
    decode, rolled = decoder(settings), _rolled(settings, generate)
    return lambda state, fixed, key: (decode(rolled(state.ema, fixed, context, key)), captions)


def _shown(settings: ConfigDict) -> bool:
    """Whether clips are of the small world, and there is a VAE that decodes them."""
    return "world" in settings and bool(settings.get("vae_weights"))


def measured(settings: ConfigDict) -> list[str]:
    """The names that `judged` gives: of what the held-out captions say, and all say a background."""
    if not _shown(settings):
        return []
    said = [one for caption in held_out(settings) for one in shapes.parse(caption).objects]
    return [f"right_{name}" for name in score.ATTRIBUTES if any(getattr(one, name, True) for one in said)]


def judged(settings: ConfigDict, generate):
    """A stage's `evaluate`: share of held-out clips in which the detector finds each named attribute; {} where none can be shown.

    UserError for a world that the detector does not judge.
    """
    if not _shown(settings):
        return lambda state, fixed: {}
    detect.check(config.build(shapes.World, settings, "world"), latent.video(settings).fps)
    prompts = held_out(settings)
    context = latent.words(settings).encode(prompts)
    decode, rolled = decoder(settings), _rolled(settings, generate)

    def evaluate(state, fixed):
        videos = decode(rolled(state.ema, fixed, context, jax.random.key(settings.seed)))
        found = [score.score(video, prompt)["first"] for video, prompt in zip(videos, prompts, strict=True)]
        right = {name: [row[name] for row in found if name in row] for name in score.ATTRIBUTES}
        return {f"right_{name}": float(np.mean(rows)) for name, rows in right.items() if rows}

    return evaluate
