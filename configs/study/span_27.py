"""A span of 27 frames. Clips of the training have 21, where it changes nothing: weights are those of `rolling_forcing.py`.

python -m rfjax.study --rows span_27
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = distill(variant)
    config.rollout.update({"span_blocks": 9, "ring_blocks": 9})
    config.scored_blocks = 7
    return config
