"""The small world's VAE: 64×64 video ↔ 8×8 latents of 16 channels, a quarter of the frames.

    python train.py --config configs/shapes_vae.py --workdir runs/vae

Expected: held-out PSNR above 30 dB, in about 30 minutes on 2 CPU cores. Gives runs/vae/vae.safetensors.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "shapes.py"))["training"]


def get_config() -> ConfigDict:
    return training(
        "vae",
        steps=1800,
        batch_size=4,
        frames=9,
        optimizer={
            "name": "muon",
            "learning_rate": 6e-3,
            "warmup": 50,
            "final": 0.05,
            "clip": 1.0,
            "ema_decay": 0.995,
        },
        square=2.0,
        edge=0.2,
        kl=1e-4,
        save_every=300,
    )
