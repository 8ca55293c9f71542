"""Compilation: keep compiled programs between runs, and tell how long compiling took."""

import os
from collections.abc import Callable
from pathlib import Path

import jax

from rfjax import axes
from rfjax.errors import UserError

DEFAULT_FOLDER = "~/.cache/rfjax/jax"


def keep_programs(folder: str | None = None) -> None:
    """Keeps compiled programs in `folder`, else in $RFJAX_CACHE, else in ~/.cache/rfjax/jax; "" keeps none.

    A folder that cannot be made costs only the time to compile again, so it is no error.
    """
    if folder is None:
        folder = os.environ.get("RFJAX_CACHE", DEFAULT_FOLDER)
    if not folder:
        return
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"Compiled programs are not kept: {path}: {error.strerror or error}.")
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def host() -> jax.Device:
    """The CPU beside the accelerators; UserError where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        platforms = jax.config.jax_platforms
        raise UserError(
            f"Prompts are read on the CPU, which JAX_PLATFORMS={platforms} leaves out; set it to {platforms},cpu."
        ) from error


def training_step(function: Callable) -> Callable:
    """jit of f(state, …) that takes the place of its state.

    On CPU XLA drops optimisation barriers before it fuses; here they stay, for `dit.settle`.
    """
    step = jax.jit(function, donate_argnums=0)
    on_cpu = jax.jit(
        function, donate_argnums=0, compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"}
    )

    def alone():  # asked when it is called, within the mesh of the devices that it is for
        return on_cpu if axes.platform() == "cpu" else step

    def call(*args):  # JAX takes options for a whole program, not for a step that is traced as a part of one
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))
        return (step if traced else alone())(*args)

    call.trace = lambda *args: alone().trace(*args)
    return call


def stopwatch() -> Callable[[], float]:
    """A function that tells the seconds spent compiling, or loading kept programs, since this call."""
    return _sum(lambda seconds: seconds)


def counter() -> Callable[[], int]:
    """A function that tells how many programs were compiled, or loaded where they were kept, since this call."""
    return _sum(lambda seconds: 1)


def loads() -> Callable[[], int]:
    """A function that tells how many of these were loaded where they were kept, since this call."""
    count = [0]

    def listen(event: str, **_) -> None:
        count[0] += event == "/jax/compilation_cache/cache_hits"

    jax.monitoring.register_event_listener(listen)
    return lambda: count[0]


def _sum(weight: Callable[[float], float]) -> Callable[[], float]:
    """The sum so far of weight(seconds) over all programs that were compiled or loaded since this call."""
    total = [0]

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            total[0] += weight(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: total[0]
