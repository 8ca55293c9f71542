"""`python tests/two_devices.py CONFIG`: a stage's steps with everything split over two devices; prints the metrics as JSON."""

import json
import sys
import tempfile

import conftest  # noqa: F401  strict JAX
import jax

import train
from rfjax import checkpoint, config, data, sharding
from rfjax.stages import STAGES, sources

settings = config.load(sys.argv[1])
stage, mesh = STAGES[settings.stage], sharding.make_mesh(config.build(sharding.MeshConfig, settings, "mesh"))
batches = data.iterate(stage.data(settings))
with tempfile.TemporaryDirectory() as folder:
    state, _ = train.begin(settings, stage, mesh, checkpoint.Checkpoints(folder, 1, settings.stage), batches)
split = [x for x in jax.tree.leaves(state) if len(x.sharding.device_set) == 2 and not x.is_fully_replicated]
assert split, "no parameter is split over the devices"
fixed = sources.load(stage.frozen(settings), jax.random.key(settings.seed), mesh)
update, told = stage.update(settings), []
for step in range(settings.steps):
    state, metrics = update(state, fixed, sharding.put_batch(next(batches), mesh), step)
    told.append({name: float(value) for name, value in metrics.items()})
print(json.dumps(told))
