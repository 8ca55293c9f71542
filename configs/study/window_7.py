"""A window of 7 blocks, that is 7 denoising steps: the five levels that the ODE-initialised student knows, and two between them.

    python -m rfjax.study --rows window_7

With the sink these are 8 blocks, so the span is 27 frames, as in `span_27.py`; the teacher scores 21 frames all the same.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = distill(variant)
    config.rollout.steps = (1000, 800, 600, 500, 400, 300, 200)
    config.rollout.update({"span_blocks": 9, "ring_blocks": 9})
    config.scored_blocks = 7
    return config
