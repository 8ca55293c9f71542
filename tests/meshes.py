"""`python tests/meshes.py`: on 8 host devices, a step of every stage on every mesh, what is shown, and what programs send.

Loss and gradients must be those of one device, and so the clips; parameters, optimiser state and average must fall as
1/(fsdp · context); a state must leave a step in the places where it came in, its buffers donated. pytest's flags work
(`-k "ode or 2x2x2"`); the suite runs a part.
"""

import functools
import math
import os
import re
import sys
import types
from pathlib import Path
from unittest import mock

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rfjax import checkpoint, config, detect, distributed, score, sharding
from rfjax.collectives import collectives, of_text
from rfjax.stages import STAGES, clips, latent, sources, student, vae

CONFIGS = Path(__file__).parents[1] / "configs"
MESHES = ("8x1x1", "1x8x1", "1x1x8", "2x2x2")
# The greatest difference over a leaf's greatest gradient. A single gradient may be a sum that cancels almost to nothing, and
# then its own size says nothing about how exactly it can be summed in another order.
TOLERANCE = 1e-5
BATCH, FRAMES, SIDE, CHANNELS = 8, 6, 8, 8
SIZES = {
    "world": {"size": 16, "fps": 16, "objects": 1},
    "vae": {"dim": 8, "z_dim": CHANNELS, "dim_mult": (1, 2), "num_res_blocks": 1}
    | {"temporal_downsample": (True,)},
    "dit": {"dim": 48, "ffn_dim": 64, "num_heads": 8, "num_layers": 2, "in_dim": CHANNELS, "freq_dim": 8}
    | {"text_len": 16, "text_dim": 48},
    "rollout": {"steps": (1000, 500), "block_frames": 2, "ring_blocks": 3, "span_blocks": 3, "shift": 5.0},
    # Adam's first moment is then the gradient itself, and no step depends on the sign of a rounding error
    "optimizer": {"learning_rate": 0.0, "b1": 0.0, "clip": 1e9},
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time is compiling, and numbers are no better for it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def settings_of(stage, folder, **changes):
    """The stage's config at debug sizes that every mesh divides."""
    file = "ode" if stage == "teacher_forcing" else stage
    settings = config.load(CONFIGS / f"shapes_{file}.py")
    settings.stage = stage
    for section, sizes in SIZES.items():
        settings[section] = type(settings)(sizes)
    vae, network = (f"{folder}/{name}.safetensors" for name in ("vae", "dit"))
    settings.update({"batch_size": BATCH, "frames": FRAMES, "init_from": network, "vae_weights": vae})
    if stage == "vae":
        settings.update({"frames": 5, "init_from": vae})
    if stage == "distill":
        settings.update({"teacher": network, "critic_init": network})
        settings.update({"blocks": (3, 4), "critic_steps": 1, "critic_warmup": 0})
        settings.critic_optimizer = settings.optimizer
    settings.update(changes)
    return settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return weights(tmp_path_factory.mktemp("weights"))


def weights(folder):
    """Random weights of both networks, as files in the folder."""
    rng = np.random.default_rng(0)
    settings = settings_of("teacher", folder)
    networks = student.networks(settings) | {"vae": latent.codec(settings)}
    for name, shapes in sources.shapes(networks).items():
        params = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), shapes)
        if name == "vae":
            params["latent_std"] = np.ones(CHANNELS, np.float32)
        checkpoint.save_params(folder / f"{name}.safetensors", params)
    return folder


def batch_of(stage):
    """Random numbers in the shapes of the stage's batches."""
    rng = np.random.default_rng(1)
    clip = (FRAMES, SIDE, SIDE, CHANNELS)
    shapes = {
        "vae": {},
        "teacher": {"latents": (BATCH, *clip), "context": (BATCH, 16, 48)},
        "teacher_forcing": {"latents": (BATCH, *clip), "context": (BATCH, 16, 48)},
        "ode": {"trajectory": (BATCH, 3, *clip), "context": (BATCH, 16, 48)},
        "distill": {"context": (2 * BATCH, 16, 48)},
    }[stage]
    batch = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return batch or {"video": rng.integers(0, 256, (BATCH, 5, 16, 16, 3), np.uint8)}


