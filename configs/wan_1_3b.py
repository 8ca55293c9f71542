"""Wan 2.1 T2V 1.3B with the few-step weights of Rolling Forcing, 832×480 at 16 frames a second.

    python sample.py --config configs/wan_1_3b.py --prompt "…" --seconds 30 --out clip.mp4

The public weights are fetched from the hub at the first run (the text encoder alone has 11 GB) and converted once. They carry
their own terms.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.prompt = (
        "A red fox trots through fresh snow at the edge of a pine forest in soft morning light, its breath a small cloud in the "
        "cold air. The camera moves beside it at the height of its eyes."
    )
    config.weights = "TencentARC/RollingForcing"
    config.decoder = "vae"  # or "tiny": TAEHV, a hundredth of the cost
    config.video = ConfigDict({"height": 480, "width": 832, "fps": 16})
    config.vae = ConfigDict({"dim": 96, "dtype": "bfloat16"})
    config.tiny = ConfigDict({"dtype": "bfloat16"})
    config.umt5 = ConfigDict({"dtype": "bfloat16"})
    config.dit = ConfigDict(
        {
            "dim": 1536,
            "ffn_dim": 8960,
            "num_heads": 12,
            "num_layers": 30,
            "in_dim": 16,
            "freq_dim": 256,
            "text_len": 512,
            "text_dim": 4096,
            "dtype": "bfloat16",
        }
    )
    config.rollout = ConfigDict({"steps": (1000, 800, 600, 400, 200), "shift": 5.0, "block_frames": 3})
    return config


def training(stage: str, **settings) -> ConfigDict:
    """The model's config with what every stage needs, on 8 devices; `settings` are the stage's own."""
    config = get_config()
    config.stage = stage
    config.seed = 0
    config.dit.remat = True
    config.negative_prompt = ""
    config.mesh = ConfigDict({"data": 1, "fsdp": 8, "context": 1})
    config.batch_size = 8
    config.accumulate = 1  # micro-batches that a batch is split into, for memory
    config.lora = ConfigDict(
        {"rank": 0, "alpha": 0.0, "targets": "blocks/(self|cross)_[qkvo]"}
    )  # rank 0: train everything
    config.steps = 3000
    config.frames = 21
    config.method = "rolling"
    config.log_every = 10
    config.keep = 2
    config.best = ""
    config.max_skipped = 10  # updates in a row without a finite gradient that end the run
    for name, value in settings.items():
        config[name] = ConfigDict(value) if isinstance(value, dict) else value
    return config
