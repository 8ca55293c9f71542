"""The transformer that a stage trains: all of its parameters, or adapters of fixed ones where config.lora.rank is not 0."""

import dataclasses
import functools

import jax

from rfjax import config, lora, parameters
from rfjax import state as train
from rfjax.dit import DiTConfig
from rfjax.errors import UserError
from rfjax.stages.sources import Source


def transformer(sizes: DiTConfig, path: str, frozen: bool = False) -> Source:
    """A DiT's parameters: masters in float32 or, where they are frozen, in the dtype of the computation."""
    kept = sizes if frozen else dataclasses.replace(sizes, dtype="float32")
    return Source(functools.partial(parameters.initial, "dit", kept), path)


def teacher_sizes(settings) -> DiTConfig:
    """Of the network in settings.teacher: the section `teacher_dit`, or `dit` where it is as large as the student."""
    return config.build(DiTConfig, settings, "teacher_dit" if "teacher_dit" in settings else "dit")


def trained(settings) -> Source:
    """The parameters in settings.init_from, or random where it is empty; or fresh adapters of them."""
    sizes, adapt = config.build(DiTConfig, settings, "dit"), _lora(settings)
    if adapt is None:
        return transformer(sizes, settings.init_from)
    if not settings.init_from:
        raise UserError("config.lora adapts what is there; give config.init_from.")
    return Source(lambda key: lora.init(adapt, parameters.abstract("dit", sizes), key))


def base(settings) -> dict[str, Source]:
    """{"base": the fixed parameters that are adapted}; {} where all are trained."""
    if _lora(settings) is None:
        return {}
    sizes = config.build(DiTConfig, settings, "dit")
    return {"base": transformer(sizes, settings.init_from, frozen=True)}


def networks(settings) -> dict[str, Source]:
    """{"dit"} of a stage that trains one network."""
    return {"dit": trained(settings)}


def init(settings, params) -> train.TrainState:
    """The state before the first step from {"dit"}."""
    return train.create(params["dit"], optimizer(settings)[0])


def optimizer(settings, section: str = "optimizer", updates: int | None = None):
    """(optax transformation, its options) of a section, for so many updates, by default one a step."""
    options = config.build(train.OptimizerConfig, settings, section)
    return train.make_optimizer(options, settings.steps if updates is None else updates), options


def cast(sizes: DiTConfig, params):
    """Parameters in the dtype of the computation; gradients come back in theirs."""
    return jax.tree.map(lambda x: x.astype(sizes.dtype), params)


def working(settings):
    """f(what is trained, frozen params) → the whole network's parameters in the dtype of the computation.

    For one pass through the network: gradients come back to what is trained, in float32.
    """
    sizes, adapt = config.build(DiTConfig, settings, "dit"), _lora(settings)

    def whole(params, fixed):
        if adapt is not None:
            params = lora.merge(fixed["base"], params, adapt.scale)
        return cast(sizes, params)

    return whole


def export(settings):
    """f(TrainState, frozen params) → {"dit": averaged parameters}, and {"lora": adapters alone, see `rfjax.lora`}."""
    adapt = _lora(settings)
    if adapt is None:
        return lambda state, fixed: {"dit": state.ema}
    merge = jax.jit(functools.partial(lora.merge, scale=adapt.scale))

    def exported(state, fixed):
        return {"dit": merge(fixed["base"], state.ema), "lora": lora.scaled(state.ema, adapt.scale)}

    return exported


def _lora(settings) -> lora.LoRAConfig | None:
    adapt = config.build(lora.LoRAConfig, settings, "lora") if "lora" in settings else None
    return adapt if adapt and adapt.rank else None
