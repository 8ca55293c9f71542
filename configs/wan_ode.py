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

BASE = runpy.run_path(str(Path(__file__).parent / "wan_teacher_forcing.py"))["get_config"]


def get_config() -> ConfigDict:
    config = BASE()
    config.stage = "ode"
    config.prompts = "data/prompts"
    config.data = "data/wan_ode"
    config.made_by = "python -m rfjax.data ode-pairs --config configs/wan_ode.py"
    config.teacher = config.init_from
    config.guidance = 5.0
    config.solver_steps = 50
    config.shards = 24
    config.optimizer.learning_rate = 2e-6
    return config
