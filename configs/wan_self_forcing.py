"""Wan 2.1 T2V 1.3B with the few-step weights of Self Forcing, as published: four steps and no sink (arXiv 2506.08009).

python sample.py --config configs/wan_self_forcing.py --prompt "…" --seconds 30 --out clip.mp4
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

wan_1_3b = runpy.run_path(str(Path(__file__).parent / "wan_1_3b.py"))["get_config"]


def get_config() -> ConfigDict:
    config = wan_1_3b()
    config.weights = "gdhe17/Self-Forcing"
    config.method = "self_forcing"  # by which they are rolled out, unless --method says otherwise
    config.rollout.steps = (1000, 750, 500, 250)
    config.rollout.sink_blocks = 0
    return config
