"""The sampling command: what it writes, and that every mistake is one sentence before any work."""

import functools
import itertools
import os
import signal
import subprocess
import sys
import time

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sample
from rfjax import checkpoint, dit, sampler, shapes, vae
from rfjax.errors import UserError, interrupts
from rfjax.score import score
from rfjax.tiny_vae import TinyDecoder, TinyVAEConfig

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.prompt = "a large red circle bouncing over a blue background"
    config.weights = "tiny"
    config.video = ConfigDict({"height": 16, "width": 24, "fps": 8})
    config.vae = ConfigDict({"dim": 4, "z_dim": 4, "num_res_blocks": 1})
    config.vae.update({"dim_mult": (1, 1, 1), "temporal_downsample": (True, True)})
    config.text = ConfigDict({"text_len": 16, "text_dim": 48})
    config.dit = ConfigDict({"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "in_dim": 4})
    config.dit.update({"freq_dim": 8, "text_len": 16, "text_dim": 48, "patch_size": (1, 2, 2)})
    config.rollout = ConfigDict({"steps": (1000, 500)})
    return config
"""
STAR = "a small yellow star orbiting over a purple background"


class FakeSampler:
    """Frame n of clip b is grey level 10 n + b; a latent block is its frame numbers. What is given is one block."""

    def encode(self, frames):
        return [np.full((1, 3, 2, 2, 1), frame.mean()) for frame in itertools.islice(frames, 0, None, 9)]

    def latents(self, prompts, seed, num_frames, method, given, recall):
        if "dragon" in " ".join(prompts):
            raise UserError("Unknown in the prompt: dragon")
        given, blocks = list(given), -(-num_frames // 3)
        if given:
            return (np.repeat(block, len(prompts), 0) for block in given)
        return (np.full((len(prompts), 3, 2, 2, 1), block) for block in range(blocks))

    def decode(self, blocks):
        shown = 0
        for block in blocks:
            numbers = np.arange(shown, shown + (9 if shown == 0 else 12))
            shown = numbers[-1] + 1
            grey = (10 * numbers + np.arange(len(block))[:, None]) % 256
            yield np.broadcast_to(grey[..., None, None, None], (*grey.shape, 16, 24, 3)).astype(np.uint8)

    def latent_frames(self, frames):
        return 1 + -(-(frames - 1) // 4)


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """Works in an empty folder with a tiny config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(sampler, "load", lambda settings, place, given: FakeSampler())


@pytest.fixture
def weights(tmp_path):
    """Random weights of the tiny config, saved where the command reads them."""
    return save_weights(tmp_path / "weights")


def save_weights(folder):
    settings = sample.config.load("tiny.py")
    sizes = sample.config.build(dit.DiTConfig, settings, "dit")
    codec = vae.VAE(sample.config.build(vae.VAEConfig, settings, "vae"))
    shapes = {
        "dit": jax.eval_shape(functools.partial(dit.init, sizes), jax.random.key(0)),
        "vae": jax.eval_shape(codec.init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))["params"],
    }
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), shapes)
    params["vae"]["latent_mean"], params["vae"]["latent_std"] = np.zeros(4, "f"), np.ones(4, "f")
    folder.mkdir()
    for name, tree in params.items():
        checkpoint.save_params(folder / f"{name}.safetensors", tree)
    return str(folder)


def run(*arguments):
    sample.main(["--config", "tiny.py", *arguments])


