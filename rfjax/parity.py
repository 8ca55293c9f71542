"""Agreement with the public PyTorch implementation of Rolling Forcing, number by number.

    python -m rfjax.parity DIR

DIR holds what that implementation computed from random weights of any small size, as tests/golden does.
Prints a line per comparison: its name, the largest absolute difference, and ok or FAIL; the exit code is 1 if
any fails.
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rfjax import (
    attention,
    convert,
    flow,
    losses,
    names,
    parameters,
    rollout,
    teacher,
    training_rollout,
    tree,
    umt5,
)
from rfjax.errors import Parser, UserError, exit_cleanly
from rfjax.golden import Arrays, Golden

TOLERANCE = 1e-4  # of max(1, the largest number)
GRADIENT_TOLERANCE = 1e-3  # of the largest number

# How numbers are compared


class Comparison(NamedTuple):
    """Our numbers against theirs, of one shape."""

    name: str
    error: float  # the largest absolute difference; NaN if a number is
    ok: bool


def compare(name: str, ours: Any, theirs: np.ndarray, gradient: bool = False) -> Comparison:
    """The comparison; UserError if theirs is of another shape than its inputs give."""
    if np.shape(ours) != theirs.shape:
        raise UserError(
            f"{name} has shape {theirs.shape}, in our layout, but its inputs give {np.shape(ours)}."
        )
    largest, error = np.abs(theirs).max(), np.abs(np.asarray(ours) - theirs).max()
    bound = GRADIENT_TOLERANCE * largest if gradient else TOLERANCE * max(1, largest)
    return Comparison(name, float(error), bool(error <= bound))


def compare_gradients(case: str, golden: Golden, arrays: Arrays, held: dict[str, str], gradient: Any):
    """Gradients of single weights: {name in the file: official name} against the tree of ours."""
    if not held:
        raise UserError(
            f"{arrays.path} holds no gradient for {case}; give a complete directory of reference numbers."
        )
    ours = tree.flatten(gradient)
    for name, official in held.items():
        place, theirs = names.ours(official, names.WAN_DIT), arrays.take(name)
        if place is None:
            raise UserError(f"{name!r} in {arrays.path} is of a weight that no transformer here has.")
        path, layer, layout = place
        if layer is not None and layer >= golden.dit.config.num_layers:
            raise UserError(f"{name!r} in {arrays.path} is of a layer that config.json does not have.")
        yield compare(
            f"{case}.grad.{official}",
            ours[path] if layer is None else ours[path][layer],
            layout.ours(theirs),
            True,
        )


def nearest_in_table(t: np.ndarray, shift: float) -> np.ndarray:
    """The training table's timestep nearest to each t: the public code rounds so wherever it needs σ."""
    table = flow.NUM_TRAIN_TIMESTEPS * flow.training_sigmas(shift)
    return table[np.abs(t[..., None] - table).argmin(-1)]


def dit_params(golden: Golden, name: str) -> dict[str, Any]:
    """The transformer weights NAME.safetensors as our parameters."""
    return convert.from_torch(golden.weights(name), "dit", parameters.as_filed("dit", golden.dit.config))


# The cases, a generator of comparisons each


def schedule(golden: Golden) -> Iterator[Comparison]:
    arrays, shift = golden.arrays("schedule"), golden.rollout.shift
    sigmas = flow.training_sigmas(shift)
    yield compare("schedule.sigmas", sigmas, arrays.take("sigmas", "table"))
    yield compare("schedule.timesteps", flow.NUM_TRAIN_TIMESTEPS * sigmas, arrays.take("timesteps", "table"))
    yield compare(
        "schedule.training_weights", flow.loss_weights(shift), arrays.take("training_weights", "table")
    )
    x, noise = (arrays.take(name, "B C H W") for name in ("x", "noise"))
    t = nearest_in_table(arrays.take("query", "B"), shift)
    yield compare("schedule.noised", flow.add_noise(x, noise, t), arrays.take("noised", "B C H W"))


