"""The small world's bidirectional teacher, second part: clips of 21 latent frames (5 s), from the first part's weights.

    python train.py --config configs/shapes_teacher_long.py --workdir runs/teacher_long

Expected: on held-out captions, colour, background and size right, shape in 8 to 9 clips of 10, the named motion in 4 of 10 (of 16
captions the run that shipped had 12 right, of 64 it had 27). 1.6 hours on 2 CPU cores at 2.1 steps a second.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "shapes.py"))["training"]


def get_config(variant: str = "") -> ConfigDict:
    return training(
        "teacher",
        variant,
        quick={"steps": 500},
        steps=12000,
        batch_size=8,
        frames=21,
        init_from="runs/teacher/dit.safetensors",
        optimizer={
            "name": "muon",
            "learning_rate": 2e-3,
            "warmup": 100,
            "final": 0.1,
            "clip": 1.0,
            "ema_decay": 0.998,
        },
        guidance=2.0,
        solver_steps=15,
        save_every=2000,
        data="data/latents",
        made_by="python -m rfjax.data latents --config configs/shapes_teacher.py",
    )
