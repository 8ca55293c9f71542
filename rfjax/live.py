"""Video that can be talked to: one stream of frames, or several on one accelerator.

    with Stream(sampler, ["a large red circle bouncing over a blue background"], seed=7) as stream:
        frames = next(stream)  # uint8 [1, m, H, W, 3]
        stream.change(["a large green circle bouncing over a blue background"])

Streams with a prompt, a seed and a time of their own are stepped together in one batch:

    live = Live(sampler, limit=4)
    live.warm()
    slot = live.join("a large red circle bouncing over a blue background", seed=7)
    for _ in range(100):
        frames = live.step([slot]).get(slot)  # uint8 [m, H, W, 3]; none until the first window is full
    live.change(slot, "a large green circle bouncing over a blue background")

What a stream carries lies in its slot of arrays [limit, …] on the device. There is one program for each batch size 1, 2, 4, …,
limit: it gathers the slots that shall step, runs the rolling step of one clip on each (`jax.vmap`, as every slot has its own block
index), and writes them back in place. The host knows how far each slot is, so it picks the program of the steady state when all
chosen slots are in it, and the masked one otherwise. Batches are filled up with a slot whose second result is thrown away. So
memory does not grow, and nothing compiles after `warm`.

A slot's video is that of the same prompt and seed streamed alone (`Sampler.latents`), but for sums that another batch size takes in
another order.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from rfjax import placement, rollout
from rfjax.change import DEFAULT, Change, parse, recache, renoise
from rfjax.dit import KV
from rfjax.errors import UserError
from rfjax.rollout import ENDLESS, Model, RolloutState
from rfjax.sampler import Sampler, clip_keys, decode_block, fetched
from rfjax.stream import begin

ANY = "a"  # a prompt that every encoder reads


class Full(UserError):
    """No slot is free."""


class Stream:
    """Clips of one prompt each that go on without end, together: an iterator of their next frames, uint8 [B, m, H, W, 3].

    m is 1 + 4 (f - 1) at first and after a reset, else 4 f. Frames are made when they are taken: to pause is to take none,
    and what is said holds for all from then on. It lies over `rfjax.stream.Stream`, on whichever devices the sampler is.

    Args:
      prompts: one a clip.
      seed: another one gives other clips.
      method: a name of `rollout.METHODS`; default: the sampler's.

    Raises:
      UserError: a bad prompt or seed, or no prompt.
    """

    def __init__(self, sampler: Sampler, prompts: list[str], seed: int = 0, method: str | None = None):
        if isinstance(prompts, str) or not prompts:
            raise UserError(f"Give a list of prompts, one a clip, not {prompts!r}.")
        self._sampler, self._clips = sampler.listening(), len(prompts)
        endless = int(ENDLESS) * sampler.rollout.block_frames
        self._blocks = self._sampler.latents(prompts, seed, endless, method, recall=True)
        self._frames = self._sampler.frames(self._blocks)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> np.ndarray:
        try:
            return fetched(next(self._frames))
        except StopIteration:
            raise
        except BaseException:  # such as Ctrl-C: a block is lost, and what comes after it would not join
            self.close()
            raise

    def change(self, prompts: list[str], policy: str = DEFAULT) -> None:
        """New prompts, one a clip, see `rfjax.change.parse`. UserError for a bad one or a bad policy; nothing is changed then."""
        self._check_open()
        how = parse(policy)
        if isinstance(prompts, str) or len(prompts) != self._clips:
            raise UserError(f"Give a list of {self._clips} prompts, one a clip, not {prompts!r}.")
        self._blocks.change(self._sampler.bind(prompts).text_kv, how)

    def reset(self, seed: int) -> None:
        """From nothing, under the prompts given last; UserError for a seed outside 0 … 2^32 - 1."""
        self._check_open()
        self._blocks.reset(clip_keys(seed, self._clips))
        self._frames = self._sampler.frames(self._blocks)

    def close(self) -> None:
        """Frees the device's memory; there are no more frames."""
        self._blocks.close()
        self._frames.close()

    def _check_open(self) -> None:
        if self._blocks.state is None:
            raise UserError("The stream is closed; make another one.")

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error) -> None:
        self.close()


