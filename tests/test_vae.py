"""The VAE against the public implementation, against itself chunk by chunk; its strict conversion."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

from rfjax import parameters, sampler
from rfjax import vae as vae_module
from rfjax.conv import causal_conv, with_past
from rfjax.convert import WAN_LATENT_STATISTICS, from_torch
from rfjax.errors import UserError
from rfjax.tree import flatten
from rfjax.vae import VAE, VAEConfig, latent_size

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def official():
    """(VAE, shapes of its parameters, weights by torch name, the fixture's arrays channels last)."""
    sizes = json.loads((GOLDEN / "vae_config.json").read_text())
    vae = VAE(
        VAEConfig(
            dim=sizes["dim"],
            z_dim=sizes["z_dim"],
            dim_mult=tuple(sizes["dim_mult"]),
            num_res_blocks=sizes["num_res_blocks"],
            temporal_downsample=tuple(sizes["temperal_downsample"]),
        )
    )
    arrays = {
        name: np.moveaxis(a, 1, -1) if a.ndim == 5 else a for name, a in np.load(GOLDEN / "vae.npz").items()
    }
    like = jax.eval_shape(vae.init, jax.random.key(0), arrays["video"])["params"]
    weights = load_file(GOLDEN / "vae.safetensors") | {k: arrays[k] for k in ("latent_mean", "latent_std")}
    return vae, like, weights, arrays


@pytest.fixture(scope="module")
def call(official):
    """call(method, *arguments): a jitted method of the fixture's VAE with its weights."""
    vae, like, weights, _ = official
    params = from_torch(weights, "vae", like)
    apply = jax.jit(
        lambda method, *args: vae.apply({"params": params}, *args, method=method), static_argnums=0
    )
    return apply


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(1, np.abs(theirs).max()))


def in_chunks(call, method, x, sizes):
    """Every output but the state of a step method, joined over chunks of these sizes along axis 1."""
    state, start, outputs = None, 0, []
    for size in sizes:
        *output, state = call(method, x[:, start : start + size], state)
        outputs.append(output)
        start += size
    assert start == x.shape[1]
    return [np.concatenate(parts, 1) for parts in zip(*outputs, strict=True)]


def test_encode_matches_the_public_implementation(official, call):
    arrays = official[-1]
    mean, logvar = call("encode", arrays["video"])
    assert logvar.shape == mean.shape
    assert_close(call("normalise", mean), arrays["latents"])


def test_decode_matches_the_public_implementation(official, call):
    arrays = official[-1]
    assert_close(call("decode", call("denormalise", arrays["latents"])), arrays["reconstruction"])


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [3, 2], [1, 3, 1]], ids=str)
def test_decoding_in_any_chunks_is_decoding_the_clip(official, call, sizes):
    latents = official[-1]["latents"]
    (video,) = in_chunks(call, "decode_step", latents, sizes)
    np.testing.assert_allclose(video, call("decode", latents), atol=1e-4)


def test_large_frames_are_decoded_one_by_one(official, call, monkeypatch):
    """The same video from less memory: of the finest level one frame lies there in place of four."""
    vae, like, weights, arrays = official
    params = from_torch(weights, "vae", like)
    latents, spent = arrays["latents"], []
    _, state = call("decode_step", latents[:, :1], None)
    for large in (vae_module.LARGE, 0):
        monkeypatch.setattr(vae_module, "LARGE", large)
        step = jax.jit(lambda *args: vae.apply({"params": params}, *args, method="decode_step"))
        compiled = step.lower(latents[:, 1:2], state).compile()
        spent.append(compiled.memory_analysis().temp_size_in_bytes)
    (video,) = in_chunks(
        lambda name, *args: step(*args) if args[1] else call(name, *args), "decode_step", latents, [1] * 5
    )
    np.testing.assert_allclose(video, call("decode", latents), atol=1e-4)
    assert spent[1] < 0.6 * spent[0]


def test_a_stream_of_several_clips_of_large_frames(official, monkeypatch):
    """As `sampler.decode_block` has them: clip by clip, and latent frames one after another, the first among them."""
    vae, like, weights, arrays = official
    params = from_torch(weights, "vae", like)
    latents = jnp.concatenate([arrays["latents"], -arrays["latents"]])
    videos = []
    for large in (vae_module.LARGE, 0):
        monkeypatch.setattr(vae_module, "LARGE", large)
        decode = jax.jit(functools.partial(sampler.decode_block.__wrapped__, vae))
        first, state = decode(params, latents[:, :2], None)
        later, _ = decode(params, latents[:, 2:], state)
        videos.append(np.concatenate([first, later], 1).astype(int))
    assert videos[0].shape[:2] == (2, 17) and len(np.unique(videos[0])) > 100
    np.testing.assert_allclose(*videos, rtol=0, atol=1)


def test_large_frames_in_bfloat16_leave_a_state_like_the_one_before(official, monkeypatch):
    monkeypatch.setattr(vae_module, "LARGE", 0)
    network = VAE(dataclasses.replace(official[0].config, dtype="bfloat16"))
    params, latents = (
        parameters.abstract("vae", network.config),
        jax.ShapeDtypeStruct((1, 3, 2, 2, 4), jnp.float32),
    )
    decode = functools.partial(sampler.decode_block.__wrapped__, network)
    _, first = jax.eval_shape(decode, params, latents, None)
    assert jax.eval_shape(decode, params, latents, first)[1] == first
    assert {leaf.dtype.name for leaf in jax.tree.leaves(first)} == {"bfloat16"}


