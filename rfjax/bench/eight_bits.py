"""What 8 bits do to the network's numbers, and to the time of a step.

    python -m rfjax.bench quantize [--weights DIR] [--golden tests/golden] [--layers]

Errors are relative, in the 2-norm. Of the public implementation's test network (--golden): its flow, and a rolling clip, in which
errors feed on each other. Of the config's own network: the flow of one window in the middle of a stream, which was made in full
width. Times are of the steady step, in turn with that in full width. --layers: one group of layers in 8 bits at a time.
"""

import argparse
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rfjax import config, flow, parity, quantize, rollout, sampler, tree
from rfjax.bench import flags, parts, timing
from rfjax.dit import KV
from rfjax.errors import Parser, UserError
from rfjax.golden import Golden

ROUNDS = 3  # turns of each side
GROUPS = {  # of kernels, by their paths
    "self_q, self_k": r"blocks/self_[qk]/",
    "self_v, self_o": r"blocks/self_[vo]/",
    "cross_q, cross_o": r"blocks/cross_[qo]/",
    "ffn_in": r"blocks/ffn_in/",
    "ffn_out": r"blocks/ffn_out/",
    "patch embedding": r"patch_embedding/",
    "time embedding": r"time_(in|out)/",
    "modulation": r"time_projection/",
    "text": r"text_",
}


# A GPU multiplies float32 in TF32 by itself, which would be seen beside what 8 bits do.
exactly = jax.default_matmul_precision("highest")


def relative(ours: Array, theirs: Array) -> float:
    """|ours - theirs| / |theirs|."""
    return float(np.linalg.norm(np.asarray(ours - theirs)) / np.linalg.norm(np.asarray(theirs)))


def quantized(params: dict[str, Any], mode: quantize.Mode) -> dict[str, Any]:
    return quantize.params(params, mode.linear_dtype) if mode.linear_dtype else params


# The public implementation's test network


@exactly
def golden_errors(golden: Golden, mode: quantize.Mode) -> tuple[float, float]:
    """Of the flow and of the rolling clip, against the public numbers."""
    arrays = golden.arrays("bidirectional")
    params = quantized(parity.dit_params(golden, "bidirectional_dit"), mode)
    inputs = arrays.latents("x"), arrays.take("timestep", "B"), arrays.context("context")
    of_flow = relative(parity.predict_flow(golden.dit, params, *inputs), arrays.latents("flow"))
    arrays, params = golden.arrays("rolling"), quantized(parity.dit_params(golden, "causal_dit"), mode)
    inputs = arrays.context("context"), arrays.noise("noise")
    clip = parity.clip(golden, "rolling", params, *inputs, int8_cache=mode.int8_cache)
    return of_flow, relative(clip, arrays.latents("latents"))


# A network in the middle of its stream


def midway(model: sampler.Sampler, captions: list[str]) -> rollout.RolloutState:
    """The state of a rolling stream whose ring has turned once, its newest block in the window."""
    blocks = 2 * model.rollout.span_blocks
    stream = model.latents(captions, 0, (blocks + 1) * model.rollout.block_frames, method="rolling")
    for _ in range(blocks):
        next(stream)
    noise = rollout.position_noise(sampler.clip_keys(0, len(captions)), model.frame_shape)
    return rollout.enter(stream.model, noise, stream.state)


@exactly
@jax.jit
def window_flow(bound: rollout.Model, state: rollout.RolloutState) -> Array:
    """The flow [B, S, f, H, W, C] of the state's window, which is in the steady state; its cache is kept as the model wants."""
    cache = state.cache
    if bound.config.int8_cache:
        kept = KV(*(quantize.quantized(x, quantize.INT8) for x in cache.kv))
        cache = cache.replace(kv=kept, config=bound.config.cache)
    blocks = np.int32(rollout.ENDLESS)
    x0 = rollout.window_call(bound, cache, state.window, state.index, blocks, state.given, steady=True)
    t = jnp.broadcast_to(jnp.asarray(bound.config.timesteps[::-1].copy()), x0.shape[:2])
    return flow.flow_from_x0(state.window, x0, t)