@struct.dataclass
class Shelf:
    """What the streams carry, each in its slot [limit, …]."""

    state: RolloutState  # of batch 1 each
    block: Array  # [limit, 1, f, h, w, C] finished last
    decoder: Any  # [limit, …]


@dataclasses.dataclass
class Place:
    """What the host knows of a slot that is taken."""

    key: np.ndarray  # [1, 2]
    text_kv: KV  # [L, 1, text_len, A, K]
    coming: Iterator[KV]  # text keys of the steps to come, while prompts fade
    steps: int = 0  # steps so far: the index of its next window


class Live:
    """Up to `limit` streams. To be used from one thread.

    Args:
      sampler: what makes video of prompts; its rolling method is used, and one device.
      limit: how many streams there is room for.
      policy: what a new prompt does to a stream where `change` does not say, see `rfjax.change.parse`.

    Raises:
      UserError: a policy that is none, a limit under 1, or a sampler that is spread over devices.
    """

    def __init__(self, sampler: Sampler, limit: int, policy: str = DEFAULT):
        if limit < 1:
            raise UserError(f"There must be room for one stream at least, not {limit}.")
        if sampler.where != placement.HERE:
            raise UserError("Streams in one batch share one device; give a sampler that is not over several.")
        self.sampler = sampler = sampler.listening()
        self.limit, self._change = limit, parse(policy)
        self._model = Model(sampler.dit, sampler.params["dit"], None, sampler.rollout)
        self._places: list[Place | None] = [None] * limit
        self._sizes = [*(2**n for n in range((limit - 1).bit_length())), limit]
        self._shelf = _empty(sampler, self._model, limit)

    def warm(self) -> None:
        """Compiles every program, by running it on empty slots; before the first stream joins."""
        if any(self._places):
            raise ValueError("warm up before the first stream joins")
        place = self._places[0] = self._place(ANY, 0)
        for size in self._sizes:
            slots = [0] * size
            for steady in (False, True):
                self._run(slots, steady)
            self._decode(slots)
        self._decode_first(0)
        self._adapt(0, Change(renoise=1, recache=True))
        list(Change(fade=2).texts(place.text_kv, place.text_kv))
        self.leave(0)
        self._shelf = _begin(self._model, self._shelf, np.int32(0))

    def join(self, prompt: str, seed: int) -> int:
        """A slot for a new stream.

        Raises:
          UserError: a bad prompt, or a seed outside 0 … 2^32 - 1. Full: no slot is free.
        """
        place = self._place(prompt, seed)
        if None not in self._places:
            raise Full(f"All {self.limit} places are taken; come back when one is free.")
        slot = self._places.index(None)
        self._places[slot] = place
        self._shelf = _begin(self._model, self._shelf, np.int32(slot))
        return slot

    def leave(self, slot: int) -> None:
        """Frees a slot."""
        self._taken(slot)
        self._places[slot] = None

    def change(self, slot: int, prompt: str, policy: str | None = None) -> None:
        """A new prompt, from the slot's next step on. UserError for a bad prompt or policy; nothing is changed then."""
        how = self._change if policy is None else parse(policy)
        place, text_kv = self._taken(slot), self._text_kv(prompt)
        place.coming = how.texts(place.text_kv, text_kv)
        place.text_kv = next(place.coming)
        self._adapt(slot, how)

    def restart(self, slot: int, seed: int) -> None:
        """From nothing, under the prompt that it was given last; UserError for a seed outside 0 … 2^32 - 1."""
        place, key = self._taken(slot), np.asarray(clip_keys(seed, 1))
        *_, place.text_kv = place.text_kv, *place.coming
        place.key, place.steps = key, 0
        self._shelf = _begin(self._model, self._shelf, np.int32(slot))

    def step(self, slots: Collection[int]) -> dict[int, np.ndarray]:
        """One rolling step of these slots alone: the next uint8 frames [m, H, W, 3] of each; all others pause.

        A slot is left out until its first window is full: for its first S - 1 steps, S being the denoising steps. Its first frames
        are 1 + 4 (f - 1), later ones 4 f.
        """
        chosen = sorted(set(slots))
        places = [self._taken(slot) for slot in chosen]
        if not chosen:
            return {}
        roll = self.sampler.rollout
        steady = all(place.steps - roll.num_steps + 1 >= roll.span_blocks for place in places)
        self._run(self._filled(chosen), steady)
        for place in places:
            place.steps += 1
            place.text_kv = next(place.coming, place.text_kv)
        first = [slot for slot, place in zip(chosen, places, strict=True) if place.steps == roll.num_steps]
        later = [slot for slot, place in zip(chosen, places, strict=True) if place.steps > roll.num_steps]
        frames = {slot: self._decode_first(slot) for slot in first}
        if later:
            batch = self._decode(self._filled(later))
            frames |= {slot: batch[lane : lane + 1] for lane, slot in enumerate(later)}
        return {slot: np.asarray(frames[slot])[0] for slot in sorted(frames)}

    def _taken(self, slot: int) -> Place:
        place = self._places[slot]
        if place is None:
            raise ValueError(f"nobody has slot {slot}")
        return place

    def _place(self, prompt: str, seed: int) -> Place:
        return Place(np.asarray(clip_keys(seed, 1)), self._text_kv(prompt), iter(()))

    def _text_kv(self, prompt: str) -> KV:
        return self.sampler.bind([prompt]).text_kv

    def _filled(self, slots: list[int]) -> list[int]:
        """As many as a program takes: the first one again and again."""
        return slots + slots[:1] * (min(size for size in self._sizes if size >= len(slots)) - len(slots))

    def _run(self, slots: list[int], steady: bool) -> None:
        places = [self._places[slot] for slot in slots]
        texts, keys = [place.text_kv for place in places], np.stack([place.key for place in places])
        self._shelf = _advance(self._model, texts, keys, self._shelf, np.array(slots, np.int32), steady)

    def _decode(self, slots: list[int]) -> np.ndarray:
        decoder, params = self.sampler.decoder, self.sampler.decoder_params
        frames, self._shelf = _later_frames(decoder, params, self._shelf, np.array(slots, np.int32))
        return np.asarray(frames)

    def _decode_first(self, slot: int) -> Array:
        decoder, params = self.sampler.decoder, self.sampler.decoder_params
        frames, self._shelf = _first_frames(decoder, params, self._shelf, np.int32(slot))
        return frames

    def _adapt(self, slot: int, how: Change) -> None:
        place = self._places[slot]
        model = self._model.replace(text_kv=place.text_kv)
        if how.recache:
            first = how.rewritten(self.sampler.rollout.sink_blocks)
            self._shelf = _recache(model, self._shelf, np.int32(slot), first)
        if how.renoise:
            self._shelf = _renoise(model, place.key, self._shelf, np.int32(slot), np.int32(how.renoise))


