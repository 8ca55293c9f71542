"""`python tests/meshes.py [--stages vae,…] [--meshes 1x1x1,…]`: a step of every stage on every mesh of 8 host devices.

Loss and gradients must be those of one device; parameters, optimiser state and average must fall as 1/fsdp; and a state must leave
a step in the places where it came in, its buffers donated. Needs XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import argparse
import functools
import math
import tempfile
from pathlib import Path

import conftest  # noqa: F401  strict JAX
import jax
import numpy as np

from rfjax import checkpoint, config, dit, sharding
from rfjax.config import build
from rfjax.stages import STAGES, sources
from rfjax.vae import VAE, VAEConfig

jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compiling
CONFIGS = Path(__file__).parents[1] / "configs"
MESHES = ("1x1x1", "8x1x1", "1x8x1", "1x1x8", "2x2x2")
# The greatest difference over a leaf's greatest gradient. A single gradient may be a sum that cancels almost to nothing, and
# then its own size says nothing about how exactly it can be summed in another order.
TOLERANCE = 1e-5
BATCH, FRAMES, SIDE, CHANNELS = 8, 6, 8, 8
SIZES = {
    "world": {"size": 16, "fps": 16, "objects": 1},
    "vae": {
        "dim": 8,
        "z_dim": CHANNELS,
        "dim_mult": (1, 2),
        "num_res_blocks": 1,
        "temporal_downsample": (True,),
    },
    "dit": {"dim": 48, "ffn_dim": 64, "num_heads": 8, "num_layers": 2, "in_dim": CHANNELS, "freq_dim": 8}
    | {"text_len": 16, "text_dim": 48},
    "rollout": {"steps": (1000, 500), "block_frames": 2, "ring_blocks": 3, "span_blocks": 3, "shift": 5.0},
    # Adam's first moment is then the gradient itself, and no step depends on the sign of a rounding error
    "optimizer": {"learning_rate": 0.0, "b1": 0.0, "clip": 1e9},
}


def settings_of(stage, folder):
    """The stage's config at debug sizes that every mesh divides."""
    settings = config.load(CONFIGS / f"shapes_{stage}.py")
    for section, sizes in SIZES.items():
        settings[section] = type(settings)(sizes)
    vae, network = (f"{folder}/{name}.safetensors" for name in ("vae", "dit"))
    settings.update({"batch_size": BATCH, "frames": FRAMES, "init_from": network})
    if stage == "vae":
        settings.update({"frames": 5, "init_from": vae})
    if stage == "distill":
        settings.update({"vae_weights": vae, "teacher": network, "critic_init": network})
        settings.update({"blocks": (3, 4), "critic_steps": 1, "critic_warmup": 0})
        settings.critic_optimizer = settings.optimizer
    return settings


def write_params(folder):
    """Random weights everywhere, as files."""
    settings, rng = settings_of("teacher", folder), np.random.default_rng(0)
    vae, video = VAE(build(VAEConfig, settings, "vae")), np.zeros((1, 1, 16, 16, 3), np.float32)
    shapes = {
        "vae": jax.eval_shape(lambda: vae.init(jax.random.key(0), video)["params"]),
        "dit": jax.eval_shape(
            functools.partial(dit.init, build(dit.DiTConfig, settings, "dit")), jax.random.key(0)
        ),
    }
    for name, tree in shapes.items():
        params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), tree)
        if name == "vae":
            params["latent_std"] = np.ones(CHANNELS, np.float32)
        checkpoint.save_params(Path(folder) / f"{name}.safetensors", params)


def batch_of(stage):
    """Random numbers in the shapes of the stage's batches."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    clip = (FRAMES, SIDE, SIDE, CHANNELS)
    return {
        "vae": lambda: {"video": rng.integers(0, 256, (BATCH, 5, 16, 16, 3), np.uint8)},
        "teacher": lambda: {"latents": draw(BATCH, *clip), "context": draw(BATCH, 16, 48)},
        "ode": lambda: {"trajectory": draw(BATCH, 3, *clip), "context": draw(BATCH, 16, 48)},
        "distill": lambda: {"context": draw(2 * BATCH, 16, 48)},
    }[stage]()


def one_step(settings, mesh):
    """(metrics, gradients by path) of one step from the files' weights, and what must hold of the state's places."""
    stage = STAGES[settings.stage]
    init, key = functools.partial(stage.init, settings), jax.random.key(0)
    places = sharding.place(jax.eval_shape(init, sources.shapes(stage.networks(settings))), mesh)
    with jax.set_mesh(mesh):
        params, fixed = (sources.load(which(settings), key, mesh) for which in (stage.networks, stage.frozen))
        before = jax.jit(init, out_shardings=places)(params)
        batch = sharding.put_batch(batch_of(settings.stage), mesh)
        after, metrics = stage.update(settings)(before, fixed, batch, 1)
    check_places(before, after, places, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(after)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves
    }
    return jax.device_get(metrics), {name: leaf for name, leaf in named.items() if "/mu/" in name}


def check_places(before, after, places, mesh):
    """Every matrix is split, and what came in is where it was, its buffer given to what came out."""
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.ndim), "a buffer was not donated"
    fsdp, paths = mesh.shape["fsdp"], jax.tree_util.tree_leaves_with_path(after)
    for (path, leaf), place in zip(paths, jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place, f"{path} came in as {place.spec} and left as {leaf.sharding.spec}"
        share = fsdp if leaf.ndim > 1 and path[-1].key in ("kernel", "modulation", "head_modulation") else 1
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // share}, path


def compare(stage, mesh, found, wanted):
    """Greatest relative difference of metrics and of gradients; AssertionError beyond TOLERANCE."""
    worst = {}
    for kind, ours, theirs in zip(("metrics", "gradients"), found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            apart, most = np.abs(ours[name] - value).max(), np.abs(value).max()
            assert apart <= TOLERANCE * most, f"{stage} on {mesh}: {name} is {apart:.1e} of {most:.1e} apart"
            worst[kind] = max(worst.get(kind, 0.0), float(apart / (most or 1)))
    return worst


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--meshes", default=",".join(MESHES[1:]))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_params(folder)
        for stage in given.stages.split(","):
            settings, wanted = settings_of(stage, folder), None
            for name in (MESHES[0], *given.meshes.split(",")):
                sizes = [int(size) for size in name.split("x")]
                mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
                sharding.check(settings, mesh)
                found = one_step(settings, mesh)
                wanted = wanted or found
                print(
                    stage,
                    name,
                    {kind: f"{apart:.1e}" for kind, apart in compare(stage, name, found, wanted).items()},
                )


if __name__ == "__main__":
    main()
