"""Wan 2.1 T2V 1.3B with the few-step weights of Rolling Forcing, 832×480 at 16 frames a second.

    python sample.py --config configs/wan_1_3b.py --prompt "…" --seconds 30 --out clip.mp4
    python sample.py --config configs/wan_1_3b.py --weights gdhe17/Self-Forcing --method self_forcing --prompt "…"

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
