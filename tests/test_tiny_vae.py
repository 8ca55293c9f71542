"""The tiny decoder: chunks are the whole, and a PyTorch version written from the published architecture agrees."""

import functools

import jax
import numpy as np
import pytest

from rfjax import convert
from rfjax.tiny_vae import TinyDecoder, TinyVAEConfig

CONFIG = TinyVAEConfig(z_dim=4, widths=(10, 8, 6, 5))
MODEL = TinyDecoder(CONFIG)
LATENTS = np.random.default_rng(0).normal(size=(2, 5, 2, 3, 4)).astype(np.float32)
decode = jax.jit(lambda params, x, past: MODEL.apply({"params": params}, x, past))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init)(jax.random.key(0), LATENTS)["params"]


@pytest.mark.parametrize("cuts", [(1, 2, 3, 4), (2,), (3,)])
def test_any_chunking_gives_the_whole(params, cuts):
    whole, _ = decode(params, LATENTS, None)
    assert whole.shape == (2, 17, 16, 24, 3) and np.asarray(whole).std() > 0.01
    frames, past = [], None
    for chunk in np.split(LATENTS, cuts, 1):
        video, past = decode(params, chunk, past)
        frames.append(video)
    np.testing.assert_allclose(np.concatenate(frames, 1), whole, atol=1e-5)


def torch_decoder(torch):
    """TAEHV's decoder as published: memory blocks see the frame before, growing makes frames of channels."""
    nn, w = torch.nn, CONFIG.widths

    class Memory(nn.Module):
        def __init__(self, n):
            super().__init__()
            convs = [nn.Conv2d(2 * n, n, 3, padding=1), *(nn.Conv2d(n, n, 3, padding=1) for _ in range(2))]
            self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

        def forward(self, x):
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            return torch.relu(self.conv(torch.cat([x, before], 1)) + x)

    class Grow(nn.Module):
        def __init__(self, n, factor):
            super().__init__()
            self.conv = nn.Conv2d(n, factor * n, 1, bias=False)

        def forward(self, x):
            return self.conv(x).reshape(-1, *x.shape[1:])

    class Squash(nn.Module):
        def forward(self, x):
            return 3 * torch.tanh(x / 3)

    parts = [Squash(), nn.Conv2d(CONFIG.z_dim, w[0], 3, padding=1), nn.ReLU()]
    for level, factor in enumerate((1, 2, 2)):
        parts += [*(Memory(w[level]) for _ in range(3)), nn.Upsample(scale_factor=2), Grow(w[level], factor)]
        parts.append(nn.Conv2d(w[level], w[level + 1], 3, padding=1, bias=False))
    return nn.Sequential(*parts, nn.ReLU(), nn.Conv2d(w[-1], 3, 3, padding=1))


def test_torch_version_agrees(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    theirs = torch_decoder(torch)
    with torch.no_grad():  # numbers that fill the range of the picture
        for parameter in theirs.parameters():
            parameter *= 1.7
        theirs[-1].bias.fill_(0.5)
    weights = {f"decoder.{name}": x.detach() for name, x in theirs.state_dict().items()}
    weights |= {"encoder.0.weight": torch.ones(3), "encoder.12.conv.0.bias": torch.ones(3)}  # which we leave
    torch.save(weights, tmp_path / "taew2_1.pth")
    file = convert.convert(tmp_path / "taew2_1.pth", tmp_path / "weights")
    assert file.name == "tiny.safetensors"
    like = jax.eval_shape(MODEL.init, jax.random.key(0), LATENTS)["params"]
    ours = convert.from_torch({name: x.numpy() for name, x in weights.items()}, "tiny", like)
    found, _ = decode(ours, LATENTS, None)
    with torch.no_grad():
        for clip, out in zip(np.moveaxis(LATENTS, -1, 2), np.asarray(found), strict=True):
            wanted = 2 * theirs(torch.from_numpy(clip))[3:].clamp(0, 1).numpy() - 1
            np.testing.assert_allclose(np.moveaxis(out, -1, 1), wanted, atol=1e-4)
            assert 0.05 < wanted.std()
    back = convert.convert(file, tmp_path / "back.pth")
    again = torch.load(back, weights_only=True)
    assert again.keys() == {name for name in weights if name.startswith("decoder")}
    assert all(torch.equal(again[name], weights[name]) for name in again)


def convolved(p, x):
    """3×3, in loops: x [F, H, W, C]."""
    height, width = x.shape[1:3]
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = (x[:, i : i + height, j : j + width] @ p["kernel"][i, j] for i in range(3) for j in range(3))
    return sum(parts) + p.get("bias", 0)


def test_a_version_in_numpy_agrees(params):
    """The published architecture written out: memory blocks see the frame before, growing makes frames of channels."""
    p, relu = jax.tree.map(lambda a: np.asarray(a, np.float64), params), functools.partial(np.maximum, 0)
    x = relu(convolved(p["conv_in"], 3 * np.tanh(2 * LATENTS[0] / 3)))
    for level, factor in enumerate((1, 2, 2)):
        for memory in (p[f"memory_{level}_{block}"] for block in range(3)):
            y = np.concatenate([x, np.concatenate([0 * x[:1], x[:-1]])], -1)
            for name in ("conv1", "conv2", "conv3"):
                y = convolved(memory[name], relu(y) if name != "conv1" else y)
            x = relu(x + y)
        frames, height, width, channels = x.shape
        x = x.repeat(2, 1).repeat(2, 2) @ p[f"grow_{level}"]["kernel"]
        x = np.moveaxis(x.reshape(frames, 2 * height, 2 * width, factor, channels), 3, 1)
        x = convolved(p[f"conv_{level}"], x.reshape(-1, 2 * height, 2 * width, channels))
    wanted = 2 * np.clip(convolved(p["conv_out"], relu(x)), 0, 1)[3:] - 1
    np.testing.assert_allclose(decode(params, 2 * LATENTS, None)[0][0], wanted, atol=1e-4)
