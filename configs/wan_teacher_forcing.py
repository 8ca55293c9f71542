"""Teacher forcing of Wan 2.1 1.3B on videos of your own: the bidirectional network becomes causal. 832×480, 21 latent frames (5 s).

    python -m rfjax.data encode-videos videos/ --config configs/wan_teacher_forcing.py
    python train.py --config configs/wan_teacher_forcing.py --workdir runs/wan_teacher_forcing

weights/wan_1_3b holds dit, vae and umt5.safetensors and tokenizer.json of Wan 2.1 (docs/wan.md). The mesh below is for 8 devices,
learning rate and steps are guesses: never run at this size.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

BASE = runpy.run_path(str(Path(__file__).parent / "wan_1_3b.py"))["get_config"]


def get_config() -> ConfigDict:
    config = BASE()
    config.stage = "teacher_forcing"
    config.seed = 0
    config.weights = "weights/wan_1_3b"
    config.negative_prompt = ""
    config.dit.remat = True
    config.init_from = "weights/wan_1_3b/dit.safetensors"
    config.vae_weights = "weights/wan_1_3b/vae.safetensors"
    config.data = "data/videos"
    config.made_by = "python -m rfjax.data encode-videos FOLDER --config configs/wan_teacher_forcing.py"
    config.record_frames = 21
    config.record_batch = 8  # clips that are encoded at a time, over the devices of a process
    config.shard_records = 64  # videos of a shard
    config.mesh = ConfigDict({"data": 1, "fsdp": 8, "context": 1})
    config.batch_size = 8
    config.lora = ConfigDict(
        {"rank": 0, "alpha": 0.0, "targets": "blocks/(self|cross)_[qkvo]"}
    )  # rank 0: train everything
    config.accumulate = 1
    config.steps = 3000
    config.frames = 21
    config.method = "rolling"
    config.optimizer = ConfigDict(
        {"learning_rate": 1e-5, "warmup": 100, "weight_decay": 0.01, "ema_decay": 0.999}
    )
    config.log_every = 10
    config.save_every = 250
    config.keep = 2
    config.best = ""
    config.max_skipped = 10
    return config