def changed(model: sampler.Sampler, params: dict[str, Any], int8_cache: bool = False) -> sampler.Sampler:
    """The same sampler with these parameters of its transformer."""
    kept = dataclasses.replace(model.rollout, int8_cache=int8_cache)
    return dataclasses.replace(model, params=model.params | {"dit": params}, rollout=kept)


def alone(params: dict[str, Any], group: str, dtype: str) -> dict[str, Any]:
    """Parameters whose kernels of one group [..., in, out] are in 8 bits."""
    return tree.unflatten(
        {
            path: quantize.quantized(x, dtype, -2) if re.match(f"{group}.*kernel$", path) else x
            for path, x in tree.flatten(params).items()
        }
    )


def step_times(
    full: rollout.Model, bound: rollout.Model, clips: int, frame_shape: tuple[int, ...]
) -> tuple[float, float]:
    """Seconds of a steady step in full width and in 8 bits: medians over ROUNDS turns of each."""
    calls = [parts.step(one, clips, frame_shape, "rolling") for one in (full, bound)]
    taken = [[timing.summary(timing.timed(call))["median_s"] for call in calls] for _ in range(ROUNDS)]
    return tuple(float(x) for x in np.median(np.array(taken), 0))


# The command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m rfjax.bench quantize", description=__doc__)
    add = parser.add_argument
    add(
        "--config",
        default=str(flags.CONFIG),
        help="Python file with get_config() (default configs/shapes.py)",
    )
    add("--weights", metavar="random|DIR|HUB_ID", help="as sample.py takes them (default: the config's)")
    add("--samples", type=int, default=4, metavar="B", help="clips at a time (default 4)")
    add("--golden", metavar="DIR", help="numbers of the public implementation, as in tests/golden")
    add("--layers", action="store_true", help="one group of layers at a time")
    args, args.rest = parser.parse_known_args(argv)
    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, not {args.samples}.")
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    settings = config.changed(config.load(args.config), args.rest)
    golden = Golden(args.golden) if args.golden else None
    quantize.check(quantize.MODES["kv8"])
    if settings.dit.get("linear_dtype", "") or settings.rollout.get("int8_cache", False):
        raise UserError(f"{args.config} is in 8 bits already; give one in full width.")
    with config.read_by("bench", settings):
        captions = [settings.prompt] * args.samples
    model = sampler.load(settings, args.weights)
    state = midway(model, captions)
    if args.layers:
        show_layers(model, captions, state)
    else:
        show_modes(model, captions, state, golden)


def show_modes(
    model: sampler.Sampler, captions: list[str], state: rollout.RolloutState, golden: Golden | None
) -> None:
    """Prints a line for each mode that this device has."""
    full, head = model.bind(captions), ("flow", "clip") if golden else ()
    exact = window_flow(full, state)
    print(f"{'errors of':10}" + "".join(f"{name:>10}" for name in head) + f"{'window':>10}{'step, ms':>12}")
    for name, mode in {"none": quantize.Mode("", False), **quantize.MODES}.items():
        try:
            quantize.check(mode)
        except UserError as error:
            print(f"{name:10}{error}")
            continue
        bound = changed(model, quantized(model.params["dit"], mode), mode.int8_cache).bind(captions)
        errors = [
            *(golden_errors(golden, mode) if golden else ()),
            relative(window_flow(bound, state), exact),
        ]
        was, now = step_times(full, bound, len(captions), model.frame_shape)
        cells = "".join(f"{error:>10.2g}" for error in errors)
        print(f"{name:10}{cells}{1e3 * now:>12.4g}  {was / now:.2f} × as fast as none", flush=True)


def show_layers(model: sampler.Sampler, captions: list[str], state: rollout.RolloutState) -> None:
    """Prints a line for each group of layers."""
    exact, params = window_flow(model.bind(captions), state), model.params["dit"]
    print(f"{'error of the window':20}" + "".join(f"{dtype:>16}" for dtype in quantize.DTYPES[1:]))
    for name, group in GROUPS.items():
        errors = [
            relative(window_flow(changed(model, alone(params, group, dtype)).bind(captions), state), exact)
            for dtype in quantize.DTYPES[1:]
        ]
        print(f"{name:20}" + "".join(f"{error:>16.2g}" for error in errors), flush=True)
