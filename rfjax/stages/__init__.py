"""Training stages, by name. A stage is a few functions of the config; `train.py` is the loop around them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rfjax.stages import clips, distill, ode, student, teacher, teacher_forcing, vae


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
    sample: Callable[..., Any]  # (config) -> f(state, frozen, key) -> (clips uint8 [N, F, H, W, 3], captions)
    evaluate: Callable[..., Any]  # (config) -> f(state, frozen) -> {name: float}
    measures: Callable[..., Any]  # (config) -> the names that evaluate gives
    generate: Callable[..., Any] | None = None  # (config) -> what `clips.roller` compiles, for preflight


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
        clips.measured,
        teacher.generate,
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
        clips.measured,
        ode.generate,
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
        clips.measured,
        ode.generate,
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
        clips.measured,
        ode.generate,
    ),
}
