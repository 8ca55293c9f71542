"""A model too small to show anything, with random weights: what is left of a block's time is overhead, so a long run is short.

python -m rfjax.bench --config configs/tiny.py --blocks 10000 --json tiny.json
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.prompt = "a large red circle bouncing over a blue background"
    config.weights = "random"
    config.video = ConfigDict({"height": 16, "width": 16, "fps": 16})
    config.vae = ConfigDict({"dim": 4, "z_dim": 4, "dim_mult": (1, 1, 1), "num_res_blocks": 1})
    config.vae.temporal_downsample = (True, True)
    config.text = ConfigDict({"text_len": 16, "text_dim": 48})
    config.dit = ConfigDict({"dim": 16, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "in_dim": 4})
    config.dit.update({"freq_dim": 8, "text_len": 16, "text_dim": 48})
    config.rollout = ConfigDict({"steps": (1000, 750, 500, 250), "shift": 5.0, "block_frames": 3})
    return config
