"""Rollouts with gradient against the method run literally, in NumPy: no padding, no stash."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax import dit, rollout, training_rollout
from rfjax.dit import KV

FRAME = (2, 2, 2, 2)  # (f, H, W, C): one token of 8 values a frame
BATCH = 2
TWO = rollout.RolloutConfig(steps=(1000, 500), block_frames=2, ring_blocks=4, span_blocks=4)
CONFIGS = {
    "2 steps": TWO,
    "5 steps": rollout.RolloutConfig(block_frames=2, ring_blocks=6, span_blocks=6),
    "no sink": dataclasses.replace(TWO, sink_blocks=0),
    "sink of 2": dataclasses.replace(TWO, sink_blocks=2),
}
LENGTHS = {
    2: (1, 3, 4, 6, 7),
    5: (3, 6, 8, 9),
}  # blocks of a clip: shorter than the window, than the span, longer


class Network:
    """One attention head that feels its inputs, their times, distances, text and past, in few operations."""

    config = dit.DiTConfig(dim=4, ffn_dim=1, num_heads=1, num_layers=1, text_dim=1, text_len=3, in_dim=2)

    def apply(self, variables, x, t, text_kv, positions, past=None, mask=None):
        p, frames = variables["params"], x.shape[1]
        tokens = x.reshape(x.shape[0], frames, -1) + t[..., None] / 1000 * p["time"][None, None]
        q, k, v = (tokens @ p[name] for name in "qkv")
        kv = KV(k[None, :, :, None], v[None, :, :, None])
        seen = jnp.ones((frames, frames), bool) if mask is None else mask
        places = positions
        if past is not None:
            before = dit.seen(past.kv, past.slots)
            k = jnp.concatenate([before.k[0, :, :, 0], k], 1)
            v = jnp.concatenate([before.v[0, :, :, 0], v], 1)
            places = jnp.concatenate([past.positions, positions])
            valid = jnp.ones(past.positions.shape, bool) if past.valid is None else past.valid
            seen = jnp.concatenate([jnp.broadcast_to(valid[None], (len(seen), valid.size)), seen], 1)
        distance = (positions[:, None] - places[None]).astype(jnp.float32)
        scores = jnp.einsum("bqk,bmk->bqm", q, k) + jnp.sin(0.7 * distance)[None]
        weights = jax.nn.softmax(jnp.where(seen[None], scores, -jnp.inf))
        text = text_kv.k.mean((0, 2, 3)) * text_kv.v.mean((0, 2, 3))
        out = (weights @ v + text[:, None]) @ p["o"] - 0.3 * tokens
        return jnp.tanh(out).reshape(x.shape), kv


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


WEIGHTS = (
    {
        "time": normal(0, 8),
        "q": 0.5 * normal(1, 8, 4),
        "k": 0.5 * normal(2, 8, 4),
        "v": normal(3, 8, 4),
        "o": 0.5 * normal(4, 4, 8),
    },
    KV(normal(5, 1, BATCH, 3, 1, 4), normal(6, 1, BATCH, 3, 1, 4)),
)


def lengths(config):
    return LENGTHS[config.num_steps]


def noise_of(config):
    return normal(7, BATCH, lengths(config)[-1], config.num_steps, *FRAME)


def cotangent_of(config):
    """What the loss does with every frame, so that no two of them count alike."""
    return normal(8, BATCH, lengths(config)[-1] * FRAME[0], *FRAME[1:])


def attend(weights, x, sigma, ids, seen):
    """x0 and keys of blocks `ids` by the same network; `seen` are clean keys, [(first position, kv)]."""
    p, text = weights
    f = FRAME[0]
    tokens = np.concatenate([block.reshape(BATCH, f, -1) for block in x], 1)
    levels = np.repeat(sigma, f)
    felt = tokens + levels[None, :, None] * p["time"]
    own = [
        (b * f, (felt[:, i * f : i * f + f] @ p["k"], felt[:, i * f : i * f + f] @ p["v"]))
        for i, b in enumerate(ids)
    ]
    k, v = (np.concatenate([kv[i] for _, kv in seen + own], 1) for i in (0, 1))
    places = np.array([first + j for first, _ in seen + own for j in range(f)])
    here = np.array([b * f + j for b in ids for j in range(f)])
    scores = (felt @ p["q"]) @ k.swapaxes(1, 2) + np.sin(0.7 * (here[:, None] - places))
    weight = np.exp(scores)
    mean = (
        weight / weight.sum(-1, keepdims=True) @ v
        + (text.k.mean((0, 2, 3)) * text.v.mean((0, 2, 3)))[:, None]
    )
    flow = np.tanh(mean @ p["o"] - 0.3 * felt)
    x0 = tokens - levels[None, :, None] * flow
    return [part.reshape(BATCH, *FRAME) for part in np.split(x0, len(ids), 1)], [kv for _, kv in own]


class Literal:
    """Blocks, windows and clean keys in lists; every key is kept, and each call is shown what it may see.

    Float64, with derivatives by complex steps: weights are w + i·h·direction, and a constant is a real part.
    """

    def __init__(self, config, weights):
        self.config, self.steps = config, config.num_steps
        self.noise = np.asarray(noise_of(config), np.float64)
        self.sigmas = [5 * n / 1000 / (1 + 4 * n / 1000) for n in self.config.steps]
        self.weights, self.frozen = weights, jax.tree.map(np.real, weights)
        self.clean = []  # (keys, values) of every finished block

    def window(self, x, ids, steps, trained):
        """x0 of blocks `ids`. They see the sink, placed just before the newest that the span has room for."""
        f, a, sinks = self.config.block_frames, ids[0], self.config.sink_blocks
        room = self.config.span_blocks - len(ids) - sinks
        recent = list(range(sinks, a))[-room:] if room else []
        first = a - len(recent) - min(sinks, a)
        sink = [((first + b) * f, self.clean[b]) for b in range(min(sinks, a))]
        seen = sink + [(b * f, self.clean[b]) for b in recent]
        weights = self.weights if trained else self.frozen
        return attend(weights, [x[b] for b in ids], [self.sigmas[k] for k in steps], ids, seen)[0]

    def finish(self, block, x0):
        """Clean call: sees the last span of frames, its own included, at true positions."""
        earlier = range(max(0, block - self.config.span_blocks + 1), block)
        seen = [(b * self.config.block_frames, self.clean[b]) for b in earlier]
        self.clean += attend(self.frozen, [x0.real], [0.0], [block], seen)[1]

    def renoise(self, x0, block, step):
        return (1 - self.sigmas[step]) * x0.real + self.sigmas[step] * self.noise[:, block, step]

    def rolling(self, exit_step, n):
        """Every block's x0."""
        x, out, covered = {}, {}, []
        for i in range(n + self.steps - 1):
            a, z = max(0, i - self.steps + 1), min(n - 1, i)
            if i < n:
                x[i] = self.noise[:, i, 0]
            ids, on = list(range(a, z + 1)), i % self.steps == exit_step
            trained = on and z + 1 > n - self.config.span_blocks
            x0s = dict(zip(ids, self.window(x, ids, [i - b for b in ids], trained), strict=True))
            if on:
                covered += ids
                out |= x0s
            for b, x0 in x0s.items():
                if i - b < self.steps - 1:
                    x[b] = self.renoise(x0, b, i - b + 1)
                else:
                    self.finish(b, x0)
        assert sorted(covered) == list(range(n))  # every block once
        return out

    def self_forcing(self, exit_step, n):
        """Every block's x0."""
        out = {}
        for b in range(n):
            x = {b: self.noise[:, b, 0]}
            for step in range(exit_step + 1):
                trained = step == exit_step and b + 1 > n - self.config.span_blocks
                (out[b],) = self.window(x, [b], [step], trained)
                if step < exit_step:
                    x[b] = self.renoise(out[b], b, step + 1)
            self.finish(b, out[b])
        return out


