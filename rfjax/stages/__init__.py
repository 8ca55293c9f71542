"""Training stages, by name. A stage is a few functions of the config; `train.py` is the loop around them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rfjax.stages import distill, latent, ode, teacher, teacher_forcing, vae


class Stage(NamedTuple):
    """What train.py needs of a stage. Every function takes the config first and reads it once."""

    init: Callable[..., Any]  # (config, key) -> state; runs under jit
    data: Callable[..., Any]  # (config) -> grain.MapDataset of dicts of numeric arrays [B, …]
    update: Callable[..., Any]  # (config) -> f(state, batch, step) -> (state, metrics); donates the state
    export: Callable[..., Any]  # (config) -> f(state) -> {name: params}, written as name.safetensors
    sample: Callable[..., Any]  # (config) -> f(state, key) -> (clips [N, F, H, W, 3] in [-1, 1], captions)
    evaluate: Callable[..., Any]  # (config) -> f(state) -> {name: float}


STAGES = {
    "vae": Stage(vae.init, vae.data, vae.update, vae.export, vae.sample, vae.evaluate),
    "teacher": Stage(
        teacher.init, teacher.data, teacher.update, latent.export, teacher.sample, teacher.evaluate
    ),
    "ode": Stage(ode.init, ode.data, ode.update, latent.export, ode.sample, ode.evaluate),
    "teacher_forcing": Stage(
        teacher_forcing.init,
        teacher_forcing.data,
        teacher_forcing.update,
        latent.export,
        ode.sample,
        ode.evaluate,
    ),
    "distill": Stage(
        distill.init, distill.data, distill.update, distill.export, distill.sample, distill.evaluate
    ),
}
