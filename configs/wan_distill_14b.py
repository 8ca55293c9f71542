"""Distillation of a Rolling Forcing student: Wan 2.1 1.3B learns from Wan 2.1 14B, 832×480, clips of 21 to 27 latent frames.

    python train.py --config configs/wan_distill_14b.py --workdir runs/wan_distill

The published schedule (arXiv 2509.25161): 3,000 steps from the ODE-initialised student, critic five times as often.
A step here is five updates of the critic and one of the generator; if the published ones count every update, 600 are as many.
The mesh below is for 8 devices, and

    python -m rfjax.preflight --config configs/wan_distill_14b.py --topology v6e:2x4

says whether they hold it. Never run at this size: docs/pods.md says what was shown instead.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "wan_1_3b.py"))["training"]


def get_config() -> ConfigDict:
    config = training(
        "distill",
        weights="weights/wan_1_3b",
        init_from="runs/wan_ode/dit.safetensors",
        critic_init="weights/wan_1_3b/dit.safetensors",
        teacher="weights/wan_14b/dit.safetensors",
        vae_weights="",  # as published it is the VAE's file: clips of more than 21 frames then begin with an encoded picture
        data="data/prompts",
        critic_steps=5,
        critic_warmup=0,
        rolling_share=0.5,
        blocks=(7, 9),
        loss="dmd",  # or "sid"
        guidance=3.0,
        optimizer={
            "learning_rate": 1.5e-6,
            "b1": 0.0,
            "weight_decay": 0.01,
            "clip": 10.0,
            "ema_decay": 0.99,
            "ema_start": 200,
        },
        critic_optimizer={"learning_rate": 4e-7, "b1": 0.0, "weight_decay": 0.01, "clip": 10.0},
        save_every=100,
    )
    config.teacher_dit = config.dit.copy_and_resolve_references()
    config.teacher_dit.update({"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40})
    return config
