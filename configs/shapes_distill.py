"""Distillation of the small world's student on its own rollouts: critic and generator, 5 : 1, rolling or Self Forcing by coin.

    python train.py --config configs/shapes_distill.py --workdir runs/distill

Expected: shape right in 9 clips of 10, the named motion in 5 of 10. 9 minutes on 2 CPU cores (5 s a step, which is 5
critic updates and 1 of the generator). More steps oversaturate: the latents' spread is 1.15 to 1.20 after these 100.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "shapes.py"))["training"]


def get_config(variant: str = "") -> ConfigDict:
    return training(
        "distill",
        variant,
        quick={"steps": 60},
        steps=100,
        batch_size=4,
        critic_steps=5,
        critic_warmup=20,
        rolling_share=0.5,
        blocks=(7, 7),
        frames=21,
        method="rolling",
        guidance=2.0,
        init_from="runs/ode/dit.safetensors",
        teacher="runs/teacher_long/dit.safetensors",
        critic_init="runs/teacher_long/dit.safetensors",
        loss="dmd",  # or "sid"
        optimizer={"learning_rate": 1e-4, "b1": 0.0, "weight_decay": 0.01, "clip": 10.0, "ema_decay": 0.99},
        critic_optimizer={"learning_rate": 2e-4, "b1": 0.0, "weight_decay": 0.01, "clip": 10.0},
        save_every=50,
    )
