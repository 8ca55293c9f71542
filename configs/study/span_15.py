"""A span of 15 frames. It holds no window of 5 and a sink, so the window is that of `window_3.py`; the teacher scores 21 frames.

python -m rfjax.study --rows span_15
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = distill(variant)
    config.rollout.steps = (1000, 600, 200)
    config.rollout.update({"span_blocks": 5, "ring_blocks": 5})
    config.scored_blocks = 7
    return config