predict_flow = jax.jit(teacher.predict_flow, static_argnums=0)
guided_flow = jax.jit(teacher.guided_flow, static_argnums=0)
teacher_forcing_flow = jax.jit(losses.teacher_forcing_flow, static_argnums=0)


def bidirectional(golden: Golden) -> Iterator[Comparison]:
    arrays, params = golden.arrays("bidirectional"), dit_params(golden, "bidirectional_dit")
    x, context, t = arrays.latents("x"), arrays.context("context"), arrays.take("timestep", "B")
    ours = predict_flow(golden.dit, params, x, t, context)
    yield compare("bidirectional.flow", ours, arrays.latents("flow"))
    x0 = flow.x0_from_flow(x, ours, nearest_in_table(t, golden.rollout.shift))
    yield compare("bidirectional.x0", x0, arrays.latents("x0"))


def block_causal(golden: Golden) -> Iterator[Comparison]:
    arrays, params = golden.arrays("block_causal"), dit_params(golden, "causal_dit")
    x, clean = arrays.latents("x"), arrays.latents("clean")
    context, t = arrays.context("context"), arrays.take("timestep", "B F")
    frames, block_frames = x.shape[1], golden.rollout.block_frames
    mask = attention.block_causal_mask(frames, block_frames)
    ours = predict_flow(golden.dit, params, x, t, context, mask)
    yield compare("block_causal.flow", ours, arrays.latents("flow"))
    mask = attention.teacher_forcing_mask(frames, block_frames)
    ours = teacher_forcing_flow(golden.dit, params, clean, x, t, context, mask)
    yield compare("block_causal.flow_teacher_forcing", ours, arrays.latents("flow_teacher_forcing"))


def bind(golden: Golden, params: Any, context: Array) -> rollout.Model:
    """A rollout model whose text keys are a function of the weights."""
    text_kv = golden.dit.apply({"params": params}, context, method="text_kv")
    return rollout.Model(golden.dit, params, text_kv, golden.rollout)


@functools.partial(jax.jit, static_argnames=("golden", "method", "int8_cache"))
def clip(
    golden: Golden, method: str, params, context: Array, noise: Array, int8_cache: bool = False
) -> Array:
    """A whole clip's latents [B, F, H, W, C] from noise [B, block, step, f, H, W, C]."""
    batch, blocks, _, *frame_shape = noise.shape
    model = bind(golden, params, context)
    model = model.replace(config=dataclasses.replace(model.config, int8_cache=int8_cache))
    return rollout.rollout(model, rollout.array_noise(noise), batch, blocks, tuple(frame_shape), method)


def inference(method: str, golden: Golden) -> Iterator[Comparison]:
    arrays, params = golden.arrays(method), dit_params(golden, "causal_dit")
    timesteps = arrays.take("denoising_timesteps", "step")
    yield compare(f"{method}.denoising_timesteps", golden.rollout.timesteps, timesteps)

    ours = clip(golden, method, params, arrays.context("context"), arrays.noise("noise"))
    yield compare(f"{method}.latents", ours, arrays.latents("latents"))


def gradient_rollout(golden: Golden, params, context, noise, cotangent, exit_step, num_blocks):
    """A rolling clip of num_blocks ≤ noise.shape[1] blocks and d sum(clip · cotangent) / d params."""
    batch, max_blocks, _, *frame_shape = noise.shape
    draw = rollout.array_noise(noise)
    plan = training_rollout.Plan(draw, exit_step, num_blocks, max_blocks, batch, tuple(frame_shape))

    def objective(params):
        clip = training_rollout.gradient_rollout(bind(golden, params, context), "rolling", plan)
        inside = jnp.arange(clip.shape[1]) < num_blocks * golden.rollout.block_frames
        clip = jnp.where(inside[None, :, None, None, None], clip, 0)
        return (clip * cotangent).sum(), clip

    gradient, clip = jax.grad(objective, has_aux=True)(params)
    return clip, gradient


