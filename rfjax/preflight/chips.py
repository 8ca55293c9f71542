"""Published figures of TPU chips: cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e ("System architecture", per chip)."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip: what is published, and what libtpu's compiler leaves of its memory to a program."""

    memory: int  # bytes that a program may take, as the compiler says when one takes more
    flops: float  # peak, bfloat16, a second
    hbm: float  # bytes a second between chip and memory
    ici: float  # bytes a second over all links to other chips, both ways together


GIB = 2**30
CHIPS = {  # published memory: 16, 95 and 32 GB
    "v5e": Chip(int(15.75 * GIB), 197e12, 0.82e12, 200e9),
    "v5p": Chip(int(95.74 * GIB), 459e12, 2.77e12, 600e9),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1.64e12, 448e9),
}
