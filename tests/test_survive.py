"""What befalls a run: kills, signals, broken gradients and files, another mesh. The stage is `line`, in two processes at times."""

import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import line
import numpy as np
import pytest
from safetensors.numpy import load_file

import train
from rfjax import checkpoint, data, distributed, sharding
from rfjax.errors import UserError
from rfjax.stages import sources

ROOT = Path(__file__).parents[1]


def settings(**changes):
    config = line.get_config()
    config.update(changes)
    return config


def like():
    networks = line.networks(settings())
    return jax.eval_shape(functools.partial(line.init, settings()), sources.shapes(networks))


def last(workdir):
    """The newest checkpoint, read on one device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like())
    with checkpoint.Checkpoints(workdir / "checkpoints", 3, "line") as kept:
        return kept.restore(places)


def steps(workdir):
    """Of the complete checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def lines(workdir):
    path = workdir / "metrics.jsonl"
    read = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in row.items() if name != "steps_per_second"} for row in read]


def assert_same(left, right):
    assert (left.step, left.data) == (right.step, right.data)
    jax.tree.map(np.testing.assert_array_equal, left.state, right.state)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process on one device that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("alone")
    train.train(settings(), workdir)
    return workdir


# Two processes


class Pair:
    """Two processes of one run, each with one device or more, the parameters split over two."""

    def __init__(self, workdir, *more, pause=0.0, devices=1):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flags = [
            "--config",
            "tests/line.py:split",
            "--workdir",
            str(workdir),
            "--coordinator",
            address,
            *more,
        ]
        host = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
        self.workdir = workdir
        self.processes = [
            subprocess.Popen(
                [sys.executable, "tests/line.py", *flags, "--processes", "2", "--process", str(process)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | host | {"PYTHONPATH": ".", "PAUSE": str(pause)},
            )
            for process in (0, 1)
        ]

    def wait_until(self, ready):
        deadline = time.monotonic() + 300
        while not ready():
            assert all(process.poll() is None for process in self.processes) and time.monotonic() < deadline
            time.sleep(0.05)

    def end(self):
        """Exit codes and what was told, by process."""
        told = [process.communicate(timeout=300)[0] for process in self.processes]
        return [process.returncode for process in self.processes], told


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("pair")
    codes, told = Pair(workdir).end()
    assert codes == [0, 0], told
    return workdir


def test_two_processes_train_as_one(pair, alone):
    both, one = last(pair), last(alone)
    assert (both.step, both.data) == (one.step, one.data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), both.state, one.state)
    names = "checkpoints config.json line.safetensors metrics.jsonl samples tensorboard".split()
    assert sorted(path.name for path in pair.iterdir()) == names
    assert len(list((pair / "tensorboard").iterdir())) == 1
    averages = checkpoint.load_params(pair / "line.safetensors", like().params)
    jax.tree.map(np.testing.assert_array_equal, averages, both.state.ema)


def test_stopped_killed_and_damaged_run_of_two_processes_ends_as_the_uninterrupted_one(pair, tmp_path):
    run = Pair(tmp_path, pause=1)
    run.wait_until(lambda: lines(tmp_path))
    run.processes[1].send_signal(signal.SIGTERM)  # one is told, both stop, after the same step
    codes, told = run.end()
    assert codes == [0, 0], told
    stop = last(tmp_path).step
    assert f"Stopped and saved after step {stop};" in told[0] and "Stopped" not in told[1]
    assert stop < 12 and lines(tmp_path)[-1]["step"] == stop

    run = Pair(tmp_path, pause=0.5)
    run.wait_until(lambda: lines(tmp_path)[-1]["step"] > 8 and steps(tmp_path)[-1] == 8)
    run.processes[1].kill()
    codes, told = run.end()  # the other notices, and ends too
    assert codes[1] == -signal.SIGKILL and codes[0] == 2, told
    manifest = tmp_path / "checkpoints" / "8" / "state" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-9])

    codes, told = Pair(tmp_path).end()
    assert codes == [0, 0], told
    assert "step 8 is damaged" in told[0] and "damaged" not in told[1]
    assert_same(last(tmp_path), last(pair))
    assert lines(tmp_path) == lines(pair)
    assert (tmp_path / "line.safetensors").read_bytes() == (pair / "line.safetensors").read_bytes()


def test_run_of_two_processes_goes_on_in_two_on_a_mesh_of_another_shape(pair, tmp_path):
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    (tmp_path / "line.safetensors").unlink()
    codes, told = Pair(tmp_path, "--config.mesh.fsdp=4", devices=2).end()
    assert codes == [0, 0], told
    assert (tmp_path / "line.safetensors").read_bytes() == (pair / "line.safetensors").read_bytes()


