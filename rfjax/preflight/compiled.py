"""Compiles programs for the devices of a mesh, which need not be here, and tells what each takes of a chip."""

import math
import re
import time
from collections.abc import Collection
from typing import Any

import jax

from rfjax.collectives import collectives
from rfjax.preflight import programs
from rfjax.preflight.flops import flops
from rfjax.preflight.programs import Program

LARGEST = 6  # buffers that are named
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (\w+)\[([\d,]+)\](\{[^}]*\})? ([\w-]+)\(")
NO_BUFFER = {"parameter", "bitcast", "get-tuple-element", "constant", "after-all"}


def measure(named: dict[str, Program], chosen: Collection[str]) -> dict[str, dict[str, Any]]:
    """{program: figures of its first device} of the chosen programs, in bytes, seconds and operations.

    "arguments", "outputs" (but for those that take an argument's place), "temporaries", "elsewhere": what else lies on that
    device because a program needs it there; "total"; "flops"; "accessed": what the compiler says is read and written, once where
    a loop repeats it; "collectives" {kind: bytes}; "buffers" [(bytes, shape, where)]; "compile". Where the compiler refuses for
    want of memory, "refused" says so, and only the first four, as far as known.
    """
    found = {}
    for name in chosen:
        mesh = named[name].mesh
        beside = {
            other: one for other, one in named.items() if mesh.devices.flat[0] in set(one.mesh.devices.flat)
        }
        with jax.set_mesh(mesh):
            found[name] = _measure(named[name], programs.resident(beside))
    return found


def moved(one: Program, two: Program, layers: int) -> float:
    """Bytes that a device reads and writes in a program of so many layers, as its compiler counts them without a loop.

    From that of one layer and of two: what a second adds, every further one does. What a kernel reads again and again counts once.
    """
    counted = []
    for program in (one, two):
        with jax.set_mesh(program.mesh):
            compiled = program.function.trace(*program.args).lower().compile()
        counted.append(compiled.cost_analysis()["bytes accessed"])
    first, second = counted
    return first + (layers - 1) * (second - first)


def _measure(program: Program, lying: dict[int, int]) -> dict[str, Any]:
    mine, devices = programs.shares(program.args), program.mesh.devices
    arguments, there = sum(mine.values()), sum((lying | mine).values())
    elsewhere = there - arguments
    traced, started = program.function.trace(*program.args), time.monotonic()
    figures = {"arguments": arguments, "outputs": 0, "temporaries": 0, "elsewhere": elsewhere}
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in said:
            raise
        figures |= {"temporaries": _wanted(said), "refused": said.split(": ", 1)[-1], "buffers": []}
    else:
        figures |= _memory(compiled.memory_analysis(), devices.flat[0].platform)
        # what a program takes and does not use lies there all the same
        figures["elsewhere"] = there - figures["arguments"]
        figures |= {"collectives": collectives(compiled), "buffers": buffers(compiled.as_text())}
        figures |= {"accessed": compiled.cost_analysis().get("bytes accessed")}
    parts = ("arguments", "outputs", "temporaries", "elsewhere")
    return figures | {
        "total": sum(figures[part] for part in parts),
        "flops": flops(traced.jaxpr) / devices.size,
        "compile": time.monotonic() - started,
    }


def _memory(told, platform: str) -> dict[str, int]:
    """Bytes of arguments, new outputs and temporaries, the program itself among them, of XLA's memory analysis.

    Compilers for TPUs tell the peak of the chip's memory. Their sum of temporaries is larger: it counts arrays that take turns.
    """
    outputs = told.output_size_in_bytes - told.alias_size_in_bytes
    temporaries = told.temp_size_in_bytes
    if platform == "tpu":
        temporaries = max(0, told.peak_memory_in_bytes - told.argument_size_in_bytes - outputs)
    temporaries += told.generated_code_size_in_bytes
    return {"arguments": told.argument_size_in_bytes, "outputs": outputs, "temporaries": temporaries}


def _wanted(said: str) -> int:
    """Bytes that the compiler wanted, of its message: `… temporaries (22.43G) exceeds …`, `Used 40.2G of 31.25G hbm`."""
    found = re.search(r"(?:\(|Used )([\d.]+)([KMG])", said)
    return int(float(found[1]) * UNITS[found[2]]) if found else 0


def buffers(text: str) -> list[tuple[int, str, str]]:
    """The largest arrays that a compiled program's text makes outside fusions: (bytes, type, the source's name for it)."""
    found, fused = {}, False
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line:
            fused = "fused_computation" in line or "region" in line.split("(")[0]
        match = None if fused else INSTRUCTION.match(line)
        if match is None or match[4] in NO_BUFFER or "S(1)" in (match[3] or ""):  # S(1): on the chip
            continue
        bits = int((re.search(r"\d+", match[1]) or [8])[0])
        size = math.prod(map(int, match[2].split(","))) * bits // 8
        source = re.search(r'op_name="([^"]*)"', line)
        kind = f"{match[1]}[{match[2]}]"
        found.setdefault((size, kind), source[1].split("/", 1)[-1] if source else match[4])
    return [(size, kind, source) for (size, kind), source in sorted(found.items(), reverse=True)[:LARGEST]]
