"""The method once more, slowly and literally, in float64 NumPy: no ring, no mask, no scan, complex rotations.

Frames are kept one by one in Python lists, each with the position at which it is seen. Only the names of
parameters are shared with the package.
"""

import functools

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + np.exp(-x))


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def rms_norm(p, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p["scale"]


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attention(q, k, v):
    """q [..., N, K], k and v [..., M, K]."""
    return softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v


def rotate(x, time, row, column, base=10000.0):
    """x [..., K] of one token, its interleaved pairs turned as complex numbers."""
    head = x.shape[-1]
    space = 2 * (head // 6)
    angles = []
    for size, position in ((head - 2 * space, time), (space, row), (space, column)):
        angles += [position * base ** (-2 * i / size) for i in range(size // 2)]
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.array(angles))
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def rotate_frame(x, time, columns, base=10000.0):
    """x [..., T, K]: the tokens of a frame, row by row."""
    tokens = [rotate(x[..., i, :], time, i // columns, i % columns, base) for i in range(x.shape[-2])]
    return np.stack(tokens, -2)


class DiT:
    """The transformer, frame by frame; `frames` in and out are lists of arrays [B, H, W, C]."""

    def __init__(self, config, params, context):
        self.config, self.p = config, tree_float64(params)
        text = linear(self.p["text_out"], gelu(linear(self.p["text_in"], np.asarray(context, np.float64))))
        self.text = []
        for layer in range(config.num_layers):
            p = at(self.p["text_layers"], layer)
            k, v = rms_norm(p["norm_k"], linear(p["k"], text), config.eps), linear(p["v"], text)
            self.text.append((self.heads(k), self.heads(v)))

    def heads(self, x):
        """[B, M, D] → [B, A, M, K]."""
        return x.reshape(*x.shape[:2], self.config.num_heads, -1).swapaxes(1, 2)

    def merge(self, x):
        """[B, A, M, K] → [B, M, D]."""
        return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)

    def time(self, t):
        half = self.config.freq_dim // 2
        angles = [t * 10000.0 ** (-i / half) for i in range(half)]
        e = linear(self.p["time_in"], np.array([np.cos(a) for a in angles] + [np.sin(a) for a in angles]))
        e = linear(self.p["time_out"], silu(e))
        return e, linear(self.p["time_projection"], silu(e)).reshape(6, -1)

    def patches(self, frame):
        _, p, q = self.config.patch_size
        rows, columns = frame.shape[1] // p, frame.shape[2] // q
        cut = [frame[:, r * p : r * p + p, c * q : c * q + q] for r in range(rows) for c in range(columns)]
        return np.stack([patch.reshape(len(frame), -1) for patch in cut], 1), rows, columns

    def unpatch(self, tokens, rows, columns):
        _, p, q = self.config.patch_size
        frame = np.zeros((tokens.shape[0], rows * p, columns * q, self.config.in_dim))
        for i in range(rows * columns):
            r, c = i // columns * p, i % columns * q
            frame[:, r : r + p, c : c + q] = tokens[:, i].reshape(-1, p, q, self.config.in_dim)
        return frame

    def __call__(self, frames, times, positions, past=(), sees=lambda query, key: True):
        """Flow of every frame and its raw (key, value) a layer. past: [(position, [(k, v) a layer])].

        sees(i, j): may frame i of the window look at frame j of it?
        """
        c = self.config
        cut = [self.patches(np.asarray(frame, np.float64)) for frame in frames]
        rows, columns = cut[0][1:]
        x = [linear(self.p["patch_embedding"], tokens) for tokens, _, _ in cut]
        embedded = [self.time(float(t)) for t in times]
        stored = [[] for _ in frames]
        for layer in range(c.num_layers):
            p = at(self.p["blocks"], layer)
            gates = [np.asarray(p["modulation"] + e6) for _, e6 in embedded]
            y = [layer_norm(h, c.eps) * (1 + m[1]) + m[0] for h, m in zip(x, gates, strict=True)]
            q, k = (
                [self.heads(rms_norm(p[f"self_norm_{n}"], linear(p[f"self_{n}"], h), c.eps)) for h in y]
                for n in "qk"
            )
            v = [self.heads(linear(p["self_v"], h)) for h in y]
            turn = functools.partial(rotate_frame, columns=columns, base=c.rope_base)
            before = [(turn(kv[layer][0], position), kv[layer][1]) for position, kv in past]
            own = [(turn(key, position), value) for key, value, position in zip(k, v, positions, strict=True)]
            for i, h in enumerate(x):
                seen = before + [pair for j, pair in enumerate(own) if sees(i, j)]
                keys, values = (np.concatenate(part, -2) for part in zip(*seen, strict=True))
                out = self.merge(attention(turn(q[i], positions[i]), keys, values))
                h = h + gates[i][2] * linear(p["self_o"], out)
                normal = layer_norm(h, c.eps) * p["norm3"]["scale"] + p["norm3"]["bias"]
                query = self.heads(rms_norm(p["cross_norm_q"], linear(p["cross_q"], normal), c.eps))
                h = h + linear(p["cross_o"], self.merge(attention(query, *self.text[layer])))
                out = layer_norm(h, c.eps) * (1 + gates[i][4]) + gates[i][3]
                x[i] = h + gates[i][5] * linear(p["ffn_out"], gelu(linear(p["ffn_in"], out)))
                stored[i].append((k[i], v[i]))
        flows = []
        for h, (e, _) in zip(x, embedded, strict=True):
            shift, scale = self.p["head_modulation"] + e
            flows.append(
                self.unpatch(
                    linear(self.p["head"], layer_norm(h, c.eps) * (1 + scale) + shift), rows, columns
                )
            )
        return flows, stored


def tree_float64(tree):
    if hasattr(tree, "items"):
        return {name: tree_float64(leaf) for name, leaf in tree.items()}
    return np.asarray(tree, np.float64)


def at(tree, layer):
    if isinstance(tree, dict):
        return {name: at(leaf, layer) for name, leaf in tree.items()}
    return tree[layer]


def warped(step, shift):
    """A few-step timestep after the shift."""
    sigma = step / 1000
    return 1000 * shift * sigma / (1 + (shift - 1) * sigma)


def denoise_past(first, size, config):
    """[(position, block id, frame)] that the window of `size` blocks from `first` sees."""
    f, sinks = config.block_frames, config.sink_blocks
    room = config.span_blocks - sinks - size
    recent = [b for b in range(first) if b >= sinks and b >= first - room]
    sink = [b for b in range(first) if b < sinks]
    start = first * f - len(recent) * f - len(sink) * f
    seen = [(start + i * f + j, b, j) for i, b in enumerate(sink) for j in range(f)]
    return seen + [(b * f + j, b, j) for b in recent for j in range(f)]


def clean_past(block, config):
    """[(position, block id, frame)] that the clean call sees: the last `span` blocks, at true positions."""
    f = config.block_frames
    return [(b * f + j, b, j) for b in range(max(0, block - config.span_blocks + 1), block) for j in range(f)]


class Rollout:
    """Rolling and Self-Forcing inference that keeps all keys. noise[block][step] is [B, f, H, W, C]."""

    def __init__(self, dit, config, noise):
        self.dit, self.config, self.noise = dit, config, noise
        self.t = [warped(step, config.shift) for step in config.steps]
        self.memory = []  # of every finished block, of every frame, of every layer: (k, v)
        self.clean = []  # x0 of every finished block

    def x0(self, blocks, ids, times, seen):
        """x0 of blocks (arrays [B, f, H, W, C]) seen with `seen`, and the keys of every frame."""
        f = self.config.block_frames
        frames = [block[:, j] for block in blocks for j in range(f)]
        levels = [t for t in times for _ in range(f)]
        positions = [b * f + j for b in ids for j in range(f)]
        past = [(position, self.memory[b][j]) for position, b, j in seen]
        flows, stored = self.dit(frames, levels, positions, past)
        x0 = [frame - t / 1000 * v for frame, t, v in zip(frames, levels, flows, strict=True)]
        return [np.stack(x0[i * f : (i + 1) * f], 1) for i in range(len(blocks))], stored

    def finish(self, block, x0):
        _, stored = self.x0([x0], [block], [0], clean_past(block, self.config))
        self.memory.append(stored)
        self.clean.append(x0)

    def renoise(self, x0, block, step):
        sigma = self.t[step] / 1000
        return (1 - sigma) * x0 + sigma * self.noise[block][step]

    def remember(self, given):
        for b, block in enumerate(given):
            self.finish(b, block)
        return list(given)

    def rolling(self, num_blocks, given=(), turn=lambda index, window: None):
        """The clip [B, F, H, W, C]; it begins with the given blocks, which no window touches.

        `turn` is called before every window, with {block: [B, f, H, W, C]} of what is under way.
        """
        steps, window, clip = len(self.t), {}, self.remember(given)
        for i in range(len(given), num_blocks + steps - 1):
            turn(i, window)
            ids = list(range(max(len(given), i - steps + 1), min(num_blocks - 1, i) + 1))
            if i < num_blocks:
                window[i] = self.noise[i][0]
            seen = denoise_past(ids[0], len(ids), self.config)
            x0, _ = self.x0([window[b] for b in ids], ids, [self.t[i - b] for b in ids], seen)
            for b, x in zip(ids, x0, strict=True):
                if i - b == steps - 1:
                    clip.append(x)
                    self.finish(b, x)
                    del window[b]
                else:
                    window[b] = self.renoise(x, b, i - b + 1)
        return np.concatenate(clip, 1)

    def self_forcing(self, num_blocks, given=(), turn=lambda index, window: None):
        """The clip [B, F, H, W, C]; it begins with the given blocks. `turn` is called before every other one."""
        clip = self.remember(given)
        for b in range(len(given), num_blocks):
            turn(b, {})
            x = self.noise[b][0]
            for step, t in enumerate(self.t):
                seen = denoise_past(b, 1, self.config)
                (x0,), _ = self.x0([x], [b], [t], seen)
                if step < len(self.t) - 1:
                    x = self.renoise(x0, b, step + 1)
            clip.append(x0)
            self.finish(b, x0)
        return np.concatenate(clip, 1)
