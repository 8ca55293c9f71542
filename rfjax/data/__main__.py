"""Makes data sets: `python -m rfjax.data latents|ode-pairs --config FILE [--shards N]`.

Both go shard by shard into config.data, skip shards that are there, and so go on after a stop.

    latents     clips of the small world through the VAE, for the teacher      {"caption", "latents" [F, h, w, C]}
    ode-pairs   the teacher's guided trajectories, for the ODE stage           {"caption", "trajectory" [S + 1, F, h, w, C]}
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rfjax import compilation, config, data, shapes, teacher
from rfjax.errors import exit_cleanly
from rfjax.stages import latent


def make_latents(settings):
    """f(shard) → records of settings.record_frames latent frames."""
    world = config.build(shapes.World, settings, "world")
    encode = latent.video_encoder(settings)
    stride = latent.temporal_stride(settings)
    clips = data.clips(1 + stride * (settings.record_frames - 1), settings.record_batch, settings.seed, world)

    def shard(index):
        per_shard = settings.shard_records // settings.record_batch
        for number in tqdm(range(per_shard), desc=f"shard {index}", unit=" batch", leave=False):
            batch = clips[index * per_shard + number]
            yield from _records(batch["caption"], "latents", encode(batch["video"]))

    return shard


def make_ode_pairs(settings):
    """f(shard) → trajectories from the teacher at the few-step list's levels and at the end."""
    parts = latent.parts(settings)
    params = latent.load(settings.teacher, parts.dit.config)
    places = teacher.few_step_indices(parts.rollout.steps, settings.solver_steps)
    places = np.append(places, settings.solver_steps)
    captions = data.captions(
        settings.record_batch, settings.seed, config.build(shapes.World, settings, "world")
    )

    @jax.jit
    def solve(context, key):
        noise = jax.random.normal(key, (context.shape[0], settings.record_frames, *parts.frame_shape[1:]))
        path = teacher.ode_trajectory(
            parts.dit,
            params,
            noise,
            context,
            jnp.zeros_like(context),
            settings.guidance,
            settings.solver_steps,
            parts.rollout.shift,
        )
        return jnp.moveaxis(path[places], 0, 1)

    def shard(index):
        per_shard = settings.shard_records // settings.record_batch
        for number in tqdm(range(per_shard), desc=f"shard {index}", unit=" batch", leave=False):
            place = index * per_shard + number
            texts = list(captions[place]["caption"])
            key = jax.random.fold_in(jax.random.key(settings.seed), place)
            yield from _records(texts, "trajectory", solve(jnp.asarray(parts.encoder.encode(texts)), key))

    return shard


def _records(captions, name, arrays):
    for caption, array in zip(captions, np.asarray(arrays, np.float16), strict=True):
        yield {"caption": str(caption), name: array}


COMMANDS = {"latents": make_latents, "ode-pairs": make_ode_pairs}


@exit_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rfjax.data", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--config", required=True, help="a stage's config, which names the folder")
    parser.add_argument("--shards", type=int, help="how many files (default config.shards)")
    args = parser.parse_args()
    compilation.keep_programs()
    settings = config.load(args.config)
    shards = args.shards or settings.shards
    data.write_shards(settings.data, COMMANDS[args.what](settings), shards)
    print(f"{shards} shards of {settings.shard_records} records are in {settings.data}/")


if __name__ == "__main__":
    main()
