"""Train state and optimiser: small pure functions over pytrees.

`OptimizerConfig` → `make_optimizer` → an optax transformation; `create` → `TrainState` → `apply_gradients`.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from rfjax import sharding, tree
from rfjax.errors import UserError

KERNELS = r"(.*/)?kernel"  # weight matrices: what decays, and what Muon steps


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser, schedule and average of one network."""

    learning_rate: float
    name: str = "adamw"  # or "muon": orthogonalised momentum for kernels, AdamW for the rest
    warmup: int = 0  # steps of linear rise
    final: float = 1.0  # learning rate at the last step ÷ learning_rate, by a cosine; 1 is constant
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0  # of kernels
    clip: float = 10.0  # greatest norm of the gradient
    ema_decay: float = 0.999
    ema_start: int = 0  # before this step the average is the parameters themselves

    def __post_init__(self):
        if self.name not in ("adamw", "muon"):
            raise UserError(f"There is no optimiser {self.name!r}; use adamw or muon.")


class TrainState(struct.PyTreeNode):
    """All that one network's training carries from step to step."""

    step: Array  # [] int32, updates done
    params: Any
    opt_state: Any
    ema: Any  # average of params, same tree; None where none is kept
    skipped: Array  # [2] int32, updates skipped: in a row until now, and in all


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine from learning_rate to final · learning_rate at `steps`."""
    rest = max(1, steps - config.warmup)
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup)
    fall = optax.cosine_decay_schedule(config.learning_rate, rest, config.final)
    return optax.join_schedules([lambda step: rise(step + 1), fall], [config.warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv 1711.05101) or Muon with AdamW's step size (2502.16982)."""
    schedule = make_schedule(config, steps)
    if config.name == "adamw":
        rule = optax.adamw(
            schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=kernel_mask
        )
    else:
        rule = optax.contrib.muon(
            schedule,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            weight_decay_mask=kernel_mask,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def kernel_mask(params) -> Any:
    """Tree of bool: which leaves are kernels. Leaves that the optimiser masks away stay masked."""
    names = jax.tree_util.tree_map_with_path(lambda path, _: _name(path), params)
    return jax.tree.map(lambda name: re.fullmatch(KERNELS, name) is not None, names)


def muon_dimensions(params) -> Any:
    """Axes of each kernel that make its matrix, in × out. A third axis counts layers; more, a convolution."""

    def dimensions(name: str, leaf) -> optax.contrib.MuonDimensionNumbers | None:
        if re.fullmatch(KERNELS, name) is None:
            return None
        axes = tuple(range(leaf.ndim))
        reduced = axes[:-1] if leaf.ndim > 3 else axes[-2:-1]
        return optax.contrib.MuonDimensionNumbers(reduced, axes[-1:])

    return tree.unflatten({name: dimensions(name, leaf) for name, leaf in tree.flatten(params).items()})


def create(params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. The average is a copy, so that the whole state can be donated."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params),
        skipped=jnp.zeros(2, jnp.int32),
    )


def apply_gradients(
    state: TrainState, grads, optimizer: optax.GradientTransformation, config: OptimizerConfig
) -> TrainState:
    """The state after one optimiser step, its average included.

    A gradient that is not finite changes nothing but the count of skipped updates: neither parameters nor average,
    neither the optimiser's moments nor its step, on which the learning rate hangs. The choice is the device's.
    """
    grads = sharding.keep(grads)  # summed over the batch's devices, each keeps its part
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, config)
    ema = state.ema and jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
    after = TrainState(state.step + 1, params, opt_state, ema, state.skipped * jnp.array([0, 1]))
    skip = state.replace(skipped=state.skipped + 1)
    finite = jnp.isfinite(optax.tree.norm(grads))
    return sharding.keep(jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, skip))


def gradients(objective, params, batch, micro: int = 1) -> tuple[dict[str, Array], Any]:
    """Metrics and gradient of objective(params, micro-batch, index) → (loss, metrics), both means over the micro-batches.

    `batch` is a tree of arrays [B, …]; micro-batch i has the rows i, i + micro, …, so that a batch that is split over devices
    stays where it is. Only one micro-batch's activations are held at a time.
    """
    slope = jax.grad(objective, has_aux=True)
    if micro == 1:
        return slope(params, batch, 0)[::-1]
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, micro, *x.shape[1:]), 1, 0), batch)

    def add(total, part):
        grads, metrics = sharding.keep(slope(params, *part))
        return jax.tree.map(jnp.add, total, (metrics, grads)), None

    like = jax.eval_shape(slope, params, jax.tree.map(lambda x: x[0], parts), 0)[::-1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    total, _ = jax.lax.scan(add, zeros, (parts, jnp.arange(micro)))
    return jax.tree.map(lambda x: x / micro, total)


def skips(state) -> tuple[int, int]:
    """Updates skipped (in a row, in all), over every TrainState in a tree: the longest row, and the sum. Waits for them."""
    networks = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TrainState))
    rows, sums = zip(*jax.device_get([network.skipped for network in networks]), strict=True)
    return int(max(rows)), int(sum(sums))


def descend(
    state: TrainState,
    objective,
    batch,
    optimizer: optax.GradientTransformation,
    config: OptimizerConfig,
    micro: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One step down an objective as `gradients` takes it: the state after it, and its metrics with "grad_norm" before it."""
    metrics, grads = gradients(objective, state.params, batch, micro)
    norm = {"grad_norm": optax.tree.norm(grads)}
    return apply_gradients(state, grads, optimizer, config), metrics | norm


def ema_decay(step: Array, config: OptimizerConfig) -> Array:
    """`config.ema_decay` from ema_start on, 0 before. Without an ema_start min(decay, (1 + n) / (10 + n)) after n steps: short
    memory while much changes."""
    if config.ema_start:
        return jnp.where(step < config.ema_start, 0.0, config.ema_decay)
    n = step.astype(jnp.float32)
    return jnp.minimum(config.ema_decay, (1 + n) / (10 + n))


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
