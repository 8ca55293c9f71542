"""A new prompt in a running stream: what becomes of the blocks under way, and of what the cache remembers.

At that moment the window holds half-denoised blocks, and the cache keys of finished ones, all made under the old prompt. A
`Change` says what is done about them, in three parts that may be combined:

- renoise: the m noisiest blocks of the window are made anew from their noise;
- recache: the clean calls of the cached blocks are run again, of those in the ring alone or of the sink's too;
- fade: text keys and values go over from the old prompt's to the new one's in k steps, a step being a block of a stream.

With none of them the new text keys hold from the next step on, and all else stays as it is. docs/live.md says what each does
to a video.
"""

import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rfjax import rollout
from rfjax.dit import KV
from rfjax.errors import UserError
from rfjax.rollout import Model, NoiseFn, RolloutState

DEFAULT = "keep"
WORDS = "keep, renoise:M, recache, recache:sink, crossfade:K, or several joined by +"
_PART = re.compile(r"(keep)|(recache)(:sink)?|(?:renoise:(\d{1,3}))|(?:crossfade:(\d{1,3}))")


@dataclasses.dataclass(frozen=True)
class Change:
    """What a new prompt does to a stream."""

    renoise: int = 0  # blocks of the window, the noisiest, that are made anew
    recache: bool = False  # whether cached blocks are run again,
    sink: bool = False  # and the sink's too
    fade: int = 1  # steps in which the text keys go over

    def texts(self, old: KV, new: KV) -> Iterator[KV]:
        """Text keys and values of the steps to come; the last are the new prompt's, and stay."""
        for left in range(self.fade, 1, -1):
            old = _mix(old, new, np.float32(1 / left))
            yield old
        yield new

    def rewritten(self, sink_blocks: int) -> np.int32:
        """The first block that is run again where cached ones are."""
        return np.int32(0 if self.sink else sink_blocks)


def parse(words: str) -> Change:
    """Words such as renoise:4+recache → Change; UserError for what is none."""
    change = Change()
    for word in words.split("+"):
        match = _PART.fullmatch(word)
        keep, recached, sink, renoised, fade = match.groups() if match else (None,) * 5
        if recached:
            change = dataclasses.replace(change, recache=True, sink=bool(sink))
        elif renoised and int(renoised):
            change = dataclasses.replace(change, renoise=int(renoised))
        elif fade and int(fade):
            change = dataclasses.replace(change, fade=int(fade))
        elif not keep:
            raise UserError(f"{words!r} is no way to change a prompt; give {WORDS}.")
    return change


@jax.jit
def _mix(old: KV, new: KV, share: Array) -> KV:
    """The old, and a share of the way to the new."""

    def mix(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return a + share * (b - a)

    return jax.tree.map(lambda a, b: mix(a, b).astype(a.dtype), old, new)


def recache(model: Model, state: RolloutState, first: Array | int) -> RolloutState:
    """The cached blocks from `first` on once more through their clean calls, oldest first, under the model's text.

    A block sees those before it that are still in the cache, as they are by then. The state needs their x0 (`rollout.recalling`).
    """
    blocks = state.cache.block
    order = jnp.argsort(blocks)  # empty slots, which are -1, come first

    def rewrite(place, cache):
        slot = order[place]
        x0 = jax.lax.dynamic_index_in_dim(state.clean, slot, axis=1, keepdims=False)
        return rollout.clean_call(model, cache, blocks[slot], x0, steady=False)

    stays = (blocks < jnp.maximum(first, 0)).sum()
    return state.replace(cache=jax.lax.fori_loop(stays, blocks.size, rewrite, state.cache))


def renoise(
    model: Model, noise: NoiseFn, num_blocks: Array, state: RolloutState, count: Array | int
) -> RolloutState:
    """The newest `count` blocks of the window (of those in it) made anew, from the noise that they began with.

    They enter one after another, as at a clip's start, which takes as many calls of the network; the older blocks wait at their
    levels meanwhile and are seen. After it each is at its level again. Self Forcing has nothing under way: there it does nothing.
    """
    steps = model.config.num_steps
    if state.window.shape[1] != steps:
        return state
    first = rollout.oldest(model.config, state.index, state.given)
    blocks = first + jnp.arange(steps)
    begin = jnp.maximum(jnp.minimum(state.index, num_blocks) - count, first)  # at a clip's end nothing enters

    def replay(position, window):  # rolling window `position`, begin … index - 1
        window = window.at[:, position - first].set(noise(position, jnp.int32(0)))
        step = jnp.where(blocks < begin, state.index, position) - blocks
        inside = (blocks <= position) & (blocks < num_blocks)
        x0 = rollout.denoise(
            model, state.cache, window, blocks, jnp.clip(step, 0, steps - 1), inside, steady=False
        )
        anew = (blocks >= begin) & inside
        down = rollout.noised(model, noise, x0, blocks, jnp.clip(step + 1, 0, steps - 1))
        return jnp.where(anew[None, :, None, None, None, None], down, window)

    return state.replace(window=jax.lax.fori_loop(begin, state.index, replay, state.window))