def literal(config, method, exit_step, n, weights):
    """The clip [B, n·f, H, W, C]."""
    out = getattr(Literal(config, weights), method)(exit_step, n)
    return np.concatenate([out[b] for b in range(n)], 1)


def derivative(config, method, exit_step, n, leaf, direction):
    """Of Σ cotangent · clip when one leaf of the weights moves along a direction."""
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda w: np.asarray(w, np.float64), WEIGHTS))
    leaves[leaf] = leaves[leaf] + 1e-30j * direction
    clip = literal(config, method, exit_step, n, jax.tree.unflatten(structure, leaves))
    return (clip.imag * cotangent_of(config)[:, : clip.shape[1]]).sum() / 1e-30


def compiled(config, method):
    """f(exit_step, n) → (constant clip, clip, gradient), and how often it was traced."""
    traces = []

    def model(weights):
        return rollout.Model(Network(), *weights, config)

    def run(weights, noise, cotangent, exit_step, n):
        traces.append(method)
        draw, most = rollout.array_noise(noise), lengths(config)[-1]
        plan = training_rollout.Plan(draw, exit_step, n, most, BATCH, FRAME)

        def total(weights):
            clip = training_rollout.gradient_rollout(model(weights), method, plan)
            inside = jnp.arange(clip.shape[1]) < n * FRAME[0]
            return jnp.where(inside.reshape(1, -1, 1, 1, 1), clip * cotangent, 0.0).sum(), clip

        (_, clip), gradient = jax.value_and_grad(total, has_aux=True)(weights)
        return training_rollout.constant_rollout(model(weights), method, plan), clip, gradient

    run = jax.jit(run)
    call = functools.partial(run, WEIGHTS, noise_of(config), cotangent_of(config))
    return lambda exit_step, n: call(np.int32(exit_step), np.int32(n)), traces


