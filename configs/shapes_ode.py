"""ODE initialisation of the small world's causal student, from the teacher's guided trajectories.

    python -m rfjax.data ode-pairs --config configs/shapes_ode.py
    python train.py --config configs/shapes_ode.py --workdir runs/ode

Expected: rolled out for 5 s, colour, background and size right, shape in 9 clips of 10, motion in half. 6 minutes for 640
trajectories and 6 for the training on 2 CPU cores (1.7 steps a second).
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "shapes.py"))["training"]


def get_config(variant: str = "") -> ConfigDict:
    return training(
        "ode",
        variant,
        quick={"steps": 300, "shards": 2},
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
        data="data/ode",
        made_by="python -m rfjax.data ode-pairs --config configs/shapes_ode.py",
        teacher="runs/teacher_long/dit.safetensors",
        guidance=2.0,
        solver_steps=15,
        record_frames=21,
        record_batch=8,
        shard_records=64,
        shards=10,
    )
