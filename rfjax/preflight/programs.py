"""The programs that a config runs, with their arguments as shapes in their places on a mesh: nothing is read or allocated."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rfjax import axes, dit, rollout, sampler, sharding
from rfjax.stages import STAGES, distill, sources
from rfjax.tiny_vae import TinyDecoder
from rfjax.vae import VAE


class Program(NamedTuple):
    """A compiled function and its arguments; static ones are what they are, arrays are shapes with shardings."""

    function: Any
    args: tuple


def training(config: ConfigDict, mesh: Mesh) -> dict[str, Program]:
    """A stage's update, of distillation both updates. UserError for a bad config, or a mesh that does not divide it."""
    sharding.check(config, mesh)
    found = distill.programs(config) if config.stage == "distill" else {config.stage: _update(config)}
    place = _placer(mesh)
    return {name: Program(function, place(args)) for name, (function, args) in found.items()}


def _update(config: ConfigDict):
    """(the compiled update of a stage, its arguments as shapes); the batch is looked at, so its data must be there."""
    stage = STAGES[config.stage]
    state = jax.eval_shape(functools.partial(stage.init, config), sources.shapes(stage.networks(config)))
    batch = {
        name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in stage.data(config)[0].items()
    }
    args = state, sources.shapes(stage.frozen(config)), batch, jax.ShapeDtypeStruct((), jnp.int32)
    return stage.update(config), args


def sampling(config: ConfigDict, mesh: Mesh, clips: int, method: str) -> dict[str, Program]:
    """The step of a stream, and the decoding of one of its blocks, on one device."""
    video, network, codec, roll = sampler.sections(config)
    frame_shape = roll.block_frames, *sampler.latent_size(video, codec, network)
    net, params = dit.DiT(network), sampler.abstract("dit", network)
    context = jax.ShapeDtypeStruct((clips, network.text_len, network.text_dim), jnp.float32)
    read = functools.partial(net.apply, method="text_kv")
    text_kv = jax.eval_shape(lambda params, context: read({"params": params}, context), params, context)
    model = rollout.Model(net, params, text_kv, roll)
    state = jax.eval_shape(lambda: rollout.METHODS[method].init(model, clips, frame_shape))
    keys, count = jax.ShapeDtypeStruct((clips, 2), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    tiny = sampler.tiny_decoder(config)
    decoder, weights = (TinyDecoder(tiny), ("tiny", tiny)) if tiny else (VAE(codec), ("vae", codec))
    weights, block = sampler.abstract(*weights), jax.ShapeDtypeStruct((clips, *frame_shape), jnp.float32)
    _, past = jax.eval_shape(functools.partial(sampler.decode_block, decoder), weights, block, None)
    place = _placer(mesh)
    return {
        "window": Program(rollout.stream_step, place((model, method, keys, count, state))),
        "decoder": Program(sampler.decode_block, place((decoder, weights, block, past))),
    }


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
    """Bytes on each device of every array that some program takes, by the identity of its shape: all of them lie there."""
    leaves = {id(leaf): leaf for program in programs.values() for leaf in jax.tree.leaves(program.args)}
    return {key: share(leaf) for key, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)}


def share(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on each device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