@pytest.mark.parametrize("method", ["rolling", "self_forcing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_program_gives_the_literal_clips_and_gradients_of_every_exit_step_and_length(name, method):
    config = CONFIGS[name]
    run, traces = compiled(config, method)
    for n in lengths(config):
        for exit_step in range(config.num_steps):
            where = f"{n} blocks, exit step {exit_step}"
            constant, clip, gradient = jax.device_get(run(exit_step, n))
            constant, clip = constant[:, : n * FRAME[0]], clip[:, : n * FRAME[0]]
            wanted = literal(config, method, exit_step, n, jax.tree.map(np.float64, WEIGHTS))
            np.testing.assert_allclose(clip, wanted, atol=3e-5, err_msg=where)
            np.testing.assert_allclose(constant, wanted, atol=3e-5, err_msg=where)
            for leaf, got in enumerate(jax.tree.leaves(gradient)):
                direction = normal(9 + leaf, *got.shape)
                slope = derivative(config, method, exit_step, n, leaf, direction)
                assert abs(slope) > 1e-3, f"{where}: nothing to compare"
                np.testing.assert_allclose(
                    (got * direction).sum(), slope, rtol=1e-3, atol=2e-4, err_msg=where
                )
    assert len(traces) == 1


@pytest.mark.parametrize("scored, last", [(0, 4), (3, 3)])
def test_blocks_that_end_before_the_scored_ones_carry_no_gradient(scored, last):
    """With Self Forcing every block is its own call: exactly the scored blocks train, by default those of the span."""
    noise, most = jnp.asarray(noise_of(TWO)), lengths(TWO)[-1]

    @jax.jit
    def sensitivity(text_kv):
        def clip(text_kv):
            model = rollout.Model(Network(), WEIGHTS[0], text_kv, TWO)
            draw = rollout.array_noise(noise)
            plan = training_rollout.Plan(draw, np.int32(1), np.int32(most), most, BATCH, FRAME, scored)
            return training_rollout.gradient_rollout(model, "self_forcing", plan)

        direction = jax.tree.map(jnp.ones_like, text_kv)
        return jax.jvp(clip, (text_kv,), (direction,))[1]

    moved = np.abs(np.asarray(sensitivity(WEIGHTS[1]))).reshape(BATCH, most, -1).max((0, 2)) > 0
    assert list(moved) == [False] * (most - last) + [True] * last
