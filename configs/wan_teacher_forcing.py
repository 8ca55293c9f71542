"""Teacher forcing of Wan 2.1 1.3B on videos of your own: the bidirectional network becomes causal. 832×480, 21 latent frames (5 s).

    python -m rfjax.data encode-videos videos/ --config configs/wan_teacher_forcing.py
    python train.py --config configs/wan_teacher_forcing.py --workdir runs/wan_teacher_forcing

weights/wan_1_3b holds dit, vae and umt5.safetensors and tokenizer.json of Wan 2.1 (docs/wan.md). The mesh below is for 8 devices,
learning rate and steps are guesses: never run at this size.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

training = runpy.run_path(str(Path(__file__).parent / "wan_1_3b.py"))["training"]


def get_config() -> ConfigDict:
    return training(
        "teacher_forcing",
        weights="weights/wan_1_3b",
        init_from="weights/wan_1_3b/dit.safetensors",
        vae_weights="weights/wan_1_3b/vae.safetensors",
        data="data/videos",
        made_by="python -m rfjax.data encode-videos FOLDER --config configs/wan_teacher_forcing.py",
        record_frames=21,
        record_batch=8,  # clips that are encoded at a time, over the devices of a process
        shard_records=64,  # videos of a shard
        optimizer={"learning_rate": 1e-5, "warmup": 100, "weight_decay": 0.01, "ema_decay": 0.999},
        save_every=250,
    )
