"""`python tests/shown.py FOLDER HOST:PORT I`: process I of two shows and judges clips, and writes them to FOLDER/STAGE_I.npz.

Both together must make what the first makes of the transformer's by itself on its own device.
"""

import os
import sys
from pathlib import Path

import meshes

os.environ["XLA_FLAGS"] = ""  # one device a process

import jax
import numpy as np

from rfjax import distributed, sharding


def main(folder: Path, address: str, process: int) -> None:
    jax.config.update("jax_disable_most_optimizations", True)
    distributed.start(address, 2, process)
    both = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2))
    alone = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
    meshes.weights(folder)  # process 0 writes
    distributed.agree(True)
    found = {stage: meshes.shown_on(both, stage, folder) for stage in ("teacher", "vae")}
    for stage, (clips, value) in found.items():
        np.savez(folder / f"{stage}_{process}.npz", clips=clips, value=value)
    if process == 0:
        meshes.assert_same_shown(found["teacher"], meshes.shown_on(alone, "teacher", folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
