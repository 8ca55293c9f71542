"""Each program of a stream alone, as it runs in the steady state: nothing masked, the cache full, the state donated."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rfjax import (
    axes,
    collectives,
    compilation,
    parameters,
    placement,
    quantize,
    rollout,
    sampler,
    stream,
    umt5,
)
from rfjax.bench import formula, timing
from rfjax.preflight.flops import flops
from rfjax.prompts import PromptEncoder
from rfjax.text import Unread

PARTS = ("text", "text_kv", "window", "clean", "step", "decode")


def measure(
    model: sampler.Sampler,
    wanted: list[str],
    captions: list[str],
    method: str,
    reader: umt5.UMT5Config | None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, `timing.summary`, and "flops" where these are counted) of the wanted PARTS, one after another."""
    clips = len(captions)
    bound = model.bind(captions)
    network = bound.dit.config
    tokens = int(np.prod(model.frame_shape[1:3])) // int(np.prod(network.patch_size))
    counts = formula.block(network, model.rollout, method, tokens, clips)
    makers = {
        "text": functools.partial(text, model, captions, reader),
        "text_kv": functools.partial(text_kv, model, captions),
        "window": functools.partial(window, bound, clips, model.frame_shape, method),
        "clean": functools.partial(clean, bound, clips, model.frame_shape, method),
        "step": functools.partial(step, bound, clips, model.frame_shape, method),
        "decode": functools.partial(decode, model, clips),
    }
    for name in wanted:
        with axes.on(model.where.decoder if name == "decode" else model.where.network):
            figures = timing.summary(timing.timed(makers[name]()))
        if name in counts:
            figures["flops"] = counts[name]
        if name == "decode":
            figures["flops"] = decode_flops(model, clips)
        yield name, figures


def steady(
    bound: rollout.Model, clips: int, frame_shape: tuple[int, ...], method: str
) -> rollout.RolloutState:
    """A state far from both ends of a clip, full of random numbers."""
    state = stream.begin(bound, method, clips, frame_shape)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    fill = functools.partial(jax.tree.map, drawn, is_leaf=quantize.is_quantized)
    filled = jax.jit(fill, donate_argnums=0, out_shardings=places)(state)
    return filled.replace(index=jax.device_put(jnp.int32(4 * bound.config.span_blocks), places.index))


def drawn(leaf: Any) -> Any:
    """Normal numbers in place of an array of floats; of one in int8 its whole range, under scales such as normal numbers have.

    What counts blocks stays.
    """
    key = jax.random.key(0)
    if quantize.is_quantized(leaf):
        values = jax.random.randint(key, leaf.qvalue.shape, -127, 128, leaf.qvalue.dtype)
        scale = jax.random.uniform(key, leaf.scale.shape, leaf.scale.dtype, 0.01, 0.03)
        return dataclasses.replace(leaf, qvalue=values, scale=scale)
    floats = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size
    return jax.random.normal(key, leaf.shape, leaf.dtype) if floats else leaf


def text(
    model: sampler.Sampler, captions: list[str], reader: umt5.UMT5Config | None
) -> Callable[[], np.ndarray | list[np.ndarray] | jax.Array]:
    """The prompts' encoder; UMT5 runs on the host, where the sampler runs it, and prompts that are kept do not count."""
    if not isinstance(model.encoder, (PromptEncoder, Unread)):
        return functools.partial(model.encoder.encode, captions)
    host = compilation.host()
    if isinstance(model.encoder, PromptEncoder):
        return functools.partial(model.encoder.reader(host), captions)
    with jax.default_device(host):
        params = parameters.stand_in(parameters.as_filed("umt5", reader))
        ids = jnp.arange(model.encoder.text_len)[None] % reader.vocab_size
        mask = jnp.ones(ids.shape, bool)
    run = jax.jit(functools.partial(umt5.prompt_features, umt5.UMT5(reader)))

    def read():
        with jax.default_device(host):
            return [run(params, ids, mask) for _ in captions]

    return read


