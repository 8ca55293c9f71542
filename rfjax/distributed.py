"""Several processes, one run: how they start, agree, stop together, and what only the first of them does.

Every process runs the same program on arrays that are spread over all of them; process 0 alone speaks and writes. One process
is the same code.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost
from tqdm import tqdm

from rfjax import errors
from rfjax.errors import UserError

# What tells that a launcher started several processes: the variable with their number, or with their hosts.
LAUNCHERS = (
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
)
FAILED = "rfjax/failed"  # the key under which a process that fails says why
UNHEARD = (jax.errors.JaxRuntimeError, ValueError)  # of a service that is gone, or was never there
LOOK = 1.0  # seconds between two looks there
PATIENCE = 70.0  # seconds until a file that process 0 has made is taken not to come


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


def seen(path: Path) -> bool:
    """Whether every process sees what process 0 has made before it asks. All wait for each other.

    A client of a network file system may remember for a minute that nothing was there (nfs(5): acdirmax).
    """
    agree(True)  # now it is made
    end = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(LOOK)
    return agree(path.exists())


def whole(array) -> np.ndarray:
    """All of an array, on every host, wherever its parts are. All processes must ask."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def pieces(array) -> list[Callable[[], np.ndarray]]:
    """Reads of an array's pieces, which follow each other along its first axis. All processes must call each, in order.

    Of three dimensions or more the first counts layers (or taps), and each is a piece: neither a host nor a device then holds
    more than one layer whole. A matrix or a vector is one piece.
    """
    if array.ndim < 3:
        return [functools.partial(whole, array)]
    return [functools.partial(_layer, array, index) for index in range(len(array))]


def _layer(array, index: int) -> np.ndarray:
    return whole(_cut(array, index) if isinstance(array, jax.Array) else array[index])


@jax.jit
def _cut(array, index):
    """[L, …] → [1, …] at a place that the program does not depend on."""
    return jax.lax.dynamic_slice_in_dim(array, index, 1)


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
    """Around a run: where one of several processes fails, all of them say why, in a sentence, and end at once with exit code 2.

    Leaving the usual way it would wait for the others to take their leave, and they for its part of the next sum. Why it fails is
    kept by jax's coordination service, where the others look; what is no mistake of the user's is told with its traceback, too.
    """
    if jax.process_count() == 1:
        yield
        return
    if not _joined():
        raise UserError(
            f"This is one of {jax.process_count()} processes that have not joined; give --distributed to each of them."
        )
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(over,), daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        over.set()
        _end(_reason(error))
    finally:
        over.set()
        watcher.join()


def _joined() -> bool:
    """Whether `start` was called, or jax has found the other processes by itself."""
    try:
        return multihost.get_jax_distributed_client() is not None
    except ValueError:  # orbax's word for none
        return False


def _watch(over: threading.Event) -> None:
    """Ends this process once another has said that it fails: it may wait for the other for ever."""
    while not over.wait(LOOK):
        if said := _told():
            _leave(said)


def _reason(error: Exception) -> str:
    """Why the run ends, in a sentence. An error that no process can put in one is shown where it came."""
    waited = isinstance(error, TimeoutError)  # for another process: an OSError that says nothing of a disk
    if said := (not waited and errors.sentence(error)) or _told():  # what was told may have made this one
        return said
    traceback.print_exception(error)
    return (
        f"process {jax.process_index()} failed, or lost another one; start all of them again, and the run goes on from its "
        "last checkpoint."
    )


def _end(said: str) -> None:
    """Tells it to the others, gives them time to hear it, since they lose a process when this one leaves, and leaves."""
    if not _told():
        told = said if said.startswith("process ") else f"process {jax.process_index()} failed: {said}"
        with contextlib.suppress(*UNHEARD):  # there first, or nobody to tell it to
            multihost.get_jax_distributed_client().key_value_set(FAILED, told)
    _leave(said, 3 * LOOK)


def _told() -> str:
    """What a process that fails has told; "" where none has."""
    try:
        return multihost.get_jax_distributed_client().key_value_try_get(FAILED)
    except UNHEARD:  # no such key, or the service is gone
        return ""


def _leave(said: str, wait: float = 0) -> None:
    print(f"error: {said}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(wait)
    os._exit(2)
