"""The PyTorch twins give rfjax's numbers: only then do their times say anything."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_rollout import CONFIGS, KEYS, frame_shape, noise

from rfjax import rollout
from rfjax.stream import stream_step
from rfjax.vae import VAE, VAEConfig

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import torch_twin  # noqa: E402
import torch_vae  # noqa: E402
import versus_torch  # noqa: E402


@torch.inference_mode()
def test_the_twin_of_the_stream_goes_on_with_the_same_blocks():
    """Through a whole turn of the ring, from random weights everywhere."""
    config = CONFIGS["rolling"]
    model = tiny.model(config, len(KEYS))
    state = rollout.rolling_init(model, len(KEYS), frame_shape(config))
    lead = config.span_blocks + config.num_steps - 1
    for _ in range(lead):
        state, _ = stream_step(model, "rolling", KEYS, rollout.ENDLESS, state)
    twin = torch_twin.Stream(model, state)
    drawn = np.moveaxis(noise(config), 2, 0)  # [B, block, step, …]
    for index in range(lead, drawn.shape[1]):
        state, block = stream_step(model, "rolling", KEYS, rollout.ENDLESS, state)
        theirs = twin.step(torch_twin.tensor(versus_torch.window_noise(drawn, index)))
        np.testing.assert_allclose(theirs, block, atol=1e-4)


@torch.inference_mode()
def test_the_twin_of_the_decoder_goes_on_with_the_same_frames():
    vae = VAE(VAEConfig(dim=4, z_dim=4, num_res_blocks=1))
    params = versus_torch.random_params("vae", vae.config)
    latents = [jnp.asarray(tiny.normal(seed, 1, 2, 2, 3, 4)) for seed in range(3)]
    decode = jax.jit(lambda x, state: vae.apply({"params": params}, x, state, method="decode_normalised"))
    _, state = decode(latents[0], None)
    twin = torch_vae.Decoder(vae.config, params, state)
    for block in latents[1:]:
        video, state = decode(block, state)
        np.testing.assert_allclose(twin(torch_twin.tensor(block)), video, atol=1e-4)
