"""Several processes, one run: how they start, agree, stop together, and what only the first of them does.

Every process runs the same program on arrays that are spread over all of them; process 0 alone speaks and writes. One process
is the same code.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from rfjax.errors import UserError

# What tells that a launcher started several processes: the variable with their number, or with their hosts.
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


def detected() -> bool:
    """Whether the environment is that of one of several processes, of SLURM's srun, Open MPI or a TPU pod."""
    found = [os.environ[name] for name in LAUNCHERS if name in os.environ]
    return any("," in value or (value.isdigit() and int(value) > 1) for value in found)


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the run's processes, before anything else of jax. What is None comes from the environment.

    Args:
      coordinator: host:port of process 0, which opens it.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      UserError: something is missing, or the others did not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The processes of this run cannot join ({reason}); give --coordinator HOST:PORT, --processes N and "
            "--process I to each, or start them by SLURM, Open MPI or on a TPU pod."
        ) from error


def is_main() -> bool:
    """Whether this process is the one that speaks and writes."""
    return jax.process_index() == 0


def tell(text: str) -> None:
    """Prints a line, once for all processes, above a progress bar."""
    if is_main():
        tqdm.write(text)


def agree(here: bool) -> bool:
    """Whether it is true in every process. All wait for each other."""
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def whole(array) -> np.ndarray:
    """All of an array, on every host, wherever its parts are. All processes must ask."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def stop_signal() -> Callable[[int], bool]:
    """f(steps done) → whether to stop now, since SIGTERM or Ctrl-C has come; ask once after every step.

    Of several processes, one that is told tells the others, and they stop after the same step, the first that none has
    passed: the signal is jax's notice of preemption, and what is asked costs no transfer. A single process ends at once
    at the second signal.
    """
    if jax.process_count() > 1:  # jax.distributed listens to SIGTERM
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return multihost_utils.reached_preemption_sync_point
    seen = []

    def remember(number, _):
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    return lambda done: bool(seen)


@contextlib.contextmanager
def together():
    """Around a run: one of several processes that fails says so and ends at once.

    Leaving the usual way it would wait for the others to take their leave, and they for its part of the next sum.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(
                f"error: process {jax.process_index()} failed, or lost another one; start all of them again, and "
                "the run goes on from its last checkpoint.",
                file=sys.stderr,
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
