"""Self Forcing as published: no rollout is rolling, no sink. Rolled out by `self_forcing`.

python -m rfjax.study --rows self_forcing
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = distill(variant)
    config.rolling_share = 0.0
    config.rollout.sink_blocks = 0
    return config