def fails(capsys, *arguments):
    """The one line on stderr of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_clip_sheet_and_latents(fake, capsys):
    files = ["--out", "a.mp4", "--contact_sheet", "a.png", "--save_latents", "a.npz"]
    run("--prompt", STAR, "--seconds", "2.5", *files)
    assert sorted(os.listdir()) == ["a.mp4", "a.npz", "a.png", "tiny.py"]
    frames = decode("a.mp4")
    assert frames.shape == (20, 256, 384, 3)
    np.testing.assert_allclose(frames.mean((1, 2, 3)), 10 * np.arange(20), atol=2)
    np.testing.assert_array_equal(np.load("a.npz")["latents"][0, :, 0, 0, 0], [0, 0, 0, 1, 1, 1])
    assert Image.open("a.png").size[0] > 1000
    told = capsys.readouterr().out
    assert "a.mp4: 20 frames, 2.5 s" in told and STAR in told and "frames/s" in told


def test_a_prompt_that_is_no_sentence_of_the_small_world_is_noted(fake, capsys):
    run("--prompt", STAR, "--prompt", "a red over blue", "--seconds", "1")
    assert capsys.readouterr().err.count("Note: ") == 1
    run("--prompt", "a red over blue", "--num_samples", "2", "--seconds", "1")
    assert capsys.readouterr().err.count('; "a red over blue" may show anything (') == 1


def test_a_clip_begins_with_a_picture_made_to_fit(fake):
    Image.new("RGB", (24, 48), (200, 200, 200)).save("tall.png")
    run("--image", "tall.png", "--save_latents", "a.npz", "--seconds", "2")
    np.testing.assert_array_equal(np.load("a.npz")["latents"], 200)
    run("--image", "tall.png", "--save_latents", "a.npz", "--seconds", "2", "--fit", "letterbox")
    share = 8 / 24  # of the width that is not black: 16 rows high, half as wide
    np.testing.assert_allclose(np.load("a.npz")["latents"], 200 * share, atol=1)


def test_what_is_given_must_leave_room_and_is_never_replaced(fake, capsys):
    run("--seconds", "4", "--out", "long.mp4")  # 32 frames: 21 are whole blocks
    whole = sample.Path("long.mp4").read_bytes()
    error = fails(capsys, "--video", "long.mp4", "--seconds", "2.5")
    assert "--seconds counts it in, so give more than 2.6" in error
    assert "would replace what the clip begins with" in fails(
        capsys, "--video", "long.mp4", "--out", "long.mp4"
    )
    os.rename("long.mp4", "clip.partial.mp4")  # as an interrupted run leaves it
    assert "clip.partial.mp4 would replace" in fails(capsys, "--video", "clip.partial.mp4")
    os.rename("clip.partial.mp4", "clip_1.mp4")
    assert "clip_1.mp4 would replace" in fails(capsys, "--video", "clip_1.mp4", "--num_samples", "2")
    os.rename("clip_1.mp4", "long.mp4")
    assert sorted(os.listdir()) == ["long.mp4", "tiny.py"]
    assert sample.Path("long.mp4").read_bytes() == whole
    Image.new("RGB", (24, 16)).save("a.png")
    assert "more than 1.1" in fails(capsys, "--image", "a.png", "--seconds", "1")
    assert "a.png would replace" in fails(capsys, "--image", "a.png", "--contact_sheet", "a.png")


def test_too_little_memory_is_told_before_anything_is_loaded(fake, monkeypatch, capsys):
    monkeypatch.setattr(sample.preflight, "capacity", lambda: 1000)
    assert "but the device has" in fails(capsys)
    assert os.listdir() == ["tiny.py"]
    run("--skip_preflight", "--seconds", "1")
    assert os.path.exists("clip.mp4")


def test_two_commands_do_not_save_latents_under_one_name():
    with sample.latents_file("a.npz") as blocks:
        with pytest.raises(UserError, match="Another command writes to a.partial.npz just now"):
            with sample.latents_file("a.npz"):
                raise AssertionError("never begun")
        blocks.append(np.ones((1, 3)))
    np.testing.assert_array_equal(np.load("a.npz")["latents"], np.ones((1, 3)))


@pytest.mark.parametrize("locks", [True, False])
def test_latents_get_their_name_while_they_are_locked_and_what_another_command_begins_stays(
    locks, monkeypatch
):
    """Where there are no locks, as on Windows, they are closed before, since no open file is renamed there."""
    opened, replace, fdopen = [], os.replace, os.fdopen

    def then_another(source, target):
        assert opened[0].closed != locks
        replace(source, target)
        sample.Path(source).write_bytes(b"another's")

    monkeypatch.setattr(os, "fdopen", lambda *args: opened.append(fdopen(*args)) or opened[0])
    monkeypatch.setattr(os, "replace", then_another)
    if not locks:
        monkeypatch.setattr(sample.files, "fcntl", None)
    with sample.latents_file("a.npz") as blocks:
        blocks.append(np.ones((1, 3)))
    assert np.load("a.npz")["latents"].sum() == 3
    assert sample.Path("a.partial.npz").read_bytes() == b"another's"


def test_several_clips_are_numbered(fake, capsys):
    sample.Path("prompts.txt").write_text(f"\n{STAR}\n\n")
    prompts = ["--prompt", "a red circle", "--prompts_file", "prompts.txt", "--num_samples", "2"]
    run(*prompts, "--seconds", "1", "--out", "f/")
    assert sorted(os.listdir()) == ["f_0", "f_1", "f_2", "f_3", "prompts.txt", "tiny.py"]
    assert np.asarray(Image.open("f_3/frame_000002.png"))[0, 0, 0] == 23
    told = capsys.readouterr().out.splitlines()
    assert "a red circle" in told[1] and STAR in told[2]


def test_latents_wait_on_the_host():
    kept = []
    blocks = list(sample.tee((jax.numpy.full((1, 3), index) for index in range(4)), kept))
    assert [type(block) for block in kept[:-1]] == [np.ndarray] * 3
    np.testing.assert_array_equal(np.concatenate(kept), np.concatenate(blocks))


def test_a_default_prompt_is_told(fake, capsys):
    run("--seconds", "0.01", "--out", "a.gif")
    assert 'No --prompt given: showing "a large red circle' in capsys.readouterr().out
    assert Image.open("a.gif").n_frames == 1


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "a dragon"], "Unknown in the prompt: dragon"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "inf"], "--seconds"),
        (["--seconds", "1e10"], "--seconds must be a positive number up to"),
        (["--scale", "1000"], "makes frames of 24000 pixels"),
        (["--out", "."], "'.' is no place of its own"),
        (["--num_samples", "0"], "--num_samples"),
        (["--seed", "-1"], "--seed"),
        (["--out", "a.avi"], "a.avi"),
        (["--out", "nowhere/a.mp4"], "nowhere"),
        (["--contact_sheet", "sheet.mp4"], "--contact_sheet"),
        (["--contact_sheet", "clip.png", "--out", "./clip.png"], "--contact_sheet"),
        (["--save_latents", "a.npy"], "--save_latents"),
        (["--save_latents", "nowhere/a.npz"], "--save_latents"),
        (["--config", "tinny.py"], "did you mean tiny.py"),
        (["--prompts_file", "none.txt"], "none.txt"),
        (["--prompts_file", "empty.txt"], "holds no prompt"),
        (["--method", "diffusion"], "rolling"),
        (["--decoder", "tiny"], "tiny.py has no tiny decoder"),
        (["--size", "big"], "--size must be like 832x480"),
        (["--image", "none.png"], "Cannot read the picture none.png: No such file"),
        (["--image", "empty.txt"], "empty.txt is no picture"),
        (["--video", "none.mp4"], "Cannot read the video none.mp4: No such file"),
        (["--video", "empty.txt"], "Cannot read the video empty.txt"),
        (["--video", "a.mp4", "--image", "a.png"], "not allowed with"),
        (["--fit", "stretch"], "letterbox"),
        (["--second", "3"], "there is no --second (is it --seconds?); --help lists them all"),
        (["--promt=a large red circle"], "there is no --promt (is it --prompt?)"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(fake, capsys, arguments, says):
    sample.Path("empty.txt").touch()
    sample.Path("clip.mp4").write_bytes(b"good")
    error = fails(capsys, *arguments)
    assert "error: " in error and says in error
    assert sorted(os.listdir()) == ["clip.mp4", "empty.txt", "tiny.py"]
    assert sample.Path("clip.mp4").read_bytes() == b"good"


def test_what_a_config_does_not_name_is_asked_of_the_command(weights, capsys):
    with open("tiny.py", "a") as file:
        file.write("\nfull = get_config\ndef get_config():\n    config = full()\n")
        file.write("    del config.prompt, config.weights\n    return config\n")
    assert "tiny.py has no prompt of its own; give --prompt" in fails(capsys, "--weights", weights)
    assert "names no weights; give --weights" in fails(capsys, "--prompt", "a large red circle")
    run("--prompt", "a large red circle", "--weights", weights, "--seconds", "0.1")
    assert "frames/s" not in capsys.readouterr().out  # of a single block


def test_the_config_may_name_the_method(fake, capsys, monkeypatch):
    asked = []
    latents = FakeSampler.latents
    monkeypatch.setattr(
        FakeSampler, "latents", lambda self, *args: asked.append(args[3]) or latents(self, *args)
    )
    with open("tiny.py", "a") as file:
        file.write("\nfull = get_config\ndef get_config():\n    config = full()\n")
        file.write("    config.method = 'self_forcing'\n    return config\n")
    run("--seconds", "1")
    run("--seconds", "1", "--method", "rolling")
    assert asked == ["self_forcing", "rolling"]


@pytest.mark.parametrize(
    "change, says",
    [
        ("config.vae.z_dim = 6", "config.vae.z_dim is 6 and config.dit.in_dim 4"),
        (
            "config.decoder, config.tiny = 'tiny', {'z_dim': 5}",
            "config.tiny.z_dim is 5 and config.dit.in_dim 4",
        ),
        ("config.text.text_dim = 60", "config.text.text_dim is 60 and config.dit.text_dim 48"),
        ("config.umt5 = {'dim': 16}", "config.umt5.dim is 16 and config.dit.text_dim 48"),
    ],
)
def test_sections_that_do_not_fit_each_other_are_told_before_weights_are_read(capsys, change, says):
    with open("tiny.py", "a") as file:
        file.write("\nfull = get_config\ndef get_config():\n    config = full()\n")
        file.write(f"    {change}\n    return config\n")
    assert f"{says}; make them the same." in fails(capsys, "--weights", "none")


def test_the_cpu_is_asked_for_only_before_what_reads_prompts_is_fetched(weights, tmp_path, monkeypatch):
    def without():
        raise UserError("no CPU")

    settings = sample.config.load("tiny.py")
    settings.umt5 = {"dim": 48}
    monkeypatch.setattr(sampler, "host", without)
    monkeypatch.setenv("RFJAX_WEIGHTS", str(tmp_path / "kept"))
    assert sampler.load(settings, sampler.RANDOM).encoder.encode([STAR]).shape == (1, 16, 48)
    for name in ("umt5.safetensors", "tokenizer.json"):
        sample.Path(weights, name).touch()
    sampler.load(settings, weights)  # prompts may be kept, and where they are not the encoder asks
    with pytest.raises(UserError, match="no CPU"):
        sampler.load(settings, "me/mine")


def test_a_size_far_from_the_config_s_is_noted(fake, capsys):
    for size, noted in (("96x64", "is for 24x16; 96x64 has 16 times its pixels"), ("16x24", None)):
        with pytest.raises(SystemExit):
            run("--size", size, "--prompt", "a dragon")
        error = capsys.readouterr().err
        assert noted in error if noted else "Note" not in error


def test_interruption_tells_where_the_partial_clip_is(fake, monkeypatch, capsys):
    def decode_then_stop(self, blocks):
        yield np.zeros((1, 9, 16, 24, 3), np.uint8)
        raise KeyboardInterrupt

    sample.Path("clip.mp4").write_bytes(b"good")
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(FakeSampler, "decode", decode_then_stop)
    with pytest.raises(SystemExit) as stop:
        run("--save_latents", "a.npz")
    assert stop.value.code == 130
    error = capsys.readouterr().err
    assert "the first 1.1 s are in clip.partial.mp4" in error and error.endswith("Interrupted.\n")
    assert len(decode("clip.partial.mp4")) == 9
    assert sample.Path("clip.mp4").read_bytes() == b"good"
    assert sorted(os.listdir()) == ["clip.mp4", "clip.partial.mp4", "tiny.py"]


def test_a_run_without_a_frame_says_nothing_of_the_clip_that_an_earlier_one_left(fake, capsys):
    sample.Path("clip.partial.mp4").write_bytes(b"forty seconds")
    with pytest.raises(SystemExit):
        run("--prompt", "a dragon")
    assert "Stopped early" not in capsys.readouterr().err
    assert sample.Path("clip.partial.mp4").read_bytes() == b"forty seconds"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("partial", ["clip.partial.mp4", "a.partial.npz"])
def test_full_disk_is_one_sentence(fake, capsys, partial):
    os.symlink("/dev/full", partial)
    assert "error: The disk is full" in fails(capsys, "--save_latents", "a.npz", "--seconds", "30")
    assert not os.path.exists("clip.mp4") and not os.path.exists("a.npz")


def test_bad_weights_are_one_sentence(capsys, weights):
    assert "tiny" in fails(capsys)
    assert "no folder nowhere" in fails(capsys, "--weights", "nowhere")
    file = sample.Path(weights, "dit.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "dit.safetensors is damaged" in fails(capsys, "--weights", weights)
    sample.Path("wide.py").write_text(CONFIG.replace('"dim": 24', '"dim": 48'))
    file.write_bytes(whole)
    assert "is [1, 24], but this network needs [1, 48]" in fails(
        capsys, "--weights", weights, "--config", "wide.py"
    )
    os.remove(file)
    assert "lacks dit.safetensors" in fails(capsys, "--weights", weights)
    assert sorted(os.listdir()) == ["tiny.py", "weights", "wide.py"]


@pytest.mark.parametrize("method", ["rolling", "self_forcing"])
def test_stream_is_the_whole_clip_and_clips_are_independent(weights, method):
    """Frames of the stream = all latents decoded at once; clip 0 does not see clip 1."""
    model = sampler.load(sample.config.load("tiny.py"), weights)
    latents = list(model.latents(["a red circle", STAR], 5, 10, method))
    assert [block.shape for block in latents] == [(2, 3, 4, 6, 4)] * 4
    frames = np.concatenate(list(model.decode(latents)), 1)
    assert frames.shape == (2, 45, 16, 24, 3) and frames.std() > 1
    assert model.decoder is model.vae
    whole = jax.jit(model.vae.apply, static_argnames="method")(
        {"params": model.params["vae"]}, jnp.concatenate(latents, 1), method="decode"
    )  # mean 0 and deviation 1, so nothing to denormalise
    np.testing.assert_allclose((np.clip(whole, -1, 1) + 1) * 127.5, frames, atol=0.6)
    again = np.concatenate(list(model.latents(["a red circle", "a blue star"], 5, 10, method)), 1)
    np.testing.assert_allclose(again[0], np.concatenate(latents, 1)[0], atol=1e-4)
    other = np.concatenate(list(model.latents(["a red circle", STAR], 6, 10, method)), 1)
    assert np.abs(other - np.concatenate(latents, 1)).mean() > 0.1


def test_given_frames_become_the_blocks_that_the_clip_begins_with(weights):
    """Chunk by chunk they are what the VAE makes of the whole; 5 frames too many are left out."""
    model = sampler.load(sample.config.load("tiny.py"), weights, given=True)
    frames = np.random.default_rng(1).integers(0, 256, (26, 16, 24, 3), np.uint8)
    given = list(model.encode(frames[:, None]))
    assert [block.shape for block in given] == [(1, 3, 4, 6, 4)] * 2
    video = frames[None, :21].astype(np.float32) / 127.5 - 1
    whole = model.vae.apply({"params": model.params["vae"]}, video, method="encode")[0]
    np.testing.assert_allclose(np.concatenate(given, 1), whole, atol=1e-4)
    blocks = list(model.latents(["a red circle", STAR], 5, 9, given=given))
    assert len(blocks) == 3
    for block, its in zip(blocks, given, strict=False):
        np.testing.assert_array_equal(block, np.repeat(its, 2, 0))
    alone = list(model.latents(["a red circle", STAR], 5, 9))[2]
    assert np.abs(alone - blocks[2]).mean() > 0.01


def test_bfloat16_weights_give_nearly_the_same_clip(weights):
    settings = sample.config.load("tiny.py")
    fine = sampler.load(settings, weights)
    settings.dit.dtype = settings.vae.dtype = "bfloat16"
    coarse = sampler.load(settings, weights)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(coarse.params["dit"])} == {"bfloat16"}
    assert str(coarse.params["vae"]["latent_std"].dtype) == "float32"
    clips = []
    for model in (fine, coarse):
        latents = list(model.latents([STAR], 5, 6))
        clips.append((np.concatenate(latents, 1), np.concatenate(list(model.decode(latents)), 1) / 255))
    (z, video), (z_coarse, video_coarse) = clips
    assert 0 < np.sqrt(np.mean((z - z_coarse) ** 2)) < 0.1 * z.std()
    assert 0 < np.sqrt(np.mean((video - video_coarse) ** 2)) < 0.1


def test_blocks_are_decoded_one_latent_frame_after_another(weights):
    model = sampler.load(sample.config.load("tiny.py"), weights)
    latents = list(model.latents([STAR], 5, 9))
    variables = {"params": model.params["vae"]}
    whole, _ = model.vae.apply(variables, np.concatenate(latents, 1), method="decode_normalised")
    frames = np.concatenate(list(model.decode(latents)), 1)
    np.testing.assert_allclose(np.clip((np.asarray(whole) + 1) * 127.5, 0, 255), frames, atol=1)
    decode = functools.partial(sampler.decode_block.__wrapped__, model.decoder, model.decoder_params)
    assert "scan[" in str(jax.make_jaxpr(decode)(latents[1], None))


def test_tiny_decoder_takes_the_place_of_the_vae(weights):
    settings = sample.config.load("tiny.py")
    settings.decoder = "tiny"
    settings.tiny = {"z_dim": 4, "widths": (8, 8, 6, 5)}
    sizes = sample.config.build(TinyVAEConfig, settings, "tiny")
    rng = np.random.default_rng(0)
    like = jax.eval_shape(TinyDecoder(sizes).init, jax.random.key(0), jnp.zeros((1, 1, 1, 1, 4)))["params"]
    params = jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(s.dtype), like)
    checkpoint.save_params(sample.Path(weights, "tiny.safetensors"), params)
    os.remove(sample.Path(weights, "vae.safetensors"))  # it is not needed, as long as nothing is given
    model = sampler.load(settings, weights)
    latents = list(model.latents([STAR], 5, 6))
    frames = np.concatenate(list(model.decode(latents)), 1)
    whole, _ = model.decoder.apply({"params": params}, np.concatenate(latents, 1))
    np.testing.assert_allclose((np.asarray(whole) + 1) * 127.5, frames, atol=1)
    with pytest.raises(UserError, match="lacks vae.safetensors"):
        sampler.load(settings, weights, given=True)
    settings.decoder = "large"
    with pytest.raises(UserError, match="'vae' or 'tiny'"):
        sampler.load(settings, weights)


@pytest.mark.parametrize(
    "size, says", [("20x16", "widths of 16 or 24 and heights of 16"), ("24x4", "heights of 8")]
)
def test_size_that_the_patches_do_not_tile_is_refused_with_those_near_it(weights, capsys, size, says):
    assert says in fails(capsys, "--weights", weights, "--size", size)


class Deaf:
    """What loses Ctrl-C: an exception in a destructor goes nowhere."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_python_loses_is_raised_again():
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts() as check:
        check()
        Deaf()
        check()
    assert signal.getsignal(signal.SIGINT) is usual