def test_what_one_process_cannot_write_is_told_by_both_in_a_sentence(tmp_path):
    (tmp_path / "line.safetensors").mkdir()  # process 0 fails to rename to it, and process 1 waits for it
    codes, told = Pair(tmp_path).end()
    assert codes == [2, 2], told
    for process, start in enumerate(("error: ", "error: process 0 failed: ")):
        assert "Traceback" not in told[process], told
        (line,) = [line for line in told[process].splitlines() if "error: " in line]
        assert line.startswith(start) and "Is a directory" in line and "line.safetensors" in line


@pytest.mark.parametrize("begins", ["from its checkpoint", "from a file"])
def test_eight_devices_hold_the_parameters_of_one(begins, alone, tmp_path):
    flags = ["--config", "tests/line.py", "--workdir", str(tmp_path), "--config.mesh.fsdp=4"]
    if begins == "from a file":
        flags += [f"--config.init_from={alone}/line.safetensors", "--config.steps=0"]
    else:
        shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
        (tmp_path / "line.safetensors").unlink()
    devices = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": ".",
    }
    subprocess.run([sys.executable, "tests/line.py", *flags], cwd=ROOT, check=True, env=os.environ | devices)
    assert (tmp_path / "line.safetensors").read_bytes() == (alone / "line.safetensors").read_bytes()


def test_rows_of_all_processes_make_the_batch_of_one():
    whole = line.data(settings(batch_size=8))
    shares = [data.share(line.data, settings(batch_size=8), mine, 4) for mine in ([0, 3], [1, 2])]
    iterators = [data.iterate(share) for share in shares]
    for batch in range(3):
        parts = [next(iterator) for iterator in iterators]
        for name, rows in whole[batch].items():
            order = [0, 1, 6, 7], [2, 3, 4, 5]  # the rows of parts 0 and 3, and of 1 and 2
            for part, index in zip(parts, order, strict=True):
                np.testing.assert_array_equal(part[name], rows[list(index)])
    assert iterators[0].get_state() == data.iterate(whole).get_state() | {"next_index": 3}


@pytest.mark.parametrize("context, parts", [(1, [[0, 2], [1, 3]]), (2, [[0, 1], [0, 1]])])
def test_processes_along_the_context_axis_feed_the_same_rows(context, parts, monkeypatch):
    class Device:
        def __init__(self, process):
            self.process_index = process

    class Mesh:  # four devices, of processes 0, 1, 0, 1
        devices = np.array([Device(process) for process in (0, 1, 0, 1)]).reshape(-1, 1, context)
        shape = {"context": context}

    for process, mine in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.batch_parts(Mesh) == (mine, 4 // context)


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, True),
        ({"TPU_PROCESS_ADDRESSES": "10.0.0.1:8471"}, False),
        ({"TPU_PROCESS_ADDRESSES": "10.0.0.1:8471,10.0.0.2:8471"}, True),
    ],
)
def test_launchers_of_several_processes_are_recognised(environment, several, monkeypatch):
    for name in distributed.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.detected() == several


# Gradients that are not finite


def test_broken_batches_change_nothing_but_the_count(tmp_path):
    config = settings(steps=6, broken=(3, 5))
    train.train(config, tmp_path)
    found = last(tmp_path).state
    whole, update = line.data(config), line.update(settings(steps=6))
    mesh = sharding.make_mesh(sharding.MeshConfig())
    params = sources.load(line.networks(config), jax.random.key(config.seed), mesh)
    now = jax.jit(functools.partial(line.init, config))(params)
    for step in (0, 1, 2, 5):
        now, _ = update(now, {}, whole[step], step)
    jax.tree.map(np.testing.assert_array_equal, found.replace(skipped=now.skipped), now)
    np.testing.assert_array_equal(found.skipped, [0, 2])
    told = [row for row in lines(tmp_path) if "skipped" in row]
    assert [row["skipped"] for row in told] == [0, 0, 0, 1, 2, 2]
    assert ["loss" in row for row in told] == [True, True, True, False, False, True]


def test_run_stops_when_too_many_updates_are_skipped_in_a_row(tmp_path):
    with pytest.raises(
        UserError,
        match="not finite in the last 3 updates until step 8: begin in another --workdir .*checkpoints",
    ):
        train.train(settings(broken=(5, 99)), tmp_path)
    assert steps(tmp_path) == [4] and int(last(tmp_path).state.step) == 4


# The run's folder


def test_best_checkpoint_stays(tmp_path):
    train.train(settings(save_every=2, keep=1, best="middle"), tmp_path)
    assert steps(tmp_path) == [6, 12]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 6, "metric": "middle", "value": 0}
    train.train(settings(save_every=2, keep=1, steps=6), tmp_path / "short")
    best, then = (
        load_file(folder / "line.safetensors") for folder in (tmp_path / "best", tmp_path / "short")
    )
    assert best.keys() == then.keys() and all((best[name] == then[name]).all() for name in best)


