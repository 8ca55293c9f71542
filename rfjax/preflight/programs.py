"""The programs that a config runs, with their arguments as shapes in their places on a mesh: nothing is read or allocated."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rfjax import axes, dit, parameters, rollout, sampler, sharding
from rfjax.config import build
from rfjax.errors import UserError
from rfjax.placement import Placement
from rfjax.stages import STAGES, clips, distill, latent, sources
from rfjax.stream import stream_step
from rfjax.tiny_vae import TinyDecoder
from rfjax.vae import VAE, VAEConfig


class Program(NamedTuple):
    """A compiled function and its arguments; static ones are what they are, arrays are shapes with shardings."""

    function: Any
    args: tuple
    mesh: Mesh
    kept: int | None = None  # how many arguments, the first ones, lie there whatever runs; None: all


def training(config: ConfigDict, mesh: Mesh) -> dict[str, Program]:
    """A stage's update, of distillation both; where it shows clips, "sample" and "decoder", one clip on the first device.

    UserError for a bad config, or a mesh that does not divide it.
    """
    if config.stage not in STAGES:
        raise UserError(f"config.stage must be one of {', '.join(STAGES)}, not {config.stage!r}.")
    sharding.check(config, mesh)
    stage, place = STAGES[config.stage], _placer(mesh)
    state = jax.eval_shape(functools.partial(stage.init, config), sources.shapes(stage.networks(config)))
    fixed = sources.shapes(stage.frozen(config))
    if config.stage == "distill":
        updates = distill.programs(config, state, fixed)
    else:
        updates = {config.stage: (stage.update(config), (state, fixed, *_batch(config)))}
    found = {name: Program(function, place(args), mesh) for name, (function, args) in updates.items()}
    if stage.generate is None or not clips.wanted(config):
        return found
    average = getattr(state, "generator", state).ema
    with jax.set_mesh(mesh):
        size = clips.group(config, clips.wanted(config))
    text = jax.ShapeDtypeStruct((size, config.dit.text_len, config.dit.text_dim), jnp.float32)
    batch = {"context": text, "key": jax.ShapeDtypeStruct((size, 2), jnp.uint32)}
    roll = clips.roller(config, stage.generate(config))
    found["sample"] = Program(roll, place((average, fixed, batch)), mesh, kept=2)
    here = sharding.make_mesh(sharding.MeshConfig(), mesh.devices.flat[:1].tolist())
    codec = build(VAEConfig, config, "vae")
    found["decoder"] = _decoding(VAE(codec), "vae", codec, (1, *latent.parts(config).frame_shape), here)
    return found


def _batch(config: ConfigDict):
    """(batch, step) of a stage's update as shapes; the batch is looked at, so its data must be there."""
    rows = STAGES[config.stage].data(config)[0]
    batch = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in rows.items()}
    return batch, jax.ShapeDtypeStruct((), jnp.int32)


