"""Is one pass over a finished block and the next window quicker than its clean call and the window's call, on the machine at hand?

    python benchmarks/fused_call.py [--config configs/shapes.py] [--size 64x64]

Both do the same work and give the same numbers (tests/test_fused_call.py); the largest difference is printed, then they take turns.
In the one pass the window sees the finished block's keys as this pass makes them, and each part has its own past: attention is in
two pieces.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rfjax import attention, config, rollout, sampler
from rfjax.bench import flags, parts, timing
from rfjax.cache import KVCache
from rfjax.dit import KV, Block, Past
from rfjax.errors import Parser, UserError, exit_cleanly

ROUNDS = 7


def apart(bound: rollout.Model, cache: KVCache, finished: Array, window: Array, index: Array):
    """Clean call on block index - S, then the call of rolling window `index`: (x0 of the window, the cache)."""
    cache = rollout.clean_call(bound, cache, index - bound.config.num_steps, finished, steady=True)
    x0 = rollout.window_call(bound, cache, window, index, jnp.int32(rollout.ENDLESS), steady=True)
    return x0, cache


def together(bound: rollout.Model, cache: KVCache, finished: Array, window: Array, index: Array):
    """The same in one pass over S + 1 blocks."""
    c, policy = bound.config, bound.policy
    block, f = index - c.num_steps, c.block_frames
    own = policy.read_clean(cache, block, f, True)
    theirs = policy.read_denoise(cache, block + 1, c.num_steps, f, True)  # its last block is the finished one
    slots = jnp.concatenate([own.slots, theirs.slots[:-1]])
    past = Past(cache.kv, slots, jnp.concatenate([own.positions, theirs.positions[:-f]]), None)
    x = rollout.flat(jnp.concatenate([finished[:, None], window], 1))
    t = jnp.concatenate([jnp.zeros(f), jnp.repeat(jnp.asarray(c.timesteps)[::-1], f)])
    positions = block * f + jnp.arange(t.size)
    with nn.intercept_methods(functools.partial(in_two, c.span_blocks - 1)):
        x0, kv = bound.x0(x, t, positions, past)
    tokens = kv.k.shape[2] // (c.num_steps + 1)
    cache = policy.write(cache, block, KV(*(a[:, :, :tokens] for a in kv)))
    return x0[:, f:].reshape(window.shape), cache


def in_two(seen: int, look, args, kwargs, context) -> Array:
    """Attention where the first block sees the past's first `seen` blocks and itself, the others the rest of the past and all."""
    if not (isinstance(context.module, Block) and context.method_name == "look"):
        return look(*args, **kwargs)
    q, own, past, scene = args
    n = past.k.shape[1] // scene.slots.size

    def attend(queries, old, new):
        kv = (jnp.concatenate([a[:, old], b[:, new]], 1) for a, b in zip(past, own, strict=True))
        return attention.attend(q[:, queries], *kv, None, context.module.config.attention)

    first, rest = slice(n), slice(n, None)
    pieces = [attend(first, slice(seen * n), first), attend(rest, slice(seen * n, None), slice(None))]
    return jnp.concatenate(pieces, 1)


def prepared(program, bound: rollout.Model, frame_shape: tuple[int, ...]):
    """f() → (x0, cache), compiled, in the middle of a stream; the cache is written in place."""
    state = parts.steady(bound, 1, frame_shape, "rolling")
    finished = jax.random.normal(jax.random.key(1), (1, *frame_shape))
    run = jax.jit(program, donate_argnums=1)

    def step(cache):
        x0, cache = run(bound, cache, finished, state.window, state.index)
        return cache, (x0, cache)

    return parts.chained(step, state.cache)


def difference(one: tuple[Array, KVCache], other: tuple[Array, KVCache]) -> float:
    """The largest of x0 and the cached keys and values."""
    each = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), (one[0], one[1].kv), (other[0], other[1].kv))
    return float(max(jax.tree.leaves(each)))


@exit_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default=str(flags.CONFIG))
    parser.add_argument("--size", metavar="WxH", help="of the video (default: config.video)")
    args, rest = parser.parse_known_args()
    settings = config.changed(config.load(args.config), rest)
    if args.size is not None:
        sampler.resize(settings, args.size)
    with config.read_by("fused_call.py", settings):
        caption = settings.prompt
    model = sampler.load(settings, sampler.RANDOM)
    if model.rollout.span_blocks == model.rollout.sink_blocks + model.rollout.num_steps:
        raise UserError(f"In {args.config} no window sees the block before it; give it a longer span_blocks.")
    bound = model.bind([caption])
    calls = [prepared(program, bound, model.frame_shape) for program in (apart, together)]
    print(f"largest difference {difference(*(call() for call in calls)):.1g}")
    taken = [[timing.summary(timing.timed(call))["median_s"] for call in calls] for _ in range(ROUNDS)]
    two, one = 1e3 * np.median(np.array(taken), 0)
    ratios = [first / second for first, second in taken]
    print(
        f"apart {two:.4g} ms, together {one:.4g} ms, ratio {np.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
