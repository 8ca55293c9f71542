"""The small world's VAE, second part: clips. 64×64 video ↔ 8×8 latents of 16 channels, 4 : 1 in time.

    python train.py --config configs/shapes_vae.py --workdir runs/vae

Expected: 34 dB on held-out clips of 21 frames, in 11 minutes on 2 CPU cores (1.1 steps a second).
Gives runs/vae/vae.safetensors. Needs the first part, configs/shapes_vae_images.py.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "shapes.py"))["training"]


def get_config(variant: str = "") -> ConfigDict:
    return training(
        "vae",
        variant,
        quick={"steps": 200},
        steps=700,
        batch_size=4,
        frames=9,
        init_from="runs/vae_images/vae.safetensors",
        optimizer={
            "name": "muon",
            "learning_rate": 3e-3,
            "warmup": 50,
            "final": 0.05,
            "clip": 1.0,
            "ema_decay": 0.99,
        },
        square=4.0,
        edge=0.5,
        kl=1e-3,
        save_every=350,
    )
