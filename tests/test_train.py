import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import av
import jax
import numpy as np
import pytest

import train
from rfjax import checkpoint, config, data, files, metrics, shapes
from rfjax.errors import UserError
from rfjax.stages import sources, vae
from rfjax.vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]
DEBUG = str(ROOT / "configs" / "shapes_debug.py")


def debug(**changes):
    settings = config.load(DEBUG)
    settings.world.fps = 8  # and config.video.fps, which is not what trains, stays 16
    settings.update({"steps": 4, "save_every": 2, "log_every": 1} | changes)
    return settings


def lines(workdir, drop=("steps_per_second",)):
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in drop} for line in read]


def final_state(workdir):
    return checkpoint.Checkpoints(workdir / "checkpoints", 2, "vae").restore(fresh())


def fresh():
    """The shapes of a state before the first step."""
    return jax.eval_shape(functools.partial(vae.init, debug()), sources.shapes(vae.networks(debug())))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps that nothing interrupted, with its checkpoints of steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("finished")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Some donated buffers")
        train.train(debug(), workdir)
    return workdir


def test_run_leaves_parameters_with_latent_statistics_samples_and_metrics(finished):
    params = checkpoint.load_params(finished / "vae.safetensors", fresh().params)
    settings = debug()
    network = VAE(config.build(VAEConfig, settings, "vae"))
    encode = jax.jit(functools.partial(network.apply, {"params": params}, method="encode"))
    world = config.build(shapes.World, settings, "world")
    clips = [data.clips(settings.frames, 1, settings.seed, world)[i]["video"] for i in range(64)]
    latents = np.concatenate([encode(clip / np.float32(127.5) - 1)[0].reshape(-1, 16) for clip in clips])
    np.testing.assert_allclose(params["latent_mean"], latents.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(params["latent_std"], latents.std(0), rtol=1e-4, atol=1e-5)
    assert (
        sorted(path.suffix for path in (finished / "samples").glob("000004_*")) == [".mp4"] * 4 + [".png"] * 4
    )
    assert [line["step"] for line in lines(finished)] == [1, 2, 2, 3, 4, 4]
    with av.open(str(finished / "samples" / "000004_0.mp4")) as clip:
        assert clip.streams.video[0].average_rate == 8


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    (tmp_path / "vae.safetensors").unlink()
    train.train(debug(), tmp_path)
    whole, resumed = final_state(finished), final_state(tmp_path)
    assert whole.data == resumed.data
    jax.tree.map(np.testing.assert_array_equal, whole.state, resumed.state)
    assert lines(finished) == lines(tmp_path)
    assert (finished / "vae.safetensors").read_bytes() == (tmp_path / "vae.safetensors").read_bytes()


def test_a_save_that_was_not_told_of_is_told_of_when_the_run_goes_on(finished, tmp_path):
    """Stopped after the checkpoint of step 2, before it was judged and shown."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    for sample in (tmp_path / "samples").glob("000002_*"):
        sample.unlink()
    read = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(read[:2]))
    train.train(debug(), tmp_path)
    assert lines(finished) == lines(tmp_path)
    assert len(list((tmp_path / "samples").glob("000002_*"))) == 8


def test_one_run_at_a_time_works_in_a_folder(tmp_path):
    (tmp_path / "w").mkdir()
    with files.locked(tmp_path / "w", "wait"):
        with pytest.raises(UserError, match="Another command writes to .* just now; use another --workdir"):
            train.train(debug(), tmp_path / "w")


def test_a_run_s_own_folder_gives_no_vae_for_latents(finished):
    """Its checkpoints lack the statistics that its exported file has."""
    with pytest.raises(UserError, match="give .*/vae.safetensors"):
        checkpoint.load_params(finished, fresh().params)


def test_a_line_of_its_own_says_that_a_step_was_judged(tmp_path):
    """Also where nothing is measured, as without a world whose captions say what is right."""
    log = metrics.Log(tmp_path, 1)
    log.scalars(2, {"loss": 1.0})
    assert not log.has(2, []) and not log.has(2, ["right_shape"])
    log.scalars(2, {})
    assert log.has(2, []) and not log.has(4, [])
    log.scalars(4, {"right_shape": 1.0})
    assert log.has(4, ["right_shape", "right_motion"]) and not log.has(4, [])
    log.close()


def test_means_are_of_the_steps_that_have_a_metric():
    steps = [{"critic": 1.0}, {"critic": 3.0, "generator": 4.0}, {"critic": float("nan"), "generator": 6.0}]
    assert metrics.means(steps) == {"critic": 2.0, "generator": 5.0}


def test_finished_run_writes_its_parameters_again(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vae.safetensors").unlink()
    train.train(debug(), tmp_path)
    assert (finished / "vae.safetensors").read_bytes() == (tmp_path / "vae.safetensors").read_bytes()


def test_psnr_of_an_error_of_a_tenth_of_the_range_is_20_db():
    video = np.zeros((1, 1, 4, 4, 3), np.float32)
    assert float(vae.psnr(video + 0.2, video)) == pytest.approx(20, abs=1e-4)


def command(*flags):
    return [sys.executable, "train.py", *flags]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config", DEBUG, "--workdir", "{}/w", "--config.stepz=3"], "Did you mean 'steps'?"),
        (["--config", "configs/shapes_debu.py", "--workdir", "{}/w"], "did you mean configs/shapes_debug.py"),
        (["--config", "configs/shapes.py", "--workdir", "{}/w"], "config.stage must be one of"),
        (["--config", DEBUG, "--workdir", "{}/file/w"], "Not a directory"),
        (["--config", DEBUG, "--workdir", "{}/file"], "is a file; give --workdir a folder"),
        (["--workdir", "{}/w"], "Give --config"),
        (["--config", DEBUG, "--workdir", "{}/w", "--distributed"], "give --coordinator HOST:PORT"),
    ],
)
def test_mistake_is_one_sentence(flags, words, tmp_path):
    (tmp_path / "file").touch()
    quiet = os.environ | {"JAX_PLATFORMS": "cpu"}  # a libtpu that finds no TPU tells of it
    asked = command(*[flag.format(tmp_path) for flag in flags])
    done = subprocess.run(asked, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    run = subprocess.Popen(
        command("--config", DEBUG, "--workdir", str(tmp_path), "--config.steps=100000"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or not lines(tmp_path):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    told, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "run the same command to go on" in told
    assert int(max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name)).name) == final_step(
        told
    )


def final_step(told):
    return int(told.split("after step ")[1].split(";")[0])