def carries_gradient(config: rollout.RolloutConfig, num_blocks: int, exit_step: int) -> np.ndarray:
    """[F], 1 for frames whose gradient window reaches into the clip's last `span` frames, else 0."""
    block = np.arange(num_blocks)
    window = exit_step + config.num_steps * np.maximum(-((exit_step - block) // config.num_steps), 0)
    end = np.minimum(window, num_blocks - 1) + 1
    return np.repeat(end > num_blocks - config.span_blocks, config.block_frames).astype(np.float32)


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """Zeros behind, along axis 1, so that clips of all lengths share a compiled program."""
    return np.pad(array, [(0, size - n if axis == 1 else 0) for axis, n in enumerate(array.shape)])


def rolling_training(golden: Golden) -> Iterator[Comparison]:
    arrays, params = golden.arrays("rolling_training"), dit_params(golden, "causal_dit")
    clips = sorted({clip[0] for name in arrays.content if (clip := re.match(r"f\d+_e\d+(?=_)", name))})
    if not clips:
        raise UserError(f"{arrays.path} holds no clip named f<frames>_e<exit step>_….")
    if late := [clip for clip in clips if int(clip.split("_e")[1]) >= golden.rollout.num_steps]:
        raise UserError(f"{late[0]} in {arrays.path} has an exit step past the last denoising step.")
    most = max(arrays.noise(f"{clip}_noise").shape[1] for clip in clips)
    run = jax.jit(functools.partial(gradient_rollout, golden))
    for clip in clips:
        exit_step, case = int(clip.split("_e")[1]), f"rolling_training.{clip}"
        noise, context = arrays.noise(f"{clip}_noise"), arrays.context(f"{clip}_context")
        cotangent, theirs = (arrays.latents(f"{clip}_{name}", "frames") for name in ("cotangent", "output"))
        frames = noise.shape[1] * golden.rollout.block_frames
        if cotangent.shape[1] != frames:
            raise UserError(
                f"{clip} in {arrays.path} has noise for {frames} frames, but {cotangent.shape[1]} cotangents."
            )
        padded_cotangent = padded(cotangent, most * golden.rollout.block_frames)
        ours, gradient = run(
            params, context, padded(noise, most), padded_cotangent, exit_step, noise.shape[1]
        )
        kept = carries_gradient(golden.rollout, noise.shape[1], exit_step)
        yield compare(f"{case}.output", ours[:, :frames] * kept.reshape(1, -1, 1, 1, 1), theirs)
        prefix = f"{clip}_grad."
        held = {name: name.removeprefix(prefix) for name in arrays.content if name.startswith(prefix)}
        yield from compare_gradients(case, golden, arrays, held, gradient)


def dmd(golden: Golden) -> Iterator[Comparison]:
    arrays = golden.arrays("dmd")
    x, noise, t = arrays.latents("latents"), arrays.latents("noise"), arrays.take("timestep", "B F")
    context, negative = arrays.context("context"), arrays.context("negative_context")
    mask, scale = arrays.take("gradient_mask_frames", "F"), float(arrays.take("guidance_scale", ""))
    table_t = nearest_in_table(t, golden.rollout.shift)
    x_t = flow.add_noise(x, noise, table_t)
    fake = predict_flow(golden.dit, dit_params(golden, "fake_dit"), x_t, t, context)
    real = guided_flow(golden.dit, dit_params(golden, "real_dit"), x_t, t, context, negative, scale)
    direction = losses.dmd_gradient(x, *(flow.x0_from_flow(x_t, out, table_t) for out in (fake, real)))
    loss, gradient = jax.value_and_grad(losses.dmd_loss)(jnp.asarray(x), direction, mask)
    yield compare("dmd.loss", loss, arrays.take("loss", ""))
    yield compare("dmd.grad", gradient, arrays.latents("grad"), gradient=True)


def critic(golden: Golden) -> Iterator[Comparison]:
    arrays, params = golden.arrays("critic"), dit_params(golden, "fake_dit")
    x, noise, t = arrays.latents("latents"), arrays.latents("noise"), arrays.take("timestep", "B F")
    x_t = flow.add_noise(x, noise, nearest_in_table(t, golden.rollout.shift))

    @jax.jit
    @jax.value_and_grad
    def loss_of(params, context):
        return losses.mean_square(teacher.predict_flow(golden.dit, params, x_t, t, context) - (noise - x))

    loss, gradient = loss_of(params, arrays.context("context"))
    yield compare("critic.loss", loss, arrays.take("loss", ""))
    held = {f"grad_{name.replace('.', '_')}": name for name in golden.weights("fake_dit")}
    held = {name: official for name, official in held.items() if name in arrays.content}
    yield from compare_gradients("critic", golden, arrays, held, gradient)


def vae(golden: Golden) -> Iterator[Comparison]:
    model = golden.vae()
    arrays = golden.arrays("vae", C=3, Z=model.config.z_dim)
    statistics = {name: arrays.take(name, "Z") for name in ("latent_mean", "latent_std")}
    video = np.moveaxis(arrays.take("video", "B C frames height width"), 1, -1)
    latents = np.moveaxis(arrays.take("latents", "B Z frames rows columns"), 1, -1)
    reconstruction = np.moveaxis(arrays.take("reconstruction", "B C frames height width"), 1, -1)
    like = jax.eval_shape(model.init, jax.random.key(0), video)["params"]
    params = convert.from_torch(golden.weights("vae") | statistics, "vae", like)
    call = jax.jit(lambda name, *args: model.apply({"params": params}, *args, method=name), static_argnums=0)

    yield compare("vae.encode", call("normalise", call("encode", video)[0]), latents)
    raw = call("denormalise", latents)
    yield compare("vae.decode", call("decode", raw), reconstruction)
    frames, state = [], None
    for index in range(raw.shape[1]):
        out, state = call("decode_step", raw[:, index : index + 1], state)
        frames.append(out)
    yield compare("vae.decode_streaming", np.concatenate(frames, 1), reconstruction)


def text(golden: Golden) -> Iterator[Comparison]:
    if not (golden.root / "umt5.npz").exists():  # a directory may be of the video model alone
        return
    model = golden.umt5()
    arrays = golden.arrays("umt5", D=model.config.dim)
    ids, mask = (arrays.take(name, "B tokens").astype(np.int32) for name in ("ids", "mask"))
    params = convert.from_torch(golden.weights("umt5"), "umt5", parameters.as_filed("umt5", model.config))
    told = np.float32(mask)[..., None]  # what stands at padding means nothing
    hidden = jax.jit(model.apply)({"params": params}, ids, mask.astype(bool))
    yield compare("umt5.hidden", told * hidden, told * arrays.take("hidden", "B tokens D"))
    features = jax.jit(umt5.prompt_features, static_argnums=0)(model, params, ids, mask)
    yield compare("umt5.prompt_embeds", features, arrays.take("prompt_embeds", "B tokens D"))


CASES = [
    schedule,
    bidirectional,
    block_causal,
    functools.partial(inference, "rolling"),
    functools.partial(inference, "self_forcing"),
    rolling_training,
    dmd,
    critic,
    vae,
    text,
]


def comparisons(root: str | Path) -> Iterator[Comparison]:
    """All comparisons of a directory, one by one; UserError for one that is incomplete or malformed."""
    golden = Golden(root)
    with jax.default_matmul_precision("highest"):
        for case in CASES:
            yield from case(golden)


@exit_cleanly
def main() -> None:
    parser = Parser(
        prog="python -m rfjax.parity",
        description="Compare with the numbers of the public PyTorch implementation.",
    )
    parser.add_argument(
        "directory", help="config.json, vae_config.json, *.safetensors and *.npz, as in tests/golden"
    )
    failed = False
    print(f"{'case':60} {'max_abs_error':>13}  result")
    for name, error, ok in comparisons(parser.parse_args().directory):
        print(f"{name:60} {error:13.3e}  {'ok' if ok else 'FAIL'}", flush=True)
        failed |= not ok
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
