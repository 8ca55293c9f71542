"""The small world, 64×64 at 16 frames a second: sizes of its networks, for sampling and for every training stage."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.world = ConfigDict({"size": 64, "fps": 16, "objects": 1})
    config.vae = ConfigDict({"dim": 8, "z_dim": 16, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 1})
    return config
