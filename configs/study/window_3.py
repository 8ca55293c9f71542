"""A window of 3 blocks, that is 3 denoising steps: every second level of the five that the ODE-initialised student knows.

python -m rfjax.study --rows window_3
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = distill(variant)
    config.rollout.steps = (1000, 600, 200)
    return config
