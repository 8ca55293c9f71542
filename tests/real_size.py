"""The real sizes, with random weights: writes checkpoints under the official names, converts them, and runs Wan's networks.

    PYTHONPATH=. python tests/real_size.py [FOLDER]

Needs 7 GB of disk in FOLDER (default: a temporary one) and 10 GB of memory. 14B and UMT5-XXL are converted by shapes alone.
"""

import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rfjax import config, convert, dit, parameters, rollout, sampler, tensorfile, tree
from rfjax.stream import stream_step

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/wan_1_3b.py"
SHAPES = json.loads((ROOT / "tests/golden/official_state_dict_shapes.json").read_text())
MODULES = {"wan2.1_t2v_1.3b": "dit", "wan2.1_t2v_14b": "dit", "wan2.1_vae": "vae", "umt5_xxl_encoder": "umt5"}
DTYPES = {"dit": jnp.bfloat16, "vae": np.float32}


def write_random(path: Path, official: dict[str, list[int]], dtype) -> None:
    """A checkpoint of random numbers under official names, tensor by tensor."""
    rng = np.random.default_rng(0)

    def draw(shape):
        return (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype)

    entries = [
        tensorfile.Entry(
            name, tensorfile.Kind(tuple(shape), np.dtype(dtype)), [functools.partial(draw, shape)]
        )
        for name, shape in official.items()
    ]
    tensorfile.write(path, entries)


def convert_apart(source: Path, folder: Path) -> None:
    """Converts in a process of its own and tells its time and its peak memory."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "rfjax.convert", str(source), str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"converting {source} failed"
    size, peak = source.stat().st_size, usage.ru_maxrss * 1024
    print(
        f"{source.name}: {size / 1e9:.2f} GB converted in {time.perf_counter() - started:.0f} s, "
        f"peak memory {peak / 1e9:.2f} GB, {peak / size:.2f} of its size"
    )


def convert_abstract(name: str) -> None:
    """All names and shapes of a checkpoint that is too large to write here, and back."""
    kinds = {key: tensorfile.Kind(tuple(shape), np.dtype(np.float32)) for key, shape in SHAPES[name].items()}
    entries = convert.to_ours(tensorfile.Source(kinds, None), MODULES[name])
    back = convert.to_torch(
        tensorfile.Source({entry.name: entry.kind for entry in entries}, None), MODULES[name]
    )
    assert {entry.name: entry.kind for entry in back} == kinds
    print(f"{name}: {len(kinds)} tensors → {len(entries)} of ours → the same {len(back)}, by shapes")


def abstract_window(settings) -> None:
    """One step of a stream at 832×480, by shapes."""
    video, network, vae, roll = sampler.sections(settings)
    latent = sampler.latent_size(video, vae, network)
    model, state = jax.eval_shape(functools.partial(abstract_stream, network, roll, latent))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    _, block = jax.eval_shape(
        lambda model, state, keys: stream_step(model, "rolling", keys, np.int32(9), state),
        model,
        state,
        keys,
    )
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    print(
        f"a step at {video.width}x{video.height}: a block of {list(block.shape)}, cache {cache / 1e9:.2f} GB"
    )


def abstract_stream(network, roll, latent):
    params = parameters.initial("dit", network, jax.random.key(0))
    context = jnp.zeros((1, network.text_len, network.text_dim), network.dtype)
    module = dit.DiT(network)
    model = rollout.Model(module, params, module.apply({"params": params}, context, method="text_kv"), roll)
    return model, rollout.METHODS["rolling"].init(model, 1, (roll.block_frames, *latent))


def sample_small(settings, folder: Path) -> None:
    """The converted 1.3B and VAE for real, at 64×64: a second of video."""
    settings.video.update({"height": 64, "width": 64})
    del settings.umt5  # its place is taken by random features of a prompt
    settings.text = {"text_len": 512, "text_dim": 4096}
    started = time.perf_counter()
    model = sampler.load(settings, str(folder))
    loaded = time.perf_counter()
    frames = 0
    for block in model.decode(model.latents(["a red circle"], 0, model.latent_frames(33))):
        frames += block.shape[1]
        assert block.std() > 0
        print(f"  {frames} frames after {time.perf_counter() - loaded:.0f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = sum(leaf.nbytes for leaf in tree.flatten(model.params).values())
    print(
        f"1.3B at 64x64: loaded in {loaded - started:.0f} s, parameters {size / 1e9:.2f} GB, peak memory {peak / 1e9:.2f} GB"
    )


def main(folder: Path) -> None:
    for name in ("wan2.1_t2v_14b", "umt5_xxl_encoder"):
        convert_abstract(name)
    settings = config.load(CONFIG)
    abstract_window(settings)
    for name in ("wan2.1_vae", "wan2.1_t2v_1.3b"):
        source = folder / f"{name}.safetensors"
        write_random(source, SHAPES[name], DTYPES[MODULES[name]])
        convert_apart(source, folder)
    sample_small(settings, folder)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