def step_on(name, stage, folder, **changes):
    """{what: metric or gradient} of one step from the files' weights on mesh `name`; checks the state's places."""
    sizes, settings, stage = (
        [int(size) for size in name.split("x")],
        settings_of(stage, folder, **changes),
        STAGES[stage],
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    sharding.check(settings, mesh)
    init, key = functools.partial(stage.init, settings), jax.random.key(0)
    places = sharding.place(jax.eval_shape(init, sources.shapes(stage.networks(settings))), mesh)
    with jax.set_mesh(mesh):
        params, fixed = (sources.load(which(settings), key, mesh) for which in (stage.networks, stage.frozen))
        before = jax.jit(init, out_shardings=places)(jax.tree_util.tree_map_with_path(learnt, params))
        batch = sharding.put_batch(batch_of(settings.stage), mesh)
        after, metrics = stage.update(settings)(before, fixed, batch, 1)
    check_places(before, after, places, mesh)
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(after)
    }
    return jax.device_get(metrics) | {name: leaf for name, leaf in leaves.items() if "/mu/" in name}


def learnt(path, leaf):
    """Adapters as if they had been trained a little: as they begin, half of their gradients are zeros."""
    return leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape) if path[-1].key == "up" else leaf


def check_places(before, after, places, mesh):
    """Every matrix is split, and what came in is where it was, its buffer given to what came out."""
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.ndim), "a buffer was not donated"
    parts = mesh.shape["fsdp"] * mesh.shape["context"]
    paths = jax.tree_util.tree_leaves_with_path(after)
    for (path, leaf), place in zip(paths, jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place, f"{path} came in as {place.spec} and left as {leaf.sharding.spec}"
        large = path[-1].key in ("kernel", "modulation", "head_modulation") if leaf.ndim > 1 else False
        wanted = leaf.nbytes // (parts if large else 1)
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {wanted}, path


@pytest.fixture(scope="module")
def one_device(folder):
    return functools.cache(lambda stage: step_on("1x1x1", stage, folder))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("stage", STAGES)
def test_step_gives_what_one_device_gives(stage, mesh, folder, one_device):
    found, wanted = step_on(mesh, stage, folder), one_device(stage)
    assert found.keys() == wanted.keys()
    apart = {
        name: np.abs(found[name] - value).max() / (np.abs(value).max() or 1) for name, value in wanted.items()
    }
    worst = max(apart, key=apart.get)
    print(f"{stage} on {mesh}: {apart[worst]:.1e} ({worst})")
    assert apart[worst] <= TOLERANCE, worst


def test_step_of_adapters_in_micro_batches_gives_what_one_device_gives(folder):
    changes = {"accumulate": 2, "lora": {"rank": 2}}
    found, wanted = (step_on(mesh, "ode", folder, **changes) for mesh in ("2x2x2", "1x1x1"))
    assert found.keys() == wanted.keys() and any("up" in name for name in wanted)
    for name, value in wanted.items():
        assert np.abs(value).max() > 0, name
        assert np.abs(found[name] - value).max() <= TOLERANCE * np.abs(value).max(), name


def test_nan_in_the_rows_of_one_device_skips_the_update_on_all():
    import line  # here, since it adds a stage

    settings = line.get_config()
    settings.update({"batch_size": 16, "accumulate": 2})
    mesh = sharding.make_mesh(sharding.MeshConfig(4, 2, 1))
    update, init, rows = line.update(settings), functools.partial(line.init, settings), line.data(settings)[0]
    with jax.set_mesh(mesh):
        params = sources.load(line.networks(settings), jax.random.key(0), mesh)
        places = sharding.place(jax.eval_shape(init, params), mesh)
        before = jax.jit(init, out_shardings=places)(params)
        trained, _ = update(before, {}, sharding.put_batch(rows, mesh), 0)
        rows["x"][5, 0] = np.nan  # of the third device's two rows
        skipped, _ = update(before, {}, sharding.put_batch(rows, mesh), 0)
    assert not np.array_equal(trained.params["layer"]["kernel"], before.params["layer"]["kernel"])
    for shard in skipped.skipped.addressable_shards:
        np.testing.assert_array_equal(shard.data, [1, 1])
    for new, old in zip(
        *map(jax.tree.leaves, (skipped.replace(skipped=before.skipped), before)), strict=True
    ):
        for after, first in zip(new.addressable_shards, old.addressable_shards, strict=True):
            np.testing.assert_array_equal(after.data, first.data)


def test_layer_is_cut_out_of_a_split_stack_with_the_memory_of_a_layer():
    mesh, shape = sharding.make_mesh(sharding.MeshConfig(1, 8, 1)), (6, 64, 32)
    where = NamedSharding(mesh, sharding.spec("blocks/kernel", shape, mesh))
    stack = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    memory = distributed._cut.lower(stack, jax.ShapeDtypeStruct((), jnp.int32)).compile().memory_analysis()
    assert 0 < memory.output_size_in_bytes + memory.temp_size_in_bytes <= 64 * 32 * 4


# What is shown


def shown_on(mesh, name, folder):
    """Clips uint8 [N, F, 16, 16, 3] that a stage shows with the files' weights, N = 4 of the VAE and else 3; what it measures."""
    settings, stage, key = settings_of(name, folder), STAGES[name], jax.random.key(0)
    settings.judged = 3  # which no mesh divides
    if name == "vae":
        made = mock.patch.object(vae, "_reconstruct", once(vae._reconstruct(settings)))
    else:
        settings.frames = 12  # enough for windows of the steady kind
        made = mock.patch.object(clips, "roller", once(clips.roller(settings, stage.generate(settings))))
    bright = mock.patch.object(score, "score", lambda video, _: {"first": {"shape": video.mean() > 127}})
    with made, bright, mock.patch.object(detect, "SIDE", 16), jax.set_mesh(mesh):
        params, fixed = (sources.load(which(settings), key, mesh) for which in (stage.networks, stage.frozen))
        (average,) = params.values()
        state = types.SimpleNamespace(ema=average)
        videos, captions = stage.sample(settings)(state, fixed, key)
        (value,) = stage.evaluate(settings)(state, fixed).values()
    assert len(videos) == len(captions) and videos.std((2, 3, 4)).min() > 1
    return videos, value


def once(made):
    """What makes a program, as one that was made already: samples and evaluation then share it."""
    return lambda *_: made


def assert_same_shown(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0].astype(int), atol=1)  # rounded to another level
    assert found[1] == pytest.approx(wanted[1], abs=1e-3)


