"""Placement rules, what a config may split, and a part of `tests/meshes.py`, which needs 8 devices and so a process of its own."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rfjax import axes, config, sharding
from rfjax import state as train
from rfjax.errors import UserError
from rfjax.stages import clips, sources, student

ROOT = Path(__file__).parents[1]
BOTH = ("fsdp", "context")
# Of the stages one of the transformer, on all axes at once; distillation compiles for minutes.
QUICK = "bytes or cut or nan or adapters or (ode and 2x2x2)"


def mesh_of(data, fsdp, context):
    """A mesh without devices: rules ask for its shape alone."""
    return AbstractMesh((data, fsdp, context), axes.MESH, (AxisType.Auto,) * 3)


def test_eight_devices_train_as_one_and_send_what_closed_forms_say():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "tests/meshes.py", "-k", QUICK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_processes_show_and_judge_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "tests/shown.py", str(tmp_path), address, process],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in "01"
    ]
    try:
        told = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], told
    for stage in ("teacher", "vae"):
        first, second = (np.load(tmp_path / f"{stage}_{process}.npz") for process in "01")
        np.testing.assert_array_equal(first["clips"], second["clips"])
        assert first["value"] == second["value"]


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_14b", "small"])
@pytest.mark.parametrize("fsdp", [2, 8, 32])
@pytest.mark.parametrize("context", [1, 2])
def test_all_but_a_hundredth_of_a_train_state_falls_as_fsdp_and_context(name, fsdp, context):
    settings = config.load(ROOT / "configs" / ("shapes_ode.py" if name == "small" else "wan_distill_14b.py"))
    if name == "wan_14b":
        settings.dit = settings.teacher_dit
    if name == "small":
        settings.init_from = ""
    params = sources.shapes(student.networks(settings))["dit"]
    optimizer = train.make_optimizer(train.OptimizerConfig(learning_rate=1e-4), 10)
    state = jax.eval_shape(functools.partial(train.create, optimizer=optimizer), params)
    specs = sharding._specs(state, mesh_of(1, fsdp, context))
    leaves = list(zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True))
    everywhere = BOTH if context > 1 else "fsdp"
    split = sum(leaf.size for leaf, spec in leaves if everywhere in spec)
    assert split > 0.99 * sum(leaf.size for leaf, _ in leaves)
    for leaf, spec in leaves:
        if everywhere in spec:
            assert spec.count(everywhere) == 1 and leaf.shape[spec.index(everywhere)] % (fsdp * context) == 0


@pytest.mark.parametrize(
    "path, shape, wanted",
    [
        ("generator/params/blocks/ffn_in/kernel", (30, 1536, 8960), P(None, BOTH)),
        ("opt_state/1/0/mu/patch_embedding/kernel", (64, 1536), P(BOTH)),
        ("blocks/ffn_in/kernel/qvalue", (30, 1536, 8960), P(None, BOTH)),  # in 8 bits
        ("blocks/ffn_in/kernel/scale", (30, 1, 8960), P()),
        ("ema/patch_embedding/kernel", (12, 1536), P(None, BOTH)),
        ("token_embedding/embedding", (256384, 4096), P(BOTH)),
        ("blocks/modulation", (32, 6, 1536), P(None, None, BOTH)),
        ("encoder/conv1/kernel", (3, 3, 3, 3, 96), P(None, None, None, None, BOTH)),
        ("decoder/head/kernel", (3, 3, 3, 96, 3), P(None, None, None, BOTH)),
        (
            "encoder/conv1/kernel",
            (3, 3, 3, 3, 8),
            P(None, None, None, None, "fsdp"),
        ),  # 16 does not divide it, 8 does
        ("encoder/conv1/kernel", (3, 3, 3, 3, 5), P()),
        ("blocks/self_q/bias", (32, 1536), P()),
        ("step", (), P()),
    ],
)
def test_a_leaf_is_split_along_the_first_dimension_that_divides_but_never_by_layers(path, shape, wanted):
    assert sharding.spec(path, shape, mesh_of(2, 8, 2)) == wanted
    assert sharding.spec(path, shape, mesh_of(2, 1, 1)) == P()


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((4, 2, 6, 8))
    assert axes.constrain(x, "batch", None, "tokens", None) is x
    state = {"kernel": x}
    assert sharding.keep(state) is state


def test_what_an_axis_does_not_divide_stays_whole():
    def split(x):
        return axes.constrain(x, "batch", None, "tokens")

    with jax.sharding.use_abstract_mesh(mesh_of(2, 2, 4)):
        for shape, wanted in {
            (8, 3, 16, 5): P(("data", "fsdp"), None, "context"),
            (6, 3, 16, 5): P(None, None, "context"),
            (8, 3, 18, 5): P(("data", "fsdp"), None, None),
        }.items():
            (equation,) = jax.make_jaxpr(split)(jnp.zeros(shape)).eqns
            assert equation.params["sharding"].spec == wanted


def settings(**changes):
    small = config.load(ROOT / "configs" / "shapes_distill.py")
    small.update({"batch_size": 16} | changes)
    return small


@pytest.mark.parametrize(
    "mesh, changes, says",
    [
        ((4, 2, 1), {"batch_size": 12}, r"batch_size is 12, which the 8 devices .* make it a multiple of 8"),
        ((2, 2, 1), {"accumulate": 8}, r"batch_size is 16 in 8 micro-batches, .* make it a multiple of 32"),
        ((1, 1, 4), {}, r"context is 4, which does not divide the 6 heads of config.dit; .*divisor of 2"),
        ((1, 1, 3), {}, r"context is 3, which does not divide the 16 tokens of a frame; .*divisor of 2"),
    ],
)
def test_a_mesh_that_does_not_divide_the_work_is_told_before_it_starts(mesh, changes, says):
    with pytest.raises(UserError, match=says):
        sharding.check(settings(**changes), mesh_of(*mesh))


@pytest.mark.parametrize(
    "mesh, changes, count, size",
    [
        ((1, 8, 1), {}, 4, 8),  # filled up
        ((1, 1, 1), {}, 4, 4),
        ((2, 2, 2), {}, 5, 8),
        ((2, 2, 1), {"accumulate": 4}, 16, 4),  # no more than a micro-batch of training
        ((1, 1, 8), {"accumulate": 16}, 4, 1),
    ],
)
def test_clips_are_shown_in_groups_that_the_mesh_divides_and_training_holds(mesh, changes, count, size):
    with jax.sharding.use_abstract_mesh(mesh_of(*mesh)):
        assert clips.group(settings(**changes), count) == size


def test_what_divides_is_allowed():
    sharding.check(settings(accumulate=2), mesh_of(4, 2, 2))
    sharding.check(settings(stage="vae"), mesh_of(4, 4, 5))
    wan = config.load(ROOT / "configs" / "wan_distill_14b.py")
    sharding.check(wan, mesh_of(1, 8, 4))
    with pytest.raises(UserError, match="does not divide the 40 heads of config.teacher_dit; .*divisor of 4"):
        sharding.check(wan, mesh_of(1, 8, 12))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 2, 1), (1, 1, 2)])
def test_a_mesh_that_is_not_the_machine_is_refused(sizes):
    with pytest.raises(UserError, match="needs [23] devices and there are 1; set config.mesh"):
        sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[:1])


@pytest.mark.parametrize("sizes", [{"fsdp": 0}, {"context": -1}, {"data": 0}])
def test_an_axis_has_one_device_or_more(sizes):
    with pytest.raises(UserError, match="config.mesh is not valid: an axis has 1 device or more"):
        config.build(sharding.MeshConfig, ConfigDict({"mesh": sizes}), "mesh")


def test_chips_that_are_no_box_are_taken_as_they_come(monkeypatch):
    """As 3 of 2×2 are: jax asserts that they are one."""

    def refuses(*_, **__):
        raise AssertionError

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", refuses)
    devices = jax.devices()[:1]
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
    assert mesh.devices.shape == (1, 1, 1) and list(mesh.devices.flat) == devices
