"""On what a run ran: machine, software and code."""

import datetime
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.extend import backend

import rfjax
from rfjax import preflight
from rfjax.preflight.chips import PEAKS

ROOT = Path(__file__).parents[2]
UNKNOWN = "unknown"
CUDNN = "nvidia-cudnn-cu"  # and the number of its CUDA


def stamp(argv: list[str]) -> dict[str, Any]:
    """ "date" (UTC), "command", "commit", "versions" and "hardware" of this process and its default device."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "rfjax.bench", *argv],
        "commit": commit(),
        "versions": {
            "rfjax": rfjax.__version__,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
        }
        | installed("flax", "qwix")
        | cudnn(),
        "hardware": hardware(),
    }


def hardware() -> dict[str, Any]:
    """The devices, what drives them, their published peak of bfloat16 products, and the machine around them."""
    devices = jax.devices()
    kind = devices[0].device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": devices[0].platform,
        "device": kind,
        "devices": len(devices),
        "memory_bytes": preflight.capacity(),
        "peak_flops": PEAKS.get(kind),
        "driver": _driver() if devices[0].platform == "gpu" else None,
        "runtime": backend.get_backend().platform_version,
        "cpu": _cpu(),
        "cores": cores,
        "system": platform.platform(),
    }


def installed(*packages: str) -> dict[str, str]:
    """{package: version} of those that are there."""
    return {package.name: package.version for package in metadata.distributions() if package.name in packages}


def cudnn() -> dict[str, str]:
    """{package: version} of cuDNN as pip installed it, where it did: on GPUs attention is its work, seven tenths of all."""
    found = metadata.distributions()
    return {package.name: package.version for package in found if package.name.startswith(CUDNN)}


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it; "unknown" where the package is no checkout."""
    if not (ROOT / ".git").exists():
        return UNKNOWN
    found = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return found + "+" * (found != UNKNOWN and changed not in ("", UNKNOWN))


def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or sys.platform


def _driver() -> str:
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _said(*command: str) -> str:
    """What a command prints; "unknown" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return UNKNOWN
    done = subprocess.run(command, capture_output=True, text=True)
    return UNKNOWN if done.returncode else done.stdout.strip()
