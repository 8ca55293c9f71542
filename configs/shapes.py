"""The small world, 64×64 at 16 frames a second: sizes of its networks, for sampling and for training.

python sample.py --prompt "a large red circle bouncing over a blue background" --seconds 60 --out clip.mp4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.prompt = "a large red circle bouncing over a blue background"
    config.weights = "shapes"
    config.video = ConfigDict({"height": 64, "width": 64, "fps": 16})
    config.world = ConfigDict({"size": 64, "fps": 16, "objects": 1})
    config.vae = ConfigDict({"dim": 8, "z_dim": 16, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 1})
    config.text = ConfigDict({"text_len": 16, "text_dim": 48})
    config.dit = ConfigDict(
        {
            "dim": 192,
            "ffn_dim": 768,
            "num_heads": 6,
            "num_layers": 6,
            "in_dim": 16,
            "freq_dim": 128,
            "rope_base": 100.0,
            "text_len": 16,
            "text_dim": 48,
        }
    )
    config.rollout = ConfigDict({"steps": (1000, 800, 600, 400, 200), "shift": 5.0, "block_frames": 3})
    return config


def training(stage: str, variant: str, quick: dict, **settings) -> ConfigDict:
    """The model's config with what every stage needs; `settings` are the stage's own.

    The variant "quick" (`--config configs/shapes_vae.py:quick`) replaces some by `quick`, and works on files of its own.
    """
    if variant not in ("", "quick"):
        raise ValueError(f"there is no variant {variant!r}; give none, or quick")
    config = get_config()
    config.stage = stage
    config.dit.unroll = True
    config.seed = 0
    config.accumulate = 1  # micro-batches that a batch is split into, for memory
    config.log_every = 20
    config.keep = 2
    config.best = ""  # a measured value, such as right_shape, whose best checkpoint is kept too
    config.max_skipped = 10  # updates in a row without a finite gradient that end the run
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1})
    config.lora = ConfigDict(
        {"rank": 0, "alpha": 0.0, "targets": "blocks/(self|cross)_[qkvo]"}
    )  # rank 0: train everything
    config.vae_weights = "runs/vae/vae.safetensors"
    config.judged = 16  # held-out clips on which the detector judges a stage
    for name, value in (settings | (quick if variant else {})).items():
        config[name] = ConfigDict(value) if isinstance(value, dict) else value
    if variant:
        for name, value in config.items():
            if isinstance(value, str):
                for old, new in (("runs/", "runs/quick/"), ("data/", "data/quick/"), (".py", ".py:quick")):
                    value = value.replace(old, new)
                config[name] = value
    return config