def test_the_command_streams_and_survives_ctrl_c(tmp_path, weights):
    """A true process: the file grows while it runs, and Ctrl-C leaves a playable clip."""
    options = ["--config", "tiny.py", "--weights", weights, "--seconds", "1e5"]
    process = subprocess.Popen(
        [sys.executable, sample.__file__, *options], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    partial = tmp_path / "clip.partial.mp4"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.stat().st_size > 20_000:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "clip.partial.mp4" in error and "Traceback" not in error
    assert len(decode(partial)) > 8


def test_the_command_passes_seed_and_method_on(fake, monkeypatch):
    asked, latents = [], FakeSampler.latents
    monkeypatch.setattr(FakeSampler, "latents", lambda self, *a: asked.append(a[1:4]) or latents(self, *a))
    flags = ["--seed", "7", "--method", "self_forcing", "--seconds", "1", "--num_samples", "2", "--out", "f/"]
    run("--prompt", STAR, *flags)
    ((seed, _, method),) = asked
    assert (seed, method) == (7, "self_forcing")


def test_clips_of_one_prompt_differ_and_so_do_seeds(weights):
    model = sampler.load(sample.config.load("tiny.py"), weights)
    one, two = np.asarray(next(model.latents([STAR, STAR], 5, 3)))
    other = np.asarray(next(model.latents([STAR, STAR], 6, 3)))[0]
    assert np.abs(one - two).mean() > 0.1 and np.abs(one - other).mean() > 0.1


def test_the_shipped_model_shows_what_it_is_told():
    """5 s of four prompts: what the weights, the config and the words mean to each other."""
    model, captions = (
        sampler.load(sample.config.load(str(sample.ROOT / "configs/shapes.py"))),
        shapes.PROMPTS[:4],
    )
    video = np.concatenate(list(model.decode(model.latents(list(captions), 0, 21))), 1)
    right = [score(clip, caption)["first"] for clip, caption in zip(video, captions, strict=True)]
    for name, least in {"colour": 4, "background": 4, "shape": 3}.items():
        assert sum(row[name] for row in right) >= least, name
