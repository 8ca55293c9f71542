"""Rolling Forcing without the sink, in training and after.

python -m rfjax.study --rows no_sink
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = distill(variant)
    config.rollout.sink_blocks = 0
    return config