def test_a_run_that_saved_nothing_may_begin_anew_by_another_config(tmp_path):
    with pytest.raises(UserError, match="begin in another --workdir"):
        train.train(settings(broken=(0, 99), save_every=99), tmp_path)
    train.train(settings(seed=1), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize(
    "name", ["batch_size", "save_every", "log_every", "keep", "max_skipped", "accumulate"]
)
def test_count_of_nothing_is_told_before_anything_is_there(name, tmp_path):
    for value in (0, -1):
        with pytest.raises(UserError, match=f"config.{name} is {value}; set it to a whole number, 1 or more"):
            train.train(settings(**{name: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"best": "top"}, "'top', which stage 'line' does not measure; it measures middle"),
        ({"stage": "lime"}, "config.stage must be one of vae, .*, line, not 'lime'"),
        ({"steps": -1}, "config.steps is -1; set it to a whole number, 0 or more"),
    ],
)
def test_what_a_run_cannot_do_is_told_before_anything_is_there(changes, says, tmp_path):
    with pytest.raises(UserError, match=says):
        train.train(settings(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["save_every", "seed", "accumulate", "init_from", "mesh", "optimizer"])
def test_field_that_the_config_lacks_is_told_before_anything_is_there(name, tmp_path):
    config = settings()
    del config[name]
    lacks = (
        "config has no section"
        if name in ("mesh", "optimizer")
        else "lacks config.{}, which stage 'line' needs"
    )
    with pytest.raises(UserError, match=lacks.format(name)):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_first_state_takes_the_memory_of_the_parameters(tmp_path, monkeypatch):
    loaded, load = [], sources.load
    monkeypatch.setattr(sources, "load", lambda *args: loaded.append(load(*args)) or loaded[-1])
    train.train(settings(steps=0), tmp_path)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(loaded[0]))


def test_update_is_traced_once(tmp_path, monkeypatch):
    traced, descend = [], line.state.descend
    monkeypatch.setattr(line.state, "descend", lambda *args: traced.append(args) or descend(*args))
    train.train(settings(steps=2), tmp_path)
    assert len(traced) == 1


def test_another_teacher_under_the_same_name_is_refused(tmp_path, monkeypatch):
    teacher = tmp_path / "teacher.safetensors"
    source = {"teacher": sources.Source(lambda key: {"w": jax.numpy.zeros(3)}, str(teacher))}
    stage = train.STAGES["line"]._replace(frozen=lambda config: source)
    monkeypatch.setitem(train.STAGES, "line", stage)
    checkpoint.save_params(teacher, {"w": np.zeros(3, np.float32)})
    for count in (1, 2):
        train.train(settings(steps=count), tmp_path / "run")
    checkpoint.save_params(teacher, {"w": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="teacher.safetensors is another than"):
        train.train(settings(steps=3), tmp_path / "run")


def test_records_that_were_added_under_a_run_are_refused(tmp_path):
    data.write_shard(tmp_path / "made" / "00000.arrayrecord", [{"x": np.zeros(3)}])
    train.train(settings(steps=1, data=str(tmp_path / "made")), tmp_path / "run")
    train.train(settings(steps=2, data=str(tmp_path / "made")), tmp_path / "run")
    data.write_shard(tmp_path / "made" / "00001.arrayrecord", [{"x": np.zeros(3)}])
    with pytest.raises(UserError, match="made is another than .*run began with"):
        train.train(settings(steps=3, data=str(tmp_path / "made")), tmp_path / "run")


def test_folder_of_another_config_is_refused_by_the_field_that_differs(alone, tmp_path):
    shutil.copytree(alone, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"a run with config.seed = 0, not 1; use another --workdir"):
        train.train(settings(seed=1), tmp_path)
    with pytest.raises(UserError, match=r"config.optimizer.warmup = 3, not 4"):
        train.train(settings(optimizer={"learning_rate": 0.1, "warmup": 4}), tmp_path)
    train.train(settings(steps=14, save_every=7, log_every=2, keep=1), tmp_path)
    assert steps(tmp_path) == [14]


def test_folder_of_a_run_gives_its_newest_averages_in_their_places(alone, tmp_path):
    there = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), like().params
    )
    for shapes in (like().params, wanted):
        found = checkpoint.load_params(alone, shapes)
        jax.tree.map(np.testing.assert_array_equal, found, last(alone).state.ema)
    with pytest.raises(UserError, match="no checkpoints in"):
        checkpoint.load_params(tmp_path, wanted)
    with pytest.raises(UserError, match="lacks 1 parameters, such as layer/scale"):
        checkpoint.load_params(alone, {"layer": wanted["layer"] | {"scale": wanted["layer"]["bias"]}})
