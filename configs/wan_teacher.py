"""A bidirectional Wan 2.1 1.3B goes on learning from videos of your own, to teach with afterwards. 832×480, 21 latent frames (5 s).

    python -m rfjax.data encode-videos videos/ --config configs/wan_teacher_forcing.py
    python train.py --config configs/wan_teacher.py --workdir runs/wan_teacher

weights/wan_1_3b as in configs/wan_teacher_forcing.py; docs/training.md says how a distillation takes it as its teacher. Learning
rate and steps are guesses: never run at this size.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "wan_1_3b.py"))["training"]


def get_config() -> ConfigDict:
    return training(
        "teacher",
        weights="weights/wan_1_3b",
        init_from="weights/wan_1_3b/dit.safetensors",
        vae_weights="weights/wan_1_3b/vae.safetensors",
        data="data/videos",
        made_by="python -m rfjax.data encode-videos FOLDER --config configs/wan_teacher_forcing.py",
        guidance=5.0,  # of the samples that it shows
        solver_steps=50,
        optimizer={"learning_rate": 1e-5, "warmup": 100, "weight_decay": 0.01, "ema_decay": 0.999},
        save_every=250,
    )
