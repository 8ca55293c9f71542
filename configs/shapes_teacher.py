"""The small world's bidirectional teacher, first part: short clips (6 latent frames), where appearance is learnt cheaply.

    python -m rfjax.data latents --config configs/shapes_teacher.py
    python train.py --config configs/shapes_teacher.py --workdir runs/teacher

Expected: after 4,000 steps, on held-out captions, colour, background and size right, shape in about 8 clips of 10; of motion,
clips this short tell little. 15 minutes for the latents and 40 for the training on 2 CPU cores (1.7 steps a second).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "shapes.py"))["training"]


def get_config(variant: str = "") -> ConfigDict:
    return training(
        "teacher",
        variant,
        quick={"steps": 1600, "shards": 6},
        steps=4000,
        batch_size=24,
        frames=6,
        init_from="",
        optimizer={
            "name": "muon",
            "learning_rate": 3e-3,
            "warmup": 100,
            "final": 0.1,
            "clip": 1.0,
            "ema_decay": 0.998,
        },
        guidance=2.0,
        solver_steps=15,
        save_every=1000,
        data="data/latents",
        made_by="python -m rfjax.data latents --config configs/shapes_teacher.py",
        record_frames=21,
        record_batch=8,
        shard_records=128,
        shards=24,
    )
