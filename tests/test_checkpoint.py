import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax import checkpoint, distributed, errors, state
from rfjax.errors import UserError

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
OPTIONS = {
    "adamw": state.OptimizerConfig(0.1, weight_decay=0.5, warmup=2, final=0.1, ema_decay=0.9),
    "muon": state.OptimizerConfig(0.1, name="muon", weight_decay=0.5, clip=1e6),
}


def params(width=3):
    key = jax.random.key(0)
    return {
        "layers": {"kernel": jax.random.normal(key, (2, 4, width)), "bias": jnp.ones((2, width))},
        "conv": {"kernel": jax.random.normal(key, (3, 3, 3, 2, width))},
    }


def fresh(width=3):
    return state.create(params(width), state.make_optimizer(OPTIONS["adamw"], 10))


def one_update(options, grads):
    optimizer = state.make_optimizer(options, 10)
    now = state.create(params(), optimizer)
    after = state.apply_gradients(now, grads, optimizer, options)
    return jax.tree.map(lambda new, old: np.asarray(new - old), after.params, now.params)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_training_checkpoint_returns_every_bit_and_keeps_the_newest(tmp_path):
    with checkpoint.Checkpoints(tmp_path, 2, "vae") as kept:
        assert kept.restore(fresh()) is None
        for step in (1, 2, 3):
            kept.save(step, fresh().replace(step=jnp.int32(step)), {"next_index": step})
    found = checkpoint.Checkpoints(tmp_path, 2, "vae").restore(jax.eval_shape(fresh))
    assert (found.step, found.data) == (3, {"next_index": 3})
    equal(found.state, fresh().replace(step=jnp.int32(3)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_state_may_be_donated_as_soon_as_save_comes_back(tmp_path):
    fill = jax.jit(lambda: {"x": jnp.arange(2.0**22)})
    big, there = fill(), jax.eval_shape(fill)["x"].update(sharding=HERE)
    with checkpoint.Checkpoints(tmp_path, 2, "vae") as kept:
        kept.save(1, big, None)
        jax.block_until_ready(jax.jit(lambda old: {"x": old["x"] * 0}, donate_argnums=0)(big))
        found = kept.restore({"x": there})
    np.testing.assert_array_equal(found.state["x"], np.arange(2.0**22, dtype=np.float32))


@pytest.mark.parametrize("part", ["state", "data", "about"])
def test_damaged_newest_checkpoint_falls_back(tmp_path, part, capsys):
    with checkpoint.Checkpoints(tmp_path, 2, "vae") as kept:
        for step in (1, 2):
            kept.save(step, fresh(), {"next_index": step})
    for file in (tmp_path / "2" / part).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    kept = checkpoint.Checkpoints(tmp_path, 2, "vae")
    assert kept.restore(fresh()).step == 1
    assert "step 2 is damaged" in capsys.readouterr().out
    kept.save(2, fresh(), {"next_index": 2})
    assert kept.restore(fresh()).step == 2


def test_checkpoint_of_another_run_is_refused(tmp_path):
    with checkpoint.Checkpoints(tmp_path, 2, "vae") as kept:
        kept.save(1, fresh(), None)
    with pytest.raises(UserError, match="stage 'vae', not 'teacher'"):
        checkpoint.Checkpoints(tmp_path, 2, "teacher").restore(fresh())
    with pytest.raises(UserError, match=r"other sizes.*float32\[3, 3, 3, 2, 3\].*float32\[3, 3, 3, 2, 5\]"):
        checkpoint.Checkpoints(tmp_path, 2, "vae").restore(fresh(5))


def test_what_is_no_damage_is_told_as_what_it_is(tmp_path, monkeypatch, capsys):
    with checkpoint.Checkpoints(tmp_path, 2, "vae") as kept:
        kept.save(1, fresh(), None)
    for error in (MemoryError("host"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory while allocating")):
        monkeypatch.setattr(checkpoint, "_read", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error), match=str(error)):
            checkpoint.Checkpoints(tmp_path, 2, "vae").restore(fresh())
    assert "damaged" not in capsys.readouterr().out
    monkeypatch.setattr(checkpoint, "_read", lambda *_: (_ for _ in ()).throw(ValueError("a broken chunk")))
    with pytest.raises(
        UserError, match="the oldest by ValueError: a broken chunk; copy them again, or take another"
    ):
        checkpoint.Checkpoints(tmp_path, 2, "vae").restore(fresh())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_whatever_orbax_makes_of_it(number, tmp_path):
    with pytest.raises(OSError) as raised, checkpoint._disk(tmp_path):
        raise ValueError(f"UNKNOWN: write: {os.strerror(number)} [while writing a chunk]")
    assert errors.sentence(raised.value) == (
        f"The disk is full ({tmp_path}); free some space and run the command again."
    )


def test_files_that_a_run_reads_at_every_start_stay_the_same(tmp_path):
    checkpoint.remember_contents({}, tmp_path)
    assert not list(tmp_path.iterdir())
    checkpoint.remember_contents({"teacher.safetensors": "of a run that saved nothing"}, tmp_path)
    for contents in ({"teacher.safetensors": "a"}, {"teacher.safetensors": "a", "vae.safetensors": "b"}):
        checkpoint.remember_contents(contents, tmp_path)
        (tmp_path / "checkpoints" / "5").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match="teacher.safetensors is another than .* began with"):
        checkpoint.remember_contents({"teacher.safetensors": "c"}, tmp_path)
    assert json.loads((tmp_path / "contents.json").read_text()) == {
        "teacher.safetensors": "a",
        "vae.safetensors": "b",
    }


def test_params_file_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "net.safetensors"
    checkpoint.save_params(path, params())
    equal(checkpoint.load_params(path, jax.eval_shape(params)), params())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    extra = params() | {"new": {"kernel": jnp.ones(1)}}
    missing = {"conv": params()["conv"]}
    for like, words in (
        (extra, "lacks 1"),
        (missing, "unknown 2"),
        (params(5), r"is \[2, 4, 3\], .* needs \[2, 4, 5\]"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.load_params(path, like)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_params(path, params())
    with pytest.raises(UserError, match="There is no parameter file"):
        checkpoint.load_params(tmp_path / "none.safetensors", params())


def test_pieces_of_a_stack_are_its_layers_and_of_a_matrix_the_matrix():
    stack, matrix = np.arange(24.0).reshape(4, 3, 2), np.arange(6.0).reshape(3, 2)
    for array, sizes in ((stack, [6] * 4), (jnp.asarray(stack), [6] * 4), (jnp.asarray(matrix), [6])):
        read = [piece() for piece in distributed.pieces(array)]
        assert [piece.size for piece in read] == sizes
        np.testing.assert_array_equal(np.concatenate([piece.reshape(-1) for piece in read]), np.ravel(array))


def test_schedule_rises_then_falls_to_its_end():
    schedule = state.make_schedule(state.OptimizerConfig(0.1, warmup=4, final=0.2), 14)
    rates = [float(schedule(step)) for step in (0, 3, 4, 9, 14)]
    np.testing.assert_allclose(rates, [0.025, 0.1, 0.1, 0.06, 0.02], rtol=1e-5)


@pytest.mark.parametrize("start, decays", [(0, (1 / 10, 2 / 11, 3 / 12)), (1, (0.0, 0.5, 0.5))])
def test_ema_follows_its_recurrence(start, decays):
    """From the first step with a memory that grows; with a start, the parameters themselves before it."""
    options = state.OptimizerConfig(0.1, ema_decay=0.5, ema_start=start)
    optimizer = state.make_optimizer(options, 10)
    now = state.create({"kernel": jnp.ones((2, 2))}, optimizer)
    average = np.ones((2, 2))
    for decay in decays:
        now = state.apply_gradients(now, {"kernel": jnp.ones((2, 2))}, optimizer, options)
        average = decay * average + (1 - decay) * np.asarray(now.params["kernel"])
        np.testing.assert_allclose(now.ema["kernel"], average, rtol=1e-6)
    assert int(now.step) == 3


def test_weight_decay_spares_all_but_kernels():
    for options in OPTIONS.values():
        update = one_update(options, jax.tree.map(jnp.zeros_like, params()))
        assert not np.any(update["layers"]["bias"])
        assert np.all(np.sign(update["conv"]["kernel"]) == -np.sign(params()["conv"]["kernel"]))


def test_muon_steps_each_stacked_layer_and_each_flattened_convolution_as_a_matrix():
    grads = params()
    update = one_update(state.OptimizerConfig(1.0, name="muon", clip=1e6), grads)
    matrices = [*update["layers"]["kernel"], update["conv"]["kernel"].reshape((54, 3))]
    alone = [*grads["layers"]["kernel"], grads["conv"]["kernel"].reshape((54, 3))]
    for matrix, gradient in zip(matrices, alone, strict=True):
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        scale = 0.2 * max(gradient.shape) ** 0.5  # AdamW's usual RMS, 0.2, for an orthogonal matrix
        singular = np.diag(u.T @ -matrix @ v.T) / scale
        assert np.all((singular > 0.6) & (singular < 1.3))  # what five Newton-Schulz steps reach


def test_unknown_optimiser_says_which_there_are():
    with pytest.raises(UserError, match="adamw or muon"):
        state.OptimizerConfig(0.1, name="sgd")


def test_adamw_is_clipped_scheduled_and_decayed_as_written_out():
    options = state.OptimizerConfig(0.1, warmup=2, b1=0.5, b2=0.9, weight_decay=0.2, clip=1.0)
    optimizer = state.make_optimizer(options, 10)
    now = state.create({"kernel": jnp.float32([[1, -2]])}, optimizer)
    weight, mean, square = np.float64([[1, -2]]), 0, 0
    for step, gradient in enumerate(np.float64([[[30, 40]], [[0.3, 0.1]], [[-6, 8]]]), 1):
        now = state.apply_gradients(now, {"kernel": jnp.float32(gradient)}, optimizer, options)
        gradient = gradient / max(1, np.linalg.norm(gradient))
        mean, square = 0.5 * mean + 0.5 * gradient, 0.9 * square + 0.1 * gradient**2
        direction = mean / (1 - 0.5**step) / (np.sqrt(square / (1 - 0.9**step)) + 1e-8)
        weight = weight - 0.1 * min(1, step / 2) * (direction + 0.2 * weight)
        np.testing.assert_allclose(now.params["kernel"], weight, rtol=1e-4)
    assert state.ema_decay(jnp.int32(10**6), options) == np.float32(0.999)