@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4], [5, 4, 8]], ids=str)
def test_encoding_in_any_chunks_is_encoding_the_clip(official, call, sizes):
    video = official[-1]["video"]
    for chunked, whole in zip(
        in_chunks(call, "encode_step", video, sizes), call("encode", video), strict=True
    ):
        np.testing.assert_allclose(chunked, whole, atol=1e-4)


def test_state_is_as_large_after_every_chunk(official, call):
    latents = official[-1]["latents"]
    first = call("decode_step", latents[:, :1], None)[1]
    later = call("decode_step", latents[:, 1:4], first)[1]
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, later)


@pytest.mark.parametrize("frame", [0, 1, 3, 4])
def test_decoder_never_sees_the_future(official, call, frame):
    latents = official[-1]["latents"]
    change = call("decode", latents) - call(
        "decode", latents + np.eye(5, dtype=np.float32)[frame][:, None, None, None]
    )
    touched = np.flatnonzero(np.abs(change).max((0, 2, 3, 4)))
    assert touched[0] == max(0, 1 + 4 * (frame - 1))


@pytest.mark.parametrize("frame", [0, 1, 4, 5, 16])
def test_encoder_never_sees_the_future(official, call, frame):
    video = official[-1]["video"]
    changed = video + np.eye(17, dtype=np.float32)[frame][:, None, None, None]
    change = call("encode", video)[0] - call("encode", changed)[0]
    touched = np.flatnonzero(np.abs(change).max((0, 2, 3, 4)))
    assert touched[0] == -(-frame // 4)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (3, 8), (8, 3)])
def test_causal_conv_is_the_3d_convolution(inputs, outputs):
    random = np.random.default_rng(0)
    x = with_past(random.normal(size=(2, 5, 6, 7, inputs)).astype(np.float32), None)
    kernel = random.normal(size=(3, 3, 3, inputs, outputs)).astype(np.float32)
    padding = ((0, 0), (1, 1), (1, 1))
    expected = lax.conv_general_dilated(
        x, kernel, (1, 1, 1), padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    np.testing.assert_allclose(causal_conv(x, kernel), expected, atol=1e-4)


def test_gradients_are_finite_even_for_one_grey_frame():
    """One frame leaves the time convolutions nothing to do; zeros leave the norms nothing to divide by."""
    config = VAEConfig(dim=4, z_dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,))
    vae, video = VAE(config), jnp.zeros((1, 1, 4, 4, 3))
    params = jax.jit(vae.init)(jax.random.key(0), video)["params"]
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(vae.apply({"params": p}, video)[0])))(params)
    for path, leaf in flatten(gradient).items():
        assert jnp.isfinite(leaf).all(), path
    assert gradient["decoder"]["head"]["bias"].any()


def test_latent_size():
    config = VAEConfig(dim=96)
    assert latent_size(config, 81, 480, 832) == (21, 60, 104)
    with pytest.raises(UserError, match="nearest is 81 frames of 480x832"):
        latent_size(config, 80, 483, 830)
    with pytest.raises(UserError, match="nearest is 1 frames of 8x8"):
        latent_size(config, 0, 1, 1)


def test_config_names_the_wrong_field():
    with pytest.raises(UserError, match="temporal_downsample"):
        VAEConfig(dim=4, dim_mult=(1, 2))


def test_conversion_knows_every_official_name():
    names = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())["wan2.1_vae"]
    config = VAEConfig(dim=96)
    like = jax.eval_shape(VAE(config).init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))["params"]
    weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in names.items()}
    weights |= WAN_LATENT_STATISTICS
    converted = flatten(from_torch(weights, "vae", like))
    assert {path: a.shape for path, a in converted.items()} == {
        path: a.shape for path, a in flatten(like).items()
    }


def _without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w | {"decoder.extra.weight": w["conv1.bias"]}, "decoder.extra.weight"),
        (lambda w: w | {"decoder.upsamples.11.residual.2.bias": w["conv1.bias"]}, "upsamples_11/conv1/bias"),
        (lambda w: _without(w, "decoder.middle.1.proj.bias"), "decoder/middle_1/proj/bias"),
        (lambda w: w | {"conv1.weight": w["conv1.weight"][:-1]}, "unexpected shape .*conv1/kernel"),
        (
            lambda w: w | {"encoder.conv1.weight": np.float32(1)},
            r"unexpected shape .*encoder.conv1.weight \[\]",
        ),
        # As many numbers in another arrangement must not pass either.
        (
            lambda w: w | {"conv1.weight": np.swapaxes(w["conv1.weight"], 1, 2)},
            "unexpected shape .*conv1.weight",
        ),
    ],
    ids=["unknown", "not in this configuration", "missing", "too small", "a scalar", "axes swapped"],
)
def test_conversion_refuses(official, damage, message):
    _, like, weights, _ = official
    with pytest.raises(UserError, match=message):
        from_torch(damage(weights), "vae", like)