@pytest.mark.parametrize("mesh", ["1x8x1", "2x2x2"])
@pytest.mark.parametrize("stage", ["ode", "teacher", "vae"])
def test_clips_are_shown_as_on_one_device_and_no_device_holds_two(stage, mesh, folder, monkeypatch):
    texts = spied(monkeypatch)
    sizes = [int(size) for size in mesh.split("x")]
    alone = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    found = shown_on(sharding.make_mesh(sharding.MeshConfig(*sizes)), stage, folder)
    assert_same_shown(found, shown_on(alone, stage, folder))
    if stage == "ode":  # [layers, clips, slots, tokens of a block, heads, head size]
        held = [set(re.findall(r"f32\[2,(\d+),4,32,(\d+),6\]", text)) for text in texts]
        assert held == [{("1", str(8 // sizes[2]))}, {("3", "8")}]


def spied(monkeypatch):
    """The texts of the programs that roll clips out, in a list that fills when they are compiled."""
    texts, make = [], clips.roller

    def roller(*args):
        roll, compiled = make(*args), []

        def run(*args):
            if not compiled:
                compiled.append(roll.lower(*args).compile())
                texts.append(compiled[0].as_text())
            return compiled[0](*args)

        return run

    monkeypatch.setattr(clips, "roller", roller)
    return texts


# What programs send

ROWS, COLUMNS, BYTES = P(("a", "b")), P(None, ("a", "b")), 64 * 16 * 4
RING = [(device, (device + 1) % 8) for device in range(8)]


def turn(x):
    """[64, 16] split by rows → by columns → by rows: two all-to-alls of 7/8 of what a device has."""
    constrain = jax.lax.with_sharding_constraint
    return constrain(constrain(jnp.tanh(x), COLUMNS), ROWS)


def mapped(f):
    return jax.shard_map(f, in_specs=ROWS, out_specs=ROWS)


def gathered(x):
    """A device's [8, 16] → the sum of all devices', from the whole [64, 16] on each, and something of its own."""
    return x + jax.lax.all_gather(x, ("a", "b")).sum(0)


PROGRAMS = {
    "nothing": (jnp.tanh, ROWS, ROWS, {}),
    "gather": (jnp.tanh, ROWS, P(), {"all-gather": BYTES * 7 / 8}),
    "gather over an axis": (jnp.tanh, P("a", "b"), P("a"), {"all-gather": BYTES / 2 * 3 / 4}),
    "sum": (lambda x: x.sum(0), ROWS, P(), {"all-reduce": 2 * 16 * 4 * 7 / 8}),
    "turn over an axis": (jnp.tanh, P("b"), P(None, "b"), {"all-to-all": BYTES / 4 * 3 / 4}),
    "loop": (lambda x: jax.lax.fori_loop(0, 5, lambda _, x: turn(x), x), ROWS, ROWS)
    + ({"all-to-all": 5 * 2 * BYTES / 8 * 7 / 8},),
    "gather in a loop": (lambda x: jax.lax.fori_loop(0, 3, lambda _, x: mapped(gathered)(x), x),)
    + (ROWS, ROWS)
    + ({"all-gather": 3 * BYTES * 7 / 8},),
    "endless loop": (lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, turn, x), ROWS, ROWS)
    + ({"all-to-all": 2 * BYTES / 8 * 7 / 8, "all-reduce": 2 * 4 * 7 / 8},),
    "branch": (lambda x: jax.lax.cond(x.sum() > 0, turn, jnp.tanh, x), ROWS, ROWS)
    + ({"all-to-all": 2 * BYTES / 8 * 7 / 8, "all-reduce": 2 * 4 * 7 / 8},),
    "scattered sum": (
        lambda x: mapped(lambda x: jax.lax.psum_scatter(x, ("a", "b"), tiled=True))(x),
        ROWS,
        ROWS,
    )
    + ({"reduce-scatter": 7 * BYTES / 8 / 8},),
    "ring": (lambda x: mapped(lambda x: jax.lax.ppermute(x, ("a", "b"), RING))(x), ROWS, ROWS)
    + ({"collective-permute": BYTES / 8},),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_bytes_sent_are_those_of_the_closed_form(program):
    f, inputs, outputs, wanted = PROGRAMS[program]
    with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)):
        x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
        compiled = jax.jit(f, in_shardings=inputs, out_shardings=outputs).lower(x).compile()
    assert collectives(compiled) == wanted


FOR_TPU = """HloModule loops, num_partitions=4

%cond (state: (s32[], f32[256])) -> pred[] {
  %bound = s32[]{:T(128)} constant(BOUND)
  %state = (s32[]{:T(128)}, f32[256]{0}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%body (state: (s32[], f32[256])) -> (s32[], f32[256]) {
  %permuted = f32[256]{0} collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}

ENTRY %main (x: f32[256]) -> f32[256] {
  ROOT %loop = (s32[], f32[256]{0}) while(%start), condition=%cond, body=%body
}
"""


def test_bytes_of_a_loop_whose_trips_only_its_condition_tells():
    assert of_text(FOR_TPU.replace("BOUND", "6")) == {"collective-permute": 6 * 256 * 4}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-rP", *sys.argv[1:]]))
