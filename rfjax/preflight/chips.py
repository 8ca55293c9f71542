"""Published figures of chips.

TPUs: cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e ("System architecture", per chip). NVIDIA's GPUs: the data sheets of A100, H100
and H200, products of dense bfloat16 matrices.
"""

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
H200 = Chip(141 * 10**9, 989e12, 4.8e12, 900e9)
# What JAX calls a device (`device_kind`) → peak of a second, bfloat16.
PEAKS = {
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": H200.flops,
}
