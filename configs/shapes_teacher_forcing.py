"""Teacher forcing: the other way to the small world's causal student, from the teacher's weights and the latents of clips alone.

    python train.py --config configs/shapes_teacher_forcing.py --workdir runs/teacher_forcing

Takes the place of `configs/shapes_ode.py`, and needs no trajectories: distil from it with
`--config.init_from=runs/teacher_forcing/dit.safetensors`. Not run to its end: the mean loss of its first 20 steps was 0.213, and no
clip of it was judged. Settings are those of `configs/shapes_ode.py`.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "shapes.py"))["training"]


def get_config(variant: str = "") -> ConfigDict:
    return training(
        "teacher_forcing",
        variant,
        quick={"steps": 300},
        steps=600,
        batch_size=8,
        frames=21,
        method="rolling",
        init_from="runs/teacher_long/dit.safetensors",
        optimizer={
            "name": "muon",
            "learning_rate": 1e-3,
            "warmup": 50,
            "final": 0.1,
            "clip": 1.0,
            "ema_decay": 0.995,
        },
        save_every=300,
        data="data/latents",
        made_by="python -m rfjax.data latents --config configs/shapes_teacher.py",
    )