def _empty(sampler: Sampler, model: Model, limit: int) -> Shelf:
    """A shelf of zeros; `_begin` makes a slot ready."""
    block = jax.ShapeDtypeStruct((1, *sampler.frame_shape), jnp.float32)
    state = jax.eval_shape(functools.partial(_fresh, model, sampler.frame_shape))
    _, past = jax.eval_shape(
        functools.partial(decode_block, sampler.decoder), sampler.decoder_params, block, None
    )
    decoder = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), past)
    return jax.tree.map(
        lambda leaf: jnp.zeros((limit, *leaf.shape), leaf.dtype), Shelf(state, block, decoder)
    )


def _fresh(model: Model, frame_shape: tuple[int, ...]) -> RolloutState:
    return begin(model, "rolling", 1, frame_shape, recall=True)


def _rows(tree: Any, slots: Array) -> Any:
    """[limit, …] → [n, …]."""
    return jax.tree.map(lambda a: jnp.take(a, slots, axis=0, mode="clip"), tree)


def _row(tree: Any, slot: Array) -> Any:
    """[limit, …] → […]."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, slot, keepdims=False), tree)


def _put(tree: Any, row: Any, slot: Array) -> Any:
    """The tree [limit, …] with this row […] in its slot, in place where it is donated."""
    return jax.tree.map(lambda a, x: jax.lax.dynamic_update_index_in_dim(a, x, slot, axis=0), tree, row)


def _put_all(tree: Any, rows: Any, slots: Array) -> Any:
    """The tree [limit, …] with rows [n, …]; of rows for the same slot the first stays."""
    for lane in reversed(range(slots.size)):
        tree = _put(tree, jax.tree.map(lambda a, lane=lane: a[lane], rows), slots[lane])
    return tree


@functools.partial(jax.jit, donate_argnames="shelf")
def _begin(model: Model, shelf: Shelf, slot: Array) -> Shelf:
    """The slot as before a stream's first step."""
    return shelf.replace(state=_put(shelf.state, _fresh(model, shelf.block.shape[2:]), slot))


