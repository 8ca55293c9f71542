"""No Self-Forcing training: all rollouts of the training are rolling.

python -m rfjax.study --rows no_self_forcing_training
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = distill(variant)
    config.rolling_share = 1.0
    return config
