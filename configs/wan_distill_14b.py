"""Distillation of a Rolling Forcing student: Wan 2.1 1.3B learns from Wan 2.1 14B, 832×480, clips of 21 to 27 latent frames.

    python train.py --config configs/wan_distill_14b.py --workdir runs/wan_distill

The published schedule (arXiv 2509.25161): 3,000 steps from the ODE-initialised student, critic five times as often. The mesh below
is for 8 devices; `python -m rfjax.preflight --config configs/wan_distill_14b.py --topology v6e:2x4` says whether they hold it.
Never run at this size: docs/pods.md says what was shown instead.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

BASE = runpy.run_path(str(Path(__file__).parent / "wan_1_3b.py"))["get_config"]


def get_config() -> ConfigDict:
    config = BASE()
    config.stage = "distill"
    config.seed = 0
    config.dit.remat = True
    config.teacher_dit = config.dit.copy_and_resolve_references()
    config.teacher_dit.update({"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40})
    config.init_from = "runs/wan_ode/dit.safetensors"
    config.critic_init = "weights/wan_1_3b/dit.safetensors"
    config.teacher = "weights/wan_14b/dit.safetensors"
    config.vae_weights = ""  # a VAE's folder makes clips longer than 21 frames begin with an encoded picture
    config.data = "data/prompts"
    config.negative_prompt = ""
    config.mesh = ConfigDict({"data": 1, "fsdp": 8, "context": 1})
    config.batch_size = 8
    config.lora = ConfigDict(
        {"rank": 0, "alpha": 0.0, "targets": "blocks/(self|cross)_[qkvo]"}
    )  # rank 0: train everything
    config.accumulate = 1
    config.steps = 3000
    config.critic_steps = 5
    config.critic_warmup = 0
    config.rolling_share = 0.5
    config.blocks = (7, 9)
    config.frames = 21
    config.method = "rolling"
    config.loss = "dmd"
    config.guidance = 3.0
    config.optimizer = ConfigDict(
        {
            "learning_rate": 1.5e-6,
            "b1": 0.0,
            "weight_decay": 0.01,
            "clip": 10.0,
            "ema_decay": 0.99,
            "ema_start": 200,
        }
    )
    config.critic_optimizer = ConfigDict(
        {"learning_rate": 4e-7, "b1": 0.0, "weight_decay": 0.01, "clip": 10.0}
    )
    config.log_every = 10
    config.save_every = 100
    config.keep = 2
    config.best = ""
    config.max_skipped = 10
    return config
