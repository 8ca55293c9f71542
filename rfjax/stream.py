"""A stream without end that can be talked to: one compiled step, a state of constant size, and new prompts on the way."""

import functools
from collections.abc import Iterable

import jax
import ml_collections
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rfjax import axes, rollout
from rfjax.change import Change, recache, renoise
from rfjax.dit import KV
from rfjax.errors import UserError
from rfjax.rollout import ENDLESS, METHODS, Model, RolloutState


def method_of(settings: ml_collections.ConfigDict, asked: str | None = None) -> str:
    """The method that is asked for, else the config's, else "rolling"; UserError where the config's is none."""
    name = asked or settings.get("method", "rolling")
    if name not in METHODS:
        raise UserError(f"config.method is {name!r}; it must be {' or '.join(METHODS)}.")
    return name


class Stream:
    """Finished blocks [B, f, H, W, C], one by one: an iterator.

    Every block comes from the same compiled step and the same constant-size state, so memory does not grow. Blocks are
    dispatched asynchronously: nothing waits for the device until the caller looks (on GPUs, by XLA's sources, a step's branch waits
    for the step before). To pause is to take no block. Between two blocks `change` gives new prompts, `reset` begins anew, and
    `close` frees the state; then there are no more blocks.

    Args:
      model: bound to one prompt a clip.
      keys: [B], the samples' random keys.
      frame_shape: (f, H, W, C).
      method: a name of `rollout.METHODS`.
      num_blocks: where the clip stops; by default nowhere.
      given: clean blocks that the clip begins with; they come out first, as they are.
      recall: whether to keep the x0 of cached blocks, which a change that recaches needs.
      mesh: devices (`rfjax/axes.py`) over which clips are split, and tokens and heads of each; weights and prompts are there.
    """

    def __init__(
        self,
        model: Model,
        keys: Array,
        frame_shape: tuple[int, ...],
        method: str = "rolling",
        num_blocks: int = ENDLESS,
        given: Iterable[Array] = (),
        recall: bool = False,
        mesh: Mesh | None = None,
    ):
        self.model, self._texts, self._mesh = model, iter(()), mesh
        self._method, self._frame_shape, self._recall = method, frame_shape, recall
        self._num_blocks = np.int32(num_blocks)
        self._begin(keys, given)

    def _begin(self, keys: Array, given: Iterable[Array]) -> None:
        self.state = None  # there is not always room for two
        with axes.on(self._mesh):
            self.state = begin(self.model, self._method, keys.shape[0], self._frame_shape, self._recall)
        self._keys, self._given = keys, iter(given)
        self._shown, self._lead = 0, METHODS[self._method].lead(self.model.config)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Array:
        if self._shown >= self._num_blocks:
            raise StopIteration
        block = next(self._given, None)
        with axes.on(self._mesh):
            if block is not None:
                self.state = remember(self.model, self.state, block)
            else:
                for _ in range(self._lead + 1):
                    block = self._step()
                self._lead = 0
        self._shown += 1
        return block

    def _step(self) -> Array:
        self.state, block = stream_step(self.model, self._method, self._keys, self._num_blocks, self.state)
        self.model = self.model.replace(text_kv=next(self._texts, self.model.text_kv))
        return block

    def change(self, text_kv: KV, change: Change) -> None:
        """New prompts, one a clip (`Sampler.bind(…).text_kv`), for all blocks that are taken from now on.

        ValueError where the change recaches, and the stream does not recall, or where the stream is closed.
        """
        if self.state is None:
            raise ValueError("the stream is closed; make another one")
        if change.recache and self.state.clean is None:
            raise ValueError("a stream must be opened with recall=True to recache under a new prompt")
        self._texts = change.texts(self.model.text_kv, text_kv)
        with axes.on(self._mesh):
            self.model = self.model.replace(text_kv=next(self._texts))
            if change.recache:
                first = change.rewritten(self.model.config.sink_blocks)
                self.state = _recache(self.model, self.state, first)
            if change.renoise:
                count = np.int32(change.renoise)
                self.state = _renoise(self.model, self._keys, self._num_blocks, self.state, count)

    def reset(self, keys: Array) -> None:
        """Begins anew with these keys [B], from nothing, under the prompts that it was given last."""
        *_, text_kv = self.model.text_kv, *self._texts
        self.model = self.model.replace(text_kv=text_kv)
        self._begin(keys, ())

    def close(self) -> None:
        """Frees the state; there are no more blocks."""
        self.state, self._given, self._shown = None, iter(()), self._num_blocks


@functools.partial(jax.jit, static_argnames="method", donate_argnames="state")
def stream_step(
    model: Model, method: str, keys: Array, num_blocks: Array, state: RolloutState
) -> tuple[RolloutState, Array]:
    """One compiled step of a stream with noise by position; `state` is donated."""
    noise = rollout.position_noise(keys, state.window.shape[2:])
    state, block = METHODS[method].step(model, noise, num_blocks, state)
    return _kept(state), axes.constrain(block, "batch")


def _kept(state: RolloutState) -> RolloutState:
    """On a mesh, the state where its first one was, so that the next step is the same program; the cache sees to itself."""
    clean = None if state.clean is None else axes.constrain(state.clean, "batch")
    return state.replace(window=axes.constrain(state.window, "batch"), clean=clean)


@functools.partial(jax.jit, static_argnames=("method", "batch", "frame_shape", "recall"))
def begin(
    model: Model, method: str, batch: int, frame_shape: tuple[int, ...], recall: bool = False
) -> RolloutState:
    """A stream's state before anything, with room for the x0 of cached blocks if it shall `recall`; frame_shape = (f, H, W, C)."""
    state = METHODS[method].init(model, batch, frame_shape)
    return _kept(rollout.recalling(state) if recall else state)


@functools.partial(jax.jit, donate_argnames="state")
def remember(model: Model, state: RolloutState, x0: Array) -> RolloutState:
    """A state before its first step, with one more given block x0 [B, f, H, W, C] in its cache; `state` is donated."""
    cache, clean = rollout.clean_call(model, state.cache, state.index, x0, steady=False), state.clean
    state = state.replace(cache=cache, clean=rollout.recall(clean, cache, state.index, x0))
    return _kept(state.replace(index=state.index + 1, given=state.given + 1))


@functools.partial(jax.jit, donate_argnames="state")
def _recache(model: Model, state: RolloutState, first: Array) -> RolloutState:
    return _kept(recache(model, state, first))


@functools.partial(jax.jit, donate_argnames="state")
def _renoise(model: Model, keys: Array, num_blocks: Array, state: RolloutState, count: Array) -> RolloutState:
    noise = rollout.position_noise(keys, state.window.shape[2:])
    return _kept(renoise(model, noise, num_blocks, state, count))