@functools.partial(jax.jit, static_argnames="steady", donate_argnames="shelf")
def _advance(model: Model, texts: list[KV], keys: Array, shelf: Shelf, slots: Array, steady: bool) -> Shelf:
    """A rolling step of slots [n], their text keys and random keys [n, 1, 2]; what each finishes goes to `shelf.block`."""

    def step(state, text_kv, key):
        noise = rollout.position_noise(key, shelf.block.shape[2:])
        bound = model.replace(text_kv=text_kv)
        return rollout.METHODS["rolling"].step(bound, noise, ENDLESS, state, steady)

    texts = jax.tree.map(lambda *a: jnp.stack(a), *texts)
    rows = jax.vmap(step)(_rows(shelf.state, slots), texts, keys)
    state, block = _put_all((shelf.state, shelf.block), rows, slots)
    return shelf.replace(state=state, block=block)


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="shelf")
def _first_frames(decoder, params, shelf: Shelf, slot: Array) -> tuple[Array, Shelf]:
    """A clip's first frames, uint8 [1, m, H, W, 3], of the block that the slot finished."""
    frames, past = decode_block(decoder, params, _row(shelf.block, slot), None)
    past = jax.tree.map(lambda a: a[0], past)
    return frames, shelf.replace(decoder=_put(shelf.decoder, past, slot))


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="shelf")
def _later_frames(decoder, params, shelf: Shelf, slots: Array) -> tuple[Array, Shelf]:
    """Their next frames, uint8 [n, m, H, W, 3], of the blocks that slots [n] finished."""
    past, blocks = _rows((shelf.decoder, shelf.block[:, 0]), slots)
    frames, past = decode_block(decoder, params, blocks, past)
    return frames, shelf.replace(decoder=_put_all(shelf.decoder, past, slots))


@functools.partial(jax.jit, donate_argnames="shelf")
def _recache(model: Model, shelf: Shelf, slot: Array, first: Array) -> Shelf:
    state = recache(model, _row(shelf.state, slot), first)
    return shelf.replace(state=_put(shelf.state, state, slot))


@functools.partial(jax.jit, donate_argnames="shelf")
def _renoise(model: Model, key: Array, shelf: Shelf, slot: Array, count: Array) -> Shelf:
    noise = rollout.position_noise(key, shelf.block.shape[2:])
    state = renoise(model, noise, ENDLESS, _row(shelf.state, slot), count)
    return shelf.replace(state=_put(shelf.state, state, slot))
