"""Training stages, by name. A stage is a few functions of the config; `train.py` is the loop around them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rfjax.stages import distill, latent, ode, student, teacher, teacher_forcing, vae


class Stage(NamedTuple):
    """What train.py needs of a stage. Every function takes the config first and reads it once."""

    networks: Callable[..., Any]  # (config) -> {name: Source} of what is trained
    frozen: Callable[..., Any]  # (config) -> {name: Source} of what is only used
    init: Callable[..., Any]  # (config, {name: params of a network}) -> state; runs under jit
    data: Callable[..., Any]  # (config) -> grain.MapDataset of dicts of numeric arrays [B, …]
    update: Callable[
        ..., Any
    ]  # (config) -> f(state, frozen, batch, step) -> (state, metrics); donates the state
    export: Callable[..., Any]  # (config) -> f(state, frozen) -> {name: params}, written as name.safetensors
    sample: Callable[
        ..., Any
    ]  # (config) -> f(state, frozen, key) -> (clips [N, F, H, W, 3] in [-1, 1], captions)
    evaluate: Callable[..., Any]  # (config) -> f(state, frozen) -> {name: float}
    measures: Callable[..., Any] = latent.measured  # (config) -> the names that evaluate gives


STAGES = {
    "vae": Stage(
        vae.networks,
        vae.frozen,
        vae.init,
        vae.data,
        vae.update,
        vae.export,
        vae.sample,
        vae.evaluate,
        vae.measured,
    ),
    "teacher": Stage(
        student.networks,
        teacher.frozen,
        student.init,
        teacher.data,
        teacher.update,
        student.export,
        teacher.sample,
        teacher.evaluate,
    ),
    "ode": Stage(
        student.networks,
        student.base,
        student.init,
        ode.data,
        ode.update,
        student.export,
        ode.sample,
        ode.evaluate,
    ),
    "teacher_forcing": Stage(
        student.networks,
        student.base,
        student.init,
        teacher_forcing.data,
        teacher_forcing.update,
        student.export,
        ode.sample,
        ode.evaluate,
    ),
    "distill": Stage(
        distill.networks,
        distill.frozen,
        distill.init,
        distill.data,
        distill.update,
        distill.export,
        distill.sample,
        distill.evaluate,
    ),
}
