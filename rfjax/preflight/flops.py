"""Floating-point operations of a traced program: its matrix products and convolutions, in loops as often as these run.

XLA's own count (`cost_analysis`) takes the body of a loop once, and a kernel for nothing.
"""

import math

from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Of the whole program, over all devices. A loop of a length that is not known counts once, of branches the longest."""
    return sum(_equation(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation(eqn) -> float:
    kind, p = eqn.primitive.name, eqn.params
    shapes = [getattr(var.aval, "shape", ()) for var in (*eqn.invars, *eqn.outvars)]
    if kind == "dot_general":
        (contracted, _), _ = p["dimension_numbers"]
        return 2 * math.prod(shapes[-1]) * math.prod(shapes[0][axis] for axis in contracted)
    if kind == "conv_general_dilated":
        kernel, features = shapes[1], p["dimension_numbers"].rhs_spec[0]
        return 2 * math.prod(shapes[-1]) * math.prod(kernel) / kernel[features]
    if kind == "cond":
        return max(map(flops, p["branches"]))
    times = 1
    if kind == "scan":
        times = p["length"]
    elif kind == "pallas_call":
        times = math.prod(p["grid_mapping"].grid)
    elif kind == "shard_map":  # written for one device
        split = p.get("newly_manual_axes") or p["manual_axes"]  # named anew in JAX 0.10
        times = math.prod(p["mesh"].shape[axis] for axis in split)
    return times * sum(map(flops, _inside(p.values())))


def _inside(values) -> list[Jaxpr | ClosedJaxpr]:
    """Programs among an equation's parameters."""
    found = []
    for value in values:
        if isinstance(value, Jaxpr | ClosedJaxpr):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _inside(value)
    return found
