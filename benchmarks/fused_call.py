"""The most that one pass for a block's clean call and the next window could save, on the machine at hand.

    python benchmarks/fused_call.py [--config configs/shapes.py] [--size 64x64]

In turn: the steady window's call and the clean call after it, as a stream makes them; and one call on as many frames, of which each
sees as many keys. A pass that did the work of both would have to give the two parts keys of their own, which costs something.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rfjax import config, rollout, sampler
from rfjax.bench import flags, parts, timing
from rfjax.dit import Past
from rfjax.errors import Parser, exit_cleanly

ROUNDS = 7


def together(bound: rollout.Model, frame_shape: tuple[int, ...]):
    """f(): one call on the frames of the window and the clean block, which see one cached block besides."""
    c = bound.config
    state = parts.steady(bound, 1, frame_shape, "rolling")
    frames = (c.num_steps + 1) * c.block_frames
    past = c.span_blocks - c.num_steps - 1
    x = jax.random.normal(jax.random.key(0), (1, frames, *frame_shape[1:]))
    positions = jnp.arange(frames) + past * c.block_frames
    seen = Past(state.cache.kv, jnp.arange(past), jnp.arange(past * c.block_frames), None)
    run = jax.jit(lambda bound, *inputs: bound.x0(*inputs))
    return functools.partial(run, bound, x, jnp.full(frames, 500.0), positions, seen)


def apart(bound: rollout.Model, frame_shape: tuple[int, ...]):
    """f(): the two calls, one after the other."""
    calls = [make(bound, 1, frame_shape, "rolling") for make in (parts.window, parts.clean)]
    return lambda: [call() for call in calls]


@exit_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default=str(flags.CONFIG))
    parser.add_argument("--size", metavar="WxH", help="of the video (default: config.video)")
    args, rest = parser.parse_known_args()
    settings = config.changed(config.load(args.config), rest)
    if args.size is not None:
        sampler.resize(settings, args.size)
    model = sampler.load(settings, sampler.RANDOM)
    bound = model.bind([settings.prompt])
    calls = [make(bound, model.frame_shape) for make in (apart, together)]
    taken = [[timing.summary(timing.timed(call))["median_s"] for call in calls] for _ in range(ROUNDS)]
    two, one = 1e3 * np.median(np.array(taken), 0)
    ratios = [first / second for first, second in taken]
    print(
        f"apart {two:.4g} ms, together {one:.4g} ms, ratio {np.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
