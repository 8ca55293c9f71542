"""The small world's VAE: 64×64 video ↔ 8×8 latents of 16 channels, a quarter of the frames.

    python train.py --config configs/shapes_vae.py --workdir runs/vae

Expected: held-out PSNR above 30 dB, in about 30 minutes on 2 CPU cores. Gives runs/vae/vae.safetensors.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(Path(__file__).parent / "shapes.py"))["get_config"]()
    config.stage = "vae"
    config.seed = 0
    config.steps = 1800
    config.batch_size = 4
    config.frames = 9
    config.optimizer = ConfigDict(
        {
            "name": "muon",
            "learning_rate": 6e-3,
            "warmup": 50,
            "final": 0.05,
            "clip": 1.0,
            "ema_decay": 0.995,
        }
    )
    config.square = 2.0
    config.edge = 0.2
    config.kl = 1e-4
    config.log_every = 20
    config.save_every = 300
    config.keep = 2
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1})
    return config
