"""The smallest training run there is: a VAE of 4 channels on 16×16 video, to see that training works at all.

    python train.py --config configs/shapes_debug.py --workdir runs/debug

Expected: the loss falls, within a minute on 2 CPU cores, most of it compiling.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent / "shapes_vae.py"))["get_config"]()
    config.world.size = 16
    config.vae.dim, config.vae.dim_mult = 4, (1, 2)
    config.vae.temporal_downsample = (True,)
    config.init_from = ""
    config.optimizer.name = "adamw"
    config.steps, config.batch_size, config.frames = 20, 2, 5
    config.log_every, config.save_every = 2, 10
    return config
