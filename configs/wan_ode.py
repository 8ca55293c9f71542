"""ODE initialisation of a causal Wan 2.1 1.3B, from its own guided trajectories. 832×480, 21 latent frames (5 s).

    python -m rfjax.data encode-prompts prompts.txt --config configs/wan_ode.py
    python -m rfjax.data ode-pairs --config configs/wan_ode.py
    python train.py --config configs/wan_ode.py --workdir runs/wan_ode

A trajectory takes 100 passes of the network and 30 MB of disk. weights/wan_1_3b as in configs/wan_teacher_forcing.py; never run
at this size.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "wan_1_3b.py"))["training"]


def get_config() -> ConfigDict:
    return training(
        "ode",
        weights="weights/wan_1_3b",
        init_from="weights/wan_1_3b/dit.safetensors",
        vae_weights="weights/wan_1_3b/vae.safetensors",
        prompts="data/prompts",
        data="data/wan_ode",
        made_by="python -m rfjax.data ode-pairs --config configs/wan_ode.py",
        teacher="weights/wan_1_3b/dit.safetensors",
        guidance=5.0,
        solver_steps=50,
        record_frames=21,
        record_batch=8,  # clips that are made at a time, over the devices of a process
        shard_records=64,
        shards=24,
        optimizer={"learning_rate": 2e-6, "warmup": 100, "weight_decay": 0.01, "ema_decay": 0.999},
        save_every=250,
    )
