"""A sink of 2 blocks: with the window of 5 all of the span, so no recent block is seen but in the ramps.

python -m rfjax.study --rows sink_2
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = distill(variant)
    config.rollout.sink_blocks = 2
    return config
