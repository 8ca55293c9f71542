"""PyTorch twin of rfjax's rolling stream and VAE decoder, as quick as plain PyTorch gets them on CPU. For `versus_torch.py`.

The same algorithm on the same weights (arXiv 2509.25161, 2503.20314), in its steady state alone: one call over the window of S
blocks, the oldest finished, one clean call that writes its keys and values. Written for speed: one product for queries, keys and
values, fused attention, caches written in place, text keys and the embeddings of the schedule's few timesteps made once, rotations
made once, nothing that waits for a result. The order of keys means nothing to attention, so the clean call sees the ring of
cached blocks as it lies, its own block written over the one that leaves: no key or value is moved.

Letters as in `rfjax.dit`: B batch, F frames, T tokens a frame, N = f·T tokens a block, A heads, K head size.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rfjax import dit, rollout
from rfjax.rope import axis_sizes


def tensor(x) -> Tensor:
    return torch.from_numpy(np.array(x))


def linear(params: dict, *names: str, layer: int | None = None) -> nn.Linear:
    """One layer that does what the named ones do, side by side; of kernels [L, in, out], layer `layer`."""
    parts = [params[name] for name in names]
    pick = (lambda x: x) if layer is None else (lambda x: x[layer])
    weight = torch.cat([tensor(pick(p["kernel"])).T for p in parts]).contiguous()
    made = nn.Linear(*weight.shape[::-1])
    made.weight, made.bias = (
        nn.Parameter(weight),
        nn.Parameter(torch.cat([tensor(pick(p["bias"])) for p in parts])),
    )
    return made


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x [B, N, A, K] by complex turns [N, 1, K/2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, A, K] each → [B, N, A·K]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, config: dit.DiTConfig, params: dict, layer: int):
        super().__init__()
        c, pick = config, lambda *path: nn.Parameter(tensor(get(params, path)[layer]))
        self.heads, self.dim, self.eps = c.num_heads, c.dim, c.eps
        self.modulation = pick("modulation")
        self.q_scale, self.k_scale = pick("self_norm_q", "scale"), pick("self_norm_k", "scale")
        self.cross_scale = pick("cross_norm_q", "scale")
        self.norm3_scale, self.norm3_bias = pick("norm3", "scale"), pick("norm3", "bias")
        self.qkv = linear(params, "self_q", "self_k", "self_v", layer=layer)
        names = ("self_o", "cross_q", "cross_o", "ffn_in", "ffn_out")
        self.self_o, self.cross_q, self.cross_o, self.ffn_in, self.ffn_out = (
            linear(params, name, layer=layer) for name in names
        )

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """LN(x)·(1 + scale) + shift for x [B, F, T, D]; `scale` has the 1 in it."""
        return torch.addcmul(shift, F.layer_norm(x, (self.dim,), eps=self.eps), scale)

    def before(self, x: Tensor, e6: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, A, K] of x [B, F, T, D]; e6 [6, F, 1, D]."""
        shift, scale = e6[0] + self.modulation[0], e6[1] + self.modulation[1]
        y = self.modulated(x, shift, 1 + scale).flatten(1, 2)
        q, k, v = self.qkv(y).split(self.dim, -1)
        q, k = self.normed(q, self.q_scale), self.normed(k, self.k_scale)
        return q, k, v.unflatten(-1, (self.heads, -1))

    def normed(self, x: Tensor, scale: Tensor) -> Tensor:
        """RMSNorm over all heads, then split into them."""
        return F.rms_norm(x, (self.dim,), scale, self.eps).unflatten(-1, (self.heads, -1))

    def after(self, x: Tensor, e6: Tensor, attended: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """The rest of the layer, from what its self-attention gave [B, N, D]."""
        gate1, shift2, scale2, gate2 = (e6[2:] + self.modulation[2:, None, None]).unbind()
        x = torch.addcmul(x, gate1, self.self_o(attended).view_as(x))
        y = F.layer_norm(x, (self.dim,), self.norm3_scale, self.norm3_bias, self.eps).flatten(1, 2)
        x = x + self.cross_o(attend(self.normed(self.cross_q(y), self.cross_scale), *text)).view_as(x)
        y = self.ffn_in(self.modulated(x, shift2, 1 + scale2).flatten(1, 2))
        y = self.ffn_out(F.gelu(y, approximate="tanh"))
        return torch.addcmul(x, gate2, y.view_as(x))


def get(tree: dict, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree


class Stream(nn.Module):
    """A rolling stream in its steady state, taken over from rfjax: `step(noise)` gives block after block."""

    def __init__(self, model: rollout.Model, state: rollout.RolloutState, compiled: bool = False):
        super().__init__()
        c, params = model.dit.config, model.params
        self.config, self.rollout = c, model.config
        self.blocks = nn.ModuleList(Block(c, params["blocks"], layer) for layer in range(c.num_layers))
        if compiled:  # all that a layer does but its self-attention, whose cache is written in place
            for block in self.blocks:
                block.before, block.after = (
                    torch.compile(f, dynamic=False) for f in (block.before, block.after)
                )
        self.patch, self.head = linear(params, "patch_embedding"), linear(params, "head")
        self.text = [(tensor(k), tensor(v)) for k, v in zip(*model.text_kv, strict=True)]
        self.window = tensor(state.window)  # [B, S, f, H, W, C]
        self.index = int(state.index)
        k, v = (tensor(x).flatten(2, 3) for x in state.cache.kv)  # [L, B, slots·N, A, K]
        self.tokens = k.shape[2] // (model.config.sink_blocks + model.config.ring_blocks)
        sink = model.config.sink_blocks * self.tokens
        self.sink = [(k[i, :, :sink].clone(), v[i, :, :sink].clone()) for i in range(c.num_layers)]
        self.ring = [(k[i, :, sink:].clone(), v[i, :, sink:].clone()) for i in range(c.num_layers)]
        self._schedule(params)
        self._turns(self.window.shape[3:5])

    def _schedule(self, params: dict) -> None:
        """What depends on timesteps alone: σ of the window and of the re-noised window, modulations of both calls."""
        frames = self.rollout.block_frames
        t = torch.from_numpy(self.rollout.timesteps[::-1].copy()).float()
        self.sigma = (t / 1000).reshape(1, -1, 1, 1, 1, 1)
        self.next_sigma = self.sigma[:, :-1]
        self.head_modulation = nn.Parameter(tensor(params["head_modulation"]))
        time_in, time_out = linear(params, "time_in"), linear(params, "time_out")
        projection = linear(params, "time_projection")

        def modulation(t: Tensor) -> tuple[Tensor, Tensor]:
            half = self.config.freq_dim // 2
            angles = t[:, None] * 10000.0 ** (-torch.arange(half) / half)
            e = time_out(F.silu(time_in(torch.cat([angles.cos(), angles.sin()], -1))))
            e6 = projection(F.silu(e)).unflatten(-1, (6, -1)).transpose(0, 1)[:, :, None]
            return (e + self.head_modulation[:, None]).detach()[:, :, None], e6.detach().contiguous()

        self.window_e, self.window_e6 = modulation(t.repeat_interleave(frames))
        self.clean_e, self.clean_e6 = modulation(torch.zeros(frames))

    def _turns(self, size: tuple[int, int]) -> None:
        """Complex rotations of [sink | recent | window], and of the ring for each place of the newest block in it."""
        c, frames = self.config, self.rollout.block_frames
        rows, columns = size[0] // c.patch_size[1], size[1] // c.patch_size[2]

        def turns(blocks) -> Tensor:
            positions = (torch.tensor(blocks)[:, None] * frames + torch.arange(frames)).flatten()
            axes = (positions, torch.arange(rows), torch.arange(columns))
            angles = [
                p[:, None] * c.rope_base ** (-torch.arange(0, n, 2) / n)
                for p, n in zip(axes, axis_sizes(c.head_dim), strict=True)
            ]
            shape = (len(positions), rows, columns, -1)
            time, height, width = angles
            angles = [time[:, None, None], height[None, :, None], width[None, None]]
            angles = torch.cat([a.expand(shape) for a in angles], -1).reshape(-1, 1, c.head_dim // 2)
            return torch.polar(torch.ones_like(angles), angles)

        span, ring, steps = self.rollout.span_blocks, self.rollout.ring_blocks, self.rollout.num_steps
        assert span == ring, "the clean call sees the whole ring"
        self.seen_turns = turns([block - (span - steps) for block in range(span)])
        self.ring_turns = [turns([-((place - slot) % ring) for slot in range(ring)]) for place in range(ring)]

    def network(self, x: Tensor, e: Tensor, e6: Tensor, attention) -> Tensor:
        """Flow of x [B, F, H, W, C]; attention(layer, q, k, v) → [B, N, D]."""
        b, frames, height, width, _ = x.shape
        p, q = self.config.patch_size[1:]
        y = x.reshape(b, frames, height // p, p, width // q, q, -1).transpose(3, 4).flatten(4).flatten(2, 3)
        y = self.patch(y)
        for layer, block in enumerate(self.blocks):
            attended = attention(layer, *block.before(y, e6))
            y = block.after(y, e6, attended, self.text[layer])
        shift, scale = e
        y = self.head(torch.addcmul(shift, F.layer_norm(y, y.shape[-1:], eps=self.config.eps), 1 + scale))
        return y.reshape(b, frames, height // p, width // q, p, q, -1).transpose(3, 4).reshape(x.shape)

    def window_call(self, window: Tensor, recent: int) -> Tensor:
        """x0 of the window [B, S, f, H, W, C]; keys are [sink | ring slot `recent` | window]."""
        span = slice(recent * self.tokens, (recent + 1) * self.tokens)

        def attention(layer, q, k, v):
            (sink_k, sink_v), (ring_k, ring_v) = self.sink[layer], self.ring[layer]
            keys = rotate(torch.cat([sink_k, ring_k[:, span], k], 1), self.seen_turns)
            values = torch.cat([sink_v, ring_v[:, span], v], 1)
            return attend(rotate(q, self.seen_turns[-q.shape[1] :]), keys, values)

        flow = self.network(window.flatten(1, 2), self.window_e, self.window_e6, attention)
        return torch.addcmul(window, self.sigma, flow.view_as(window), value=-1)

    def clean_call(self, x0: Tensor, slot: int) -> None:
        """Writes the keys and values of x0 [B, f, H, W, C] to ring slot `slot`."""
        span = slice(slot * self.tokens, (slot + 1) * self.tokens)
        turn = self.ring_turns[slot]

        def attention(layer, q, k, v):
            keys, values = self.ring[layer]
            keys[:, span], values[:, span] = k, v
            return attend(rotate(q, turn[span]), rotate(keys, turn), values)

        self.network(x0, self.clean_e, self.clean_e6, attention)

    def step(self, noise: Tensor) -> Tensor:
        """The next block [B, f, H, W, C]. noise [B, S, f, H, W, C]: of the blocks that are re-noised, then of the newest."""
        ring, sinks = self.rollout.ring_blocks, self.rollout.sink_blocks
        slot = (self.index - self.rollout.num_steps + 1 - sinks) % ring
        self.window[:, -1] = noise[:, -1]
        x0 = self.window_call(self.window, (slot - 1) % ring)
        torch.lerp(x0[:, 1:], noise[:, :-1], self.next_sigma, out=self.window[:, :-1])
        self.clean_call(x0[:, 0], slot)
        self.index += 1
        return x0[:, 0]
