"""Does it fit? What a config needs of the device's memory, told before anything is loaded.

`estimate.py` sums up sampling on one device of any kind in a moment. `compiled.py` compiles the real steps of training or sampling
for chips that need not be here (`topology.py`, `chips.py`, `programs.py`, `flops.py`).
"""

from rfjax.preflight.estimate import Need, capacity, check, need

__all__ = ["Need", "capacity", "check", "need"]
