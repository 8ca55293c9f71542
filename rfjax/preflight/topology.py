"""Devices to compile for, which need not be here: TPU topologies through libtpu's compiler, and CPU devices of any number."""

import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from rfjax.errors import UserError
from rfjax.preflight.chips import CHIPS

EXAMPLES = "v5p:2x2x1, v6e:4x4, v5e:8x8 or cpu:8"
# libtpu asks the cloud's metadata for the machine that it runs on, and locks that machine's chips: neither is wanted here.
ELSEWHERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def devices(name: str) -> list[jax.Device]:
    """The devices of a topology such as v5p:2x2x1 (4 chips, none needed) or cpu:8.

    Raises:
      UserError: no such topology, or libtpu is not installed.
    """
    kind, _, size = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return _cpu(int(size))
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", size):
        raise UserError(
            f"There is no topology {name!r}; give one such as {EXAMPLES}, the arrangement of a slice's chips (names such as "
            "v5p-64 may count cores: that slice is v5p:2x4x4)."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"Compiling for {name} takes libtpu's compiler: pip install -e '.[tpu]'.")
    os.environ.update({key: os.environ.get(key, value) for key, value in ELSEWHERE.items()})
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"There is no topology {name}: {said}; give one such as {EXAMPLES}.") from error


def _cpu(count: int) -> list[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # devices are there already
        pass
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(f"There are {len(found)} CPU devices by now, not {count}; start a new process.")
    return found[:count]