def text_kv(model: sampler.Sampler, captions: list[str]) -> Callable[[], Any]:
    """The transformer's keys and values of encoded prompts: once a prompt."""
    context = jnp.asarray(model.encoder.encode(captions))
    return functools.partial(sampler.text_kv, model.dit, model.params["dit"], context)


def window(bound: rollout.Model, clips: int, frame_shape: tuple[int, ...], method: str) -> Callable[[], Any]:
    """The network on one rolling window, or on one step of a Self-Forcing block."""
    state = steady(bound, clips, frame_shape, method)
    if method == "rolling":
        run = jax.jit(functools.partial(rollout.window_call, steady=True))
        return lambda: run(bound, state.cache, state.window, state.index, np.int32(rollout.ENDLESS))
    run = jax.jit(functools.partial(rollout.block_call, steady=True))
    noise = jax.random.normal(jax.random.key(1), (clips, *frame_shape))
    return lambda: run(bound, state.cache, noise, state.index, np.int32(0))


def clean(bound: rollout.Model, clips: int, frame_shape: tuple[int, ...], method: str) -> Callable[[], Any]:
    """The clean call on a finished block, its keys and values written to the cache."""
    state = steady(bound, clips, frame_shape, method)
    run = jax.jit(functools.partial(rollout.clean_call, steady=True), donate_argnums=1)
    finished = jax.random.normal(jax.random.key(1), (clips, *frame_shape))
    return chained(lambda cache: (run(bound, cache, state.index, finished),) * 2, state.cache)


def step(bound: rollout.Model, clips: int, frame_shape: tuple[int, ...], method: str) -> Callable[[], Any]:
    """A block's whole step, as the stream runs it: all windows, new noise, the clean call."""
    keys, endless, state = step_inputs(bound, clips, frame_shape, method)
    return chained(lambda state: stream.stream_step(bound, method, keys, endless, state), state)


def step_inputs(bound: rollout.Model, clips: int, frame_shape: tuple[int, ...], method: str) -> tuple:
    """(keys, number of blocks, state) of a step far from both ends of a clip."""
    keys = jax.random.split(jax.random.PRNGKey(0), clips)
    return keys, np.int32(rollout.ENDLESS), steady(bound, clips, frame_shape, method)


def sent(model: sampler.Sampler, captions: list[str], method: str) -> dict[str, float]:
    """{kind of collective: bytes that each device sends for a block}, read from the compiled step; {} on one device."""
    mesh = model.where.network
    if mesh is None or mesh.size == 1:
        return {}
    bound = model.bind(captions)
    with axes.on(mesh):
        keys, blocks, state = step_inputs(bound, len(captions), model.frame_shape, method)
        return collectives.collectives(stream.stream_step.lower(bound, method, keys, blocks, state).compile())


def decode(model: sampler.Sampler, clips: int) -> Callable[[], Any]:
    """A later block's frames, left on the device."""
    # Random, since a GPU that multiplies zeros takes less power, and so less time.
    block = jax.random.normal(jax.random.key(1), (clips, *model.frame_shape))
    block, run = placement.split(block, model.where.decoder), _decoding(model)
    _, past = run(block, None)
    return chained(lambda past: run(block, past)[::-1], past)


def decode_flops(model: sampler.Sampler, clips: int) -> float:
    """Of a later block, counted in the traced program."""
    block, run = jnp.zeros((clips, *model.frame_shape)), _decoding(model)
    _, past = jax.eval_shape(run, block, None)
    return float(flops(jax.make_jaxpr(run)(block, past)))


def _decoding(model: sampler.Sampler):
    return functools.partial(sampler.decode_block, model.decoder, model.decoder_params)


def chained(run: Callable, carry: Any) -> Callable[[], Any]:
    """f() → out, where run(carry) → (the next carry, out); what is donated is replaced by what comes back."""

    def call():
        nonlocal carry
        carry, out = run(carry)
        return out

    return call
