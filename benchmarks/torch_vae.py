"""PyTorch twin of rfjax's streaming Wan VAE decoder (arXiv 2503.20314), for `versus_torch.py`.

The same network on the same weights, in the middle of a stream: every convolution has a past. Channels last in memory, which is
what oneDNN's convolutions like on CPU, in place where nothing else looks.

Letters: B batch, F frames, C channels; tensors are [B, C, F, H, W].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_twin import tensor

from rfjax.vae import VAEConfig

LAST = torch.channels_last_3d


class CausalConv(nn.Module):
    """Convolution over time and space; `past` holds the last two input frames."""

    def __init__(self, params: dict, past):
        super().__init__()
        kernel = tensor(params["kernel"])
        if kernel.ndim == 2:  # a Dense over three frames side by side
            kernel = kernel.reshape(3, 1, 1, kernel.shape[0] // 3, -1)
        self.weight = nn.Parameter(kernel.permute(4, 3, 0, 1, 2).contiguous(memory_format=LAST))
        self.bias = nn.Parameter(tensor(params["bias"]))
        self.padding = (0, kernel.shape[1] // 2, kernel.shape[2] // 2)
        self.past = frames_first(past)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.past, x], 2)
        self.past = x[:, :, -2:].clone(memory_format=LAST)  # a view would keep all of x
        return F.conv3d(x, self.weight, self.bias, padding=self.padding)


def frames_first(x) -> Tensor:
    """rfjax's [B, F, H, W, C] as [B, C, F, H, W], in memory as it was."""
    return tensor(x).permute(0, 4, 1, 2, 3)


class Pointwise(nn.Module):
    """A linear map of every pixel's channels."""

    def __init__(self, params: dict):
        super().__init__()
        self.weight = nn.Parameter(tensor(params["kernel"]).T.contiguous())
        self.bias = nn.Parameter(tensor(params["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)


class RMSNorm(nn.Module):
    def __init__(self, params: dict):
        super().__init__()
        self.gamma = nn.Parameter(tensor(params["gamma"]))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.movedim(1, -1), self.gamma.shape, self.gamma, eps=1e-24).movedim(-1, 1)


class ResidualBlock(nn.Module):
    def __init__(self, params: dict, past):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(params["norm1"]), RMSNorm(params["norm2"])
        self.conv1, self.conv2 = CausalConv(params["conv1"], past[0]), CausalConv(params["conv2"], past[1])
        self.shortcut = Pointwise(params["shortcut"]) if "shortcut" in params else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        return y.add_(self.shortcut(x))


class Attention(nn.Module):
    """One head within each frame."""

    def __init__(self, params: dict):
        super().__init__()
        self.norm, self.qkv, self.proj = (
            RMSNorm(params["norm"]),
            Pointwise(params["to_qkv"]),
            Pointwise(params["proj"]),
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, F, H·W, 3C]
        y = F.scaled_dot_product_attention(*qkv.chunk(3, -1)).unflatten(2, x.shape[-2:])
        return self.proj(y.permute(0, 4, 1, 2, 3)).add_(x)


class Upsample(nn.Module):
    """Twice the height and width of every frame; with `time_conv` twice the frames before."""

    def __init__(self, params: dict, past):
        super().__init__()
        self.time_conv = CausalConv(params["time_conv"], past) if "time_conv" in params else None
        kernel = tensor(params["resample"]["kernel"]).permute(3, 2, 0, 1)
        self.weight = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(tensor(params["resample"]["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        if self.time_conv is not None:
            pairs = self.time_conv(x).unflatten(1, (2, -1))  # [B, 2, C, F, H, W]
            x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        batch, frames = x.shape[0], x.shape[2]
        x = x.movedim(2, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        x = F.conv2d(F.interpolate(x, scale_factor=2.0), self.weight, self.bias, padding=1)
        return x.unflatten(0, (batch, frames)).movedim(1, 2)


class Decoder(nn.Module):
    """`decoder(latents [B, f, h, w, z])` gives the next frames [B, 4 f, 8 h, 8 w, 3], from rfjax's state after a clip's start."""

    def __init__(self, config: VAEConfig, params: dict, state):
        super().__init__()
        p, (*body, head) = params["decoder"], state
        self.mean, self.std = tensor(params["latent_mean"]), tensor(params["latent_std"])
        self.conv2 = Pointwise(params["conv2"])
        names = [f"middle_{i}" for i in range(3)]
        names += [f"upsamples_{i}" for i in range(len(body) - 4)]
        layers = [CausalConv(p["conv1"], body[0])]
        for name, past in zip(names, body[1:], strict=True):
            if "to_qkv" in p[name]:
                layers.append(Attention(p[name]))
            else:
                layers.append((Upsample if "resample" in p[name] else ResidualBlock)(p[name], past))
        self.body = nn.Sequential(*layers)
        self.norm, self.head = RMSNorm(p["norm"]), CausalConv(p["head"], head)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv2((latents * self.std + self.mean).permute(0, 4, 1, 2, 3))
        x = self.head(F.silu(self.norm(self.body(x)), inplace=True))
        return x.permute(0, 2, 3, 4, 1)