def sampling(config: ConfigDict, where: Placement, count: int, method: str) -> dict[str, Program]:
    """The step of a stream of `count` clips, its steady part alone, and the decoding of one of its blocks."""
    video, network, codec, roll = sampler.sections(config)
    frame_shape = roll.block_frames, *sampler.latent_size(video, codec, network)
    net, params = dit.DiT(network), parameters.abstract("dit", network)
    context = jax.ShapeDtypeStruct((count, network.text_len, network.text_dim), jnp.float32)
    read = functools.partial(net.apply, method="text_kv")
    text_kv = jax.eval_shape(lambda params, context: read({"params": params}, context), params, context)
    model = rollout.Model(net, params, text_kv, roll)
    state = jax.eval_shape(lambda: rollout.METHODS[method].init(model, count, frame_shape))
    keys, blocks = jax.ShapeDtypeStruct((count, 2), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    tiny = sampler.tiny_decoder(config)
    decoder = (TinyDecoder(tiny), "tiny", tiny) if tiny else (VAE(codec), "vae", codec)
    model, state = _streaming(model, state, where.network)
    keys, blocks = _split((keys, blocks), where.network)
    steady = jax.jit(functools.partial(_steady, method=method), donate_argnames="state")
    decoding = _decoding(*decoder, (count, *frame_shape), where.decoder)
    return {
        "window": Program(stream_step, (model, method, keys, blocks, state), where.network),
        "steady": Program(steady, (model, keys, blocks, state), where.network),
        "decoder": decoding._replace(kept=None),  # a stream's past stays
    }


def layered(config: ConfigDict, where: Placement, count: int, layers: int) -> Program:
    """The steady step of a rolling stream, of a network with so many layers, one after another: no loop hides any of them."""
    config = config.copy_and_resolve_references()
    config.dit.num_layers, config.dit.unroll = layers, True
    return sampling(config, where, count, "rolling")["steady"]


def _streaming(model: rollout.Model, state: rollout.RolloutState, mesh: Mesh):
    """Both as shapes where a stream has them: parameters whole, clips over data, heads of keys and values over context."""
    with jax.set_mesh(mesh):
        text_kv = _split(model.text_kv, mesh, None, "batch", None, "heads")
        kv = _split(state.cache.kv, mesh, None, "batch", None, None, "heads")
        window = _split(state.window, mesh, "batch")
        params, state = _split((model.params, state), mesh)
    return model.replace(params=params, text_kv=text_kv), state.replace(
        window=window, cache=state.cache.replace(kv=kv)
    )


def _split(tree, mesh: Mesh, *names: str | None):
    """The shapes of a tree in their places: dimension i split by names[i], the rest whole."""

    def put(leaf):
        spec = axes.spec(leaf.shape, *names) if names else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def _steady(model, keys, num_blocks, state, method):
    """`stream_step` where nothing is masked."""
    noise = rollout.position_noise(keys, state.window.shape[2:])
    return rollout.METHODS[method].step(model, noise, num_blocks, state, steady=True)


def _decoding(decoder, name: str, sizes, shape: tuple[int, ...], mesh: Mesh) -> Program:
    """The decoding of a block of latents [B, f, h, w, C] that is not the first; its past lies there while it runs."""
    weights, block = parameters.abstract(name, sizes), jax.ShapeDtypeStruct(shape, jnp.float32)
    _, past = jax.eval_shape(functools.partial(sampler.decode_block, decoder), weights, block, None)
    with jax.set_mesh(mesh):
        weights, (block, past) = _split(weights, mesh), _split((block, past), mesh, "batch")
    return Program(sampler.decode_block, (decoder, weights, block, past), mesh, kept=2)


def _placer(mesh: Mesh):
    """f(args) → args in their places: batches, which are flat dicts, by rows, and all else by the rules of parameters.

    A shape that two programs share stays one object, so that what lies on the device is counted once.
    """
    rows, placed = NamedSharding(mesh, PartitionSpec(axes.BATCH)), {}

    def put(leaf, where):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        if id(leaf) not in placed:  # the shape is kept too, so that its id stays its own
            placed[id(leaf)] = leaf, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return placed[id(leaf)][1]

    def one(arg):
        if isinstance(arg, dict) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in arg.values()):
            return {name: put(leaf, rows) for name, leaf in arg.items()}
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arg)):
            return arg
        return jax.tree.map(put, arg, sharding.place(arg, mesh))

    return lambda args: tuple(map(one, args))


def resident(programs: dict[str, Program]) -> dict[int, int]:
    """Bytes on each device of every array that lies there whichever program runs, by the identity of its shape."""
    return {
        key: size
        for program in programs.values()
        for key, size in shares(program.args[: program.kept]).items()
    }


def shares(args: tuple) -> dict[int, int]:
    """Bytes on each device of every array among the arguments, by the identity of its shape."""
    leaves = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return {
        id(leaf): math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    }
