"""Parity with the public implementation: its numbers agree, wrong ones are found, and broken directories are told."""

import functools
import json
import shutil
from pathlib import Path

import naive
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rfjax import flow, parity
from rfjax.errors import UserError
from rfjax.golden import Golden

GOLDEN = Path(__file__).parent / "golden"
SHAPES = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())


@pytest.fixture
def copy(tmp_path):
    """A copy of the golden directory, to be damaged."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def change(path, **arrays):
    """Writes a .npz file again with some arrays replaced (None: left out)."""
    content = dict(np.load(path).items()) | arrays
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


def case_name(case):
    return "_".join([getattr(case, "func", case).__name__, *getattr(case, "args", ())])


@functools.cache
def results(case):
    return list(case(Golden(GOLDEN)))


@pytest.mark.parametrize("case", parity.CASES, ids=case_name)
def test_every_number_agrees(case):
    assert results(case) and all(result.ok for result in results(case)), results(case)


def test_every_result_of_training_is_compared():
    arrays = [name.split("_", 2) for name in np.load(GOLDEN / "rolling_training.npz").files if "_e" in name]
    told = {
        f"rolling_training.{clip}_{step}.{part}" for clip, step, part in arrays if part.startswith(("o", "g"))
    }
    assert {result.name for result in results(parity.rolling_training)} == told and len(told) == 21


def run(capsys, directory):
    """(exit code, lines) of the command."""
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["parity", str(directory)])
        parity.main()
    out = capsys.readouterr()
    return stop.value.code, (out.out + out.err).splitlines()


def test_command_prints_a_line_a_case_and_fails_on_a_wrong_number(capsys, copy, monkeypatch):
    monkeypatch.setattr(parity, "CASES", [parity.schedule, parity.dmd])
    code, lines = run(capsys, copy)
    assert code == 0 and len(lines) == 1 + 4 + 2
    assert all(line.split()[2] == "ok" and float(line.split()[1]) < 1e-3 for line in lines[1:])
    noised = np.load(copy / "schedule.npz")["noised"]
    change(copy / "schedule.npz", noised=noised + 1e-3)
    code, lines = run(capsys, copy)
    assert code == 1 and [line.split()[2] for line in lines[1:]] == ["ok"] * 3 + ["FAIL"] + ["ok"] * 2


def test_results_of_another_shape_are_errors():
    with pytest.raises(UserError, match="latents has shape"):
        parity.compare("latents", np.zeros((1, 2)), np.zeros((2, 1)))


def test_not_a_number_is_no_agreement():
    numbers = np.float32([1, 2])
    assert parity.compare("same", numbers, numbers).ok
    assert not parity.compare("theirs", numbers, np.float32([1, np.nan])).ok
    assert not parity.compare("ours", np.float32([1, np.nan]), numbers).ok
    assert not parity.compare("infinite", np.float32([1, np.inf]), numbers).ok


def test_tolerance_is_of_the_largest_number():
    def ok(theirs, error, gradient):
        return parity.compare("", np.float32([theirs + error, 0]), np.float32([theirs, 0]), gradient).ok

    assert ok(0.01, 0.9e-4, False) and not ok(0.01, 1.2e-4, False)
    assert ok(100, 0.9e-2, False) and not ok(100, 1.2e-2, False)
    assert ok(0.01, 0.9e-5, True) and not ok(0.01, 1.2e-5, True)


# Another directory: other sizes, the numbers from the literal NumPy version


SIZES = dict(dim=24, ffn_dim=20, num_heads=2, num_layers=1, text_dim=6, text_len=5, in_dim=3, freq_dim=8)
MEMORY = dict(frames_per_block=2, sink_frames=4, max_attention_frames=8, denoising_steps=[1000, 500])


@pytest.fixture
def other(tmp_path):
    """A rolling clip: batch 2, 2 steps, 8 blocks of 2 frames of 2 × 4, a sink of 2 blocks, 1 layer."""
    settings = dict(SIZES, **MEMORY, patch_size=[1, 2, 2], eps=1e-6, timestep_shift=3.0)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    names = {
        name: shape for name, shape in official_shapes(load_file(GOLDEN / "causal_dit.safetensors")).items()
    }
    weights = {name: 0.3 * rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
    save_file(weights, tmp_path / "causal_dit.safetensors")
    golden = Golden(tmp_path)
    noise = rng.normal(size=(2, 8, 2, 2, 2, 4, 3)).astype(np.float32)
    context = rng.normal(size=(2, 5, 6)).astype(np.float32)
    network = naive.DiT(golden.dit.config, parity.dit_params(golden, "causal_dit"), context)
    latents = naive.Rollout(network, golden.rollout, np.moveaxis(noise, 0, 2)).rolling(8)
    np.savez(
        tmp_path / "rolling.npz",
        context=context,
        denoising_timesteps=flow.few_step_timesteps((1000, 500), 3.0),
        latents=np.moveaxis(latents, -1, 2),
        noise=np.moveaxis(noise, -1, 4),
    )
    return tmp_path


def official_shapes(weights):
    """Names and shapes of `other`'s weights: the fixture's, with its sizes exchanged and its second layer left out."""
    sizes = {48: 24, 96: 20, 20: 6, 32: 8, 4: 3, 288: 144, 16: 12}
    shapes = {name: a.shape for name, a in weights.items() if not name.startswith("blocks.1.")}
    return {
        name: shape
        if "modulation" in name and len(shape) < 3
        else tuple(
            size if axis > 1 and "patch" in name or size in (1, 2, 6) else sizes[size]
            for axis, size in enumerate(shape)
        )
        for name, shape in shapes.items()
    }


def test_other_sizes_agree_with_numpy(other):
    results = list(parity.inference("rolling", Golden(other)))
    assert len(results) == 2 and all(result.ok for result in results), results


# Directories that are wrong


def test_directory_without_a_text_encoder_lacks_only_its_lines(copy):
    assert len(results(parity.text)) == 2
    for name in ("umt5.npz", "umt5.safetensors", "umt5_config.json"):
        (copy / name).unlink()
    assert not list(parity.text(Golden(copy)))


def test_no_directory_is_an_error(capsys, tmp_path):
    code, lines = run(capsys, tmp_path / "nowhere")
    assert code == 2 and lines[-1].startswith("error: There is no directory")


@pytest.mark.parametrize(
    "name", sorted(p.name for p in GOLDEN.iterdir() if not p.name.startswith(("official", "README")))
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_missing_and_damaged_files_are_errors(copy, name, damage, monkeypatch):
    path = copy / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"not this"}[damage])
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        golden = Golden(copy)
        if name.endswith(".npz"):
            golden.arrays(path.stem)
        elif name == "vae_config.json":
            golden.vae()
        elif name == "umt5_config.json":
            golden.umt5()
        else:
            golden.weights(path.stem)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("dim", None),
        ("dim", "48"),
        ("dim", 0),
        ("dim", 47),
        ("num_layers", -1),
        ("num_layers", 1.5),
        ("patch_size", 2),
        ("patch_size", [2, 2, 2]),
        ("patch_size", [1, 2]),
        ("frames_per_block", 4),
        ("max_attention_frames", 15),
        ("denoising_steps", []),
        ("denoising_steps", ["a"]),
        ("eps", "small"),
    ],
)
def test_wrong_settings_are_errors(copy, entry, value):
    path = copy / "config.json"
    content = json.loads(path.read_text()) | {entry: value}
    path.write_text(json.dumps({name: v for name, v in content.items() if v is not None}))
    with pytest.raises(UserError, match="config.json"):
        Golden(copy)


def test_settings_that_are_no_object_are_errors(copy):
    (copy / "config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="config.json"):
        Golden(copy)


@pytest.mark.parametrize(
    "case, array, value",
    [
        (parity.schedule, "sigmas", np.zeros(7)),
        (parity.schedule, "query", None),
        (parity.schedule, "query", np.zeros((4, 1))),
        (parity.schedule, "noised", np.array(["a"] * 4)),
        (parity.dmd, "noise", np.zeros((1, 21, 4, 4, 8))),
        (parity.dmd, "latents", np.zeros((1, 21, 5, 4, 6))),
        (parity.dmd, "latents", np.zeros((1, 21, 4, 3, 6))),
        (parity.dmd, "context", np.zeros((1, 9, 20))),
        (parity.dmd, "loss", np.zeros(2)),
        (parity.rolling_training, "f21_e0_cotangent", np.zeros((1, 20, 4, 4, 6))),
        (parity.rolling_training, "f21_e0_noise", np.zeros((1, 7, 4, 3, 4, 4, 6))),
        (parity.rolling_training, "f21_e7_noise", np.zeros((1, 7, 5, 3, 4, 4, 6))),
        (functools.partial(parity.inference, "rolling"), "denoising_timesteps", np.zeros(4)),
    ],
)
def test_arrays_that_do_not_fit_are_errors(copy, case, array, value):
    file = {"inference": "rolling"}.get(getattr(case, "func", case).__name__) or case.__name__
    change(copy / f"{file}.npz", **{array: value})
    with pytest.raises(UserError, match=array.removesuffix("_noise").removesuffix("_cotangent")):
        list(case(Golden(copy)))


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("blocks.0.ffn.0.bias", None, "blocks/ffn_in/bias"),
        ("blocks.1.ffn.0.bias", np.zeros(97), "blocks/ffn_in/bias"),
        ("blocks.2.ffn.0.bias", np.zeros(96), "blocks/ffn_in/bias"),
        ("head.head.weight", np.zeros((48, 16)), "head/kernel"),
        ("patch_embedding.weight", np.zeros((48, 4)), "patch_embedding.weight"),
        ("img_emb.weight", np.zeros(3), "img_emb.weight"),
    ],
)
def test_weights_that_do_not_fit_are_errors(copy, name, value, told):
    path = copy / "causal_dit.safetensors"
    weights = load_file(path) | ({} if value is None else {name: value.astype(np.float32)})
    save_file(
        {n: np.ascontiguousarray(a) for n, a in weights.items() if value is not None or n != name}, path
    )
    with pytest.raises(UserError, match=told):
        parity.dit_params(Golden(copy), "causal_dit")
