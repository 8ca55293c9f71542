"""Data of one's own, in a world of Wan's kind at tiny sizes: the data commands against direct encoding, and what they refuse."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import av
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import serialization
from ml_collections import ConfigDict

from rfjax import checkpoint, config, data, datasets, dit, flow, parameters, prompts, teacher, umt5
from rfjax.data import __main__ as data_command
from rfjax.errors import UserError
from rfjax.stages import STAGES, clips, latent, sources, student
from rfjax.stages import teacher as teacher_stage
from rfjax.state import TrainState
from rfjax.umt5 import UMT5Config
from rfjax.vae import VAE, VAEConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = ["a fox trots through snow", "a boat", "rain on a window at night"]
NEGATIVE = "blurry grey"
SETTINGS = {
    "video": {"height": 8, "width": 12, "fps": 8},
    "vae": {"dim": 4, "z_dim": 4, "dim_mult": (1, 2), "num_res_blocks": 1, "temporal_downsample": (True,)},
    "umt5": {"vocab_size": 40, "dim": 8, "attn_dim": 8, "ffn_dim": 10, "num_heads": 2, "num_layers": 1, "num_buckets": 8},
    "dit": {"dim": 12, "ffn_dim": 16, "num_heads": 2, "num_layers": 1, "in_dim": 4, "freq_dim": 8}
    | {"text_len": 7, "text_dim": 8},
    "rollout": {"steps": (1000, 500), "block_frames": 2, "ring_blocks": 3, "span_blocks": 3, "shift": 5.0},
    "optimizer": {"learning_rate": 1e-3},
    "negative_prompt": NEGATIVE,
    "seed": 0,
    "accumulate": 1,
    "steps": 2,
    "batch_size": 2,
    "frames": 4,
    "method": "rolling",
    "made_by": "python -m rfjax.data encode-videos FOLDER --config tiny.py",
    "record_frames": 4,
    "record_batch": 2,
    "shard_records": 2,
    "shards": 2,
    "solver_steps": 4,
    "guidance": 2.0,
    "judged": 4,
}  # fmt: skip
FRAMES = 7  # video frames of 4 latent frames


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Nothing here depends on how well programs are optimised, and compiling them is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def random_params(shapes, seed):
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random weights with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("weights")
    settings = ConfigDict(SETTINGS)
    for name, kind in (("dit", dit.DiTConfig), ("vae", VAEConfig)):
        sizes = config.build(kind, settings, name)
        params = random_params(parameters.abstract(name, sizes), 0)
        if name == "vae":
            params |= {"latent_mean": np.float32([0.1, -0.2, 0, 1]), "latent_std": np.float32([1, 2, 0.5, 3])}
        checkpoint.save_params(folder / f"{name}.safetensors", params)
    reader = config.build(UMT5Config, settings, "umt5")
    checkpoint.save_params(folder / "umt5.safetensors", umt5.init(reader, jax.random.key(0)))
    vocabulary = [
        "<pad>",
        "</s>",
        "<unk>",
        *sorted({word for line in [*PROMPTS, NEGATIVE] for word in line.split()}),
    ]
    kinds = tokenizers
    tokenizer = kinds.Tokenizer(
        kinds.models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = kinds.pre_tokenizers.Whitespace()
    tokenizer.post_processor = kinds.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def settings_of(weights, folder, **changes):
    settings = ConfigDict(SETTINGS)
    settings.weights, settings.data = str(weights), str(folder)
    settings.vae_weights = f"{weights}/vae.safetensors"
    settings.init_from = settings.teacher = f"{weights}/dit.safetensors"
    settings.update(changes)
    return settings


def make(settings, tmp_path, *words):
    """`python -m rfjax.data WORDS --config FILE`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        asked = [*map(str, words), "--config", write_config(settings, tmp_path)]
        patch.setattr(sys, "argv", ["rfjax.data", *asked])
        data_command.main()


def write_config(settings, folder):
    """A file whose get_config() gives the settings."""
    file = folder / "tiny.py"
    file.write_text(
        f"import ml_collections\ndef get_config(): return ml_collections.ConfigDict({settings.to_dict()})"
    )
    return str(file)


def records(folder):
    source = grain.sources.ArrayRecordDataSource(sorted(map(str, Path(folder).glob("*.arrayrecord"))))
    return [serialization.msgpack_restore(source[i]) for i in range(len(source))]


def encoded(weights, captions):
    """Embeddings [B, text_len, text_dim] as sampling has them, rounded as records are."""
    reader = config.build(UMT5Config, ConfigDict(SETTINGS), "umt5")
    features = prompts.PromptEncoder(weights, reader, SETTINGS["dit"]["text_len"]).encode(captions)
    return np.asarray(features.astype(jnp.bfloat16), np.float32)


# Prompts


@pytest.fixture(scope="module")
def prompt_folder(weights, tmp_path_factory):
    """Three prompts in two shards."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n \n", "utf-8-sig")
    make(settings_of(weights, folder / "made"), folder, "encode-prompts", folder / "prompts.txt")
    return folder


def test_prompt_records_are_what_sampling_encodes_each_at_its_own_length(weights, prompt_folder):
    found = records(prompt_folder / "made")
    wanted = encoded(weights, PROMPTS)
    assert [record["caption"] for record in found] == PROMPTS
    for record, context in zip(found, wanted, strict=True):
        length = len(record["caption"].split()) + 1  # with the end mark
        assert record["context"].dtype == jnp.bfloat16 and record["context"].shape == (length, 8)
        np.testing.assert_array_equal(np.float32(record["context"]), context[:length])
        assert not context[length:].any() and np.abs(context[:length]).max() > 0


def test_prompts_for_a_stage_are_padded_shuffled_and_resume(weights, prompt_folder):
    settings = settings_of(weights, prompt_folder / "made")
    dataset = latent.prompts(settings, 3)
    wanted = encoded(weights, PROMPTS)
    for place in range(3):  # every pass has each once
        context = dataset[place]["context"]
        assert context.dtype == np.float32 and list(dataset[place]) == ["context"]
        rows = [int(np.flatnonzero((wanted == row).all((1, 2)))[0]) for row in context]
        assert sorted(rows) == [0, 1, 2]
    iterator, again = data.iterate(dataset), data.iterate(latent.prompts(settings, 3))
    next(iterator)
    again.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(again)["context"], next(iterator)["context"])
    assert latent.prompts(settings)[0]["context"].shape == (settings.batch_size, 7, 8)


def test_negative_prompt_is_encoded_beside_the_records(weights, prompt_folder):
    settings = settings_of(weights, prompt_folder / "made")
    np.testing.assert_array_equal(latent.negative(settings), encoded(weights, [NEGATIVE])[0])
    other = settings_of(weights, "none", prompts=settings.data)  # where a config has both, prompts are theirs
    np.testing.assert_array_equal(latent.negative(other), latent.negative(settings))
    with pytest.raises(UserError, match="no encoded negative prompt none/negative.*encode-prompts"):
        latent.negative(settings_of(weights, "none"))
    with pytest.raises(UserError, match="config.negative_prompt is 'dark', but .* has 'blurry grey' encoded"):
        latent.negative(settings_of(weights, prompt_folder / "made", negative_prompt="dark"))


def test_empty_negative_prompt_is_the_end_mark_alone(weights, tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS[1])
    settings = settings_of(weights, tmp_path / "made", negative_prompt="")
    make(settings, tmp_path, "encode-prompts", tmp_path / "prompts.txt")
    found = latent.negative(settings)
    assert found[0].any() and not found[1:].any()


def test_a_config_without_a_negative_prompt_has_the_empty_one_encoded(weights, tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS[1])
    settings = settings_of(weights, tmp_path / "made")
    del settings.negative_prompt
    make(settings, tmp_path, "encode-prompts", tmp_path / "prompts.txt")
    assert latent.negative(settings)[0].any()
    settings.negative_prompt = NEGATIVE
    with pytest.raises(UserError, match="config.negative_prompt is 'blurry grey', but .* has '' encoded"):
        latent.negative(settings)
    (tmp_path / "made" / "about.json").unlink()  # as where encoded prompts are put there by hand
    assert latent.negative(settings)[0].any()


def test_second_run_makes_only_what_is_missing_and_other_prompts_are_refused(
    weights, prompt_folder, tmp_path, capsys
):
    settings = settings_of(weights, prompt_folder / "made")
    first, second = sorted((prompt_folder / "made").glob("*.arrayrecord"))
    before, kept = first.stat().st_mtime_ns, [first.read_bytes(), second.read_bytes()]
    second.unlink()
    make(settings, prompt_folder, "encode-prompts", prompt_folder / "prompts.txt")
    assert first.stat().st_mtime_ns == before and [first.read_bytes(), second.read_bytes()] == kept
    (tmp_path / "more.txt").write_text("\n".join([*PROMPTS[::-1]]))
    with pytest.raises(SystemExit):
        make(settings, tmp_path, "encode-prompts", tmp_path / "more.txt")
    told = capsys.readouterr().err
    assert "SHA-256 of the sources" in told and "delete the folder" in told and told.count("\n") == 1
    assert [first.read_bytes(), second.read_bytes()] == kept


def test_prompts_of_the_small_world_are_its_words(tmp_path):
    captions = [
        "a red circle bouncing over a blue background",
        "a small green star orbiting over a pink background",
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(captions))
    settings = config.load(CONFIGS / "shapes_distill.py")
    settings.update({"data": str(tmp_path / "made"), "batch_size": 2})
    make(settings, tmp_path, "encode-prompts", tmp_path / "prompts.txt")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["00000.arrayrecord", "about.json"]
    found = {float(row.sum()) for row in latent.prompts(settings)[0]["context"]}
    direct = latent.words(settings).encode(captions).astype(jnp.bfloat16)
    assert found == {float(np.float32(row).sum()) for row in direct}
    assert not latent.negative(settings).any()
    (tmp_path / "prompts.txt").write_text("a red dog")
    with pytest.raises(UserError, match="Unknown in the prompt: dog"):
        datasets.encoded_prompts(settings, tmp_path / "prompts.txt")


# Videos


def save_video(path, levels, fps=8, size=(8, 12)):
    """A lossless video whose frame n has grey level levels[n]."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *size, "rgb24"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text(f" {PROMPTS[len(levels) % 3]}\n", "utf-8-sig")


@pytest.fixture(scope="module")
def video_folder(weights, tmp_path_factory):
    """Videos of two clips and some, of one, of too few frames, and a damaged one; and what the command said of them."""
    folder = tmp_path_factory.mktemp("videos")
    save_video(folder / "in" / "a.mp4", range(40, 40 + 2 * FRAMES + 3))
    save_video(folder / "in" / "b.mkv", range(FRAMES - 1))
    save_video(folder / "in" / "c" / "d.MOV", range(200, 200 - 2 * FRAMES, -1), fps=16)
    save_video(folder / "in" / "e.mp4", range(30))
    (folder / "in" / "e.mp4").write_bytes((folder / "in" / "e.mp4").read_bytes()[:300])
    return folder


def test_video_records_are_their_clips_through_the_vae(weights, video_folder, capsys):
    settings = settings_of(weights, video_folder / "made")
    make(settings, video_folder, "encode-videos", video_folder / "in")
    told = capsys.readouterr().out
    assert "b.mkv is shorter than a clip of 7 frames at 8 a second" in told
    assert "Cannot read the video" in told and "e.mp4" in told and "2 sources gave no records" in told
    found = records(video_folder / "made")
    levels = [range(40, 47), range(47, 54), range(200, 186, -2)]
    captions = [PROMPTS[17 % 3], PROMPTS[17 % 3], PROMPTS[14 % 3]]
    assert [record["caption"] for record in found] == captions
    vae, params = VAE(config.build(VAEConfig, settings, "vae")), latent._vae(settings)[1]
    video = np.stack(
        [np.broadcast_to(np.float32(x)[:, None, None, None], (FRAMES, 8, 12, 3)) for x in levels]
    )
    encode = jax.jit(lambda x: vae.apply({"params": params}, x / 127.5 - 1, method="encode")[0])
    std, mean = (params[name].reshape(1, 1, 1, 1, 4) for name in ("latent_std", "latent_mean"))
    wanted = (encode(video) - mean) / std  # the whole clip at once
    for record, clip, context in zip(found, wanted, encoded(weights, captions), strict=True):
        np.testing.assert_allclose(record["latents"], clip, rtol=1e-3, atol=2e-3)
        np.testing.assert_array_equal(np.float32(record["context"]), context[: len(record["context"])])
    batch = STAGES["teacher_forcing"].data(settings)[0]
    assert batch["latents"].shape == (2, 4, 4, 6, 4) and batch["context"].shape == (2, 7, 8)
    assert latent.negative(settings).any()
    prompts = latent.prompts(settings)[0]  # of the videos' captions
    assert set(prompts) == {"context"} and prompts["context"].shape == (2, 7, 8)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda folder: (folder / "c" / "d.txt").unlink(),
            "d.MOV has no caption; write what it shows to .*d.txt",
        ),
        (lambda folder: (folder / "a.txt").write_text(" \n"), "a.mp4 has no caption"),
        (lambda folder: (folder / "a.txt").write_bytes(b"\xff\xfe\xfa"), "a.txt: it is not UTF-8 text"),
        (
            lambda folder: [path.unlink() for path in folder.rglob("*.*") if path.suffix != ".txt"],
            "no videos",
        ),
    ],
)
def test_missing_caption_is_told_before_work_starts(spoil, says, weights, tmp_path):
    for name in ("a.mp4", "c/d.MOV"):
        save_video(tmp_path / "in" / name, range(2))
    spoil(tmp_path / "in")
    with pytest.raises(UserError, match=says):
        datasets.encoded_videos(settings_of(weights, tmp_path / "made"), tmp_path / "in")
    assert not (tmp_path / "made").exists()


def test_two_processes_of_which_one_has_no_video_and_the_other_no_clip_both_end(tmp_path):
    settings = config.load(CONFIGS / "shapes_debug.py")
    settings.update({"data": str(tmp_path / "made"), "vae_weights": str(tmp_path / "vae.safetensors")})
    settings.update({"record_frames": 3, "record_batch": 1})
    sizes = config.build(VAEConfig, settings, "vae")
    checkpoint.save_params(settings.vae_weights, random_params(parameters.abstract("vae", sizes), 0))
    save_video(tmp_path / "in" / "a.mp4", range(2), size=(16, 16))
    (tmp_path / "in" / "a.txt").write_text("a red circle bouncing over a blue background")
    file = write_config(settings, tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = free.getsockname()[1] % 4096  # Open MPI's number of a job, of which jax makes its port
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMPI_MCA_orte_hnp_uri": f"{job}.0;tcp://127.0.0.1:1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "rfjax.data", "encode-videos", str(tmp_path / "in"), "--config", file],
            cwd=CONFIGS.parent,
            env=environment | {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in ranks.items()},
            stderr=subprocess.PIPE,
            text=True,
        )
        for ranks in ({"SIZE": 2, "RANK": rank, "LOCAL_RANK": rank} for rank in (0, 1))
    ]
    for process in running:
        told = process.communicate(timeout=240)[1]
        assert process.returncode == 2 and "No clip came of" in told and "Traceback" not in told, told
    assert not (tmp_path / "made").exists()


# Trajectories


def test_trajectories_begin_from_encoded_prompts_and_turn_from_the_negative_one(
    weights, prompt_folder, tmp_path
):
    settings = settings_of(weights, tmp_path / "ode", prompts=str(prompt_folder / "made"))
    make(settings, tmp_path, "ode-pairs")
    found = records(tmp_path / "ode")
    assert len(found) == settings.shards * settings.shard_records
    wanted = dict(zip(PROMPTS, encoded(weights, PROMPTS), strict=True))
    parts = latent.parts(settings)
    context = jnp.asarray(np.stack([wanted[record["caption"]] for record in found]))
    noise = jnp.asarray(np.stack([record["trajectory"][0] for record in found]), jnp.float32)
    params = checkpoint.load_params(settings.teacher, parameters.abstract("dit", parts.dit.config))
    negative = jnp.broadcast_to(encoded(weights, [NEGATIVE]), context.shape)
    solve = functools.partial(teacher.ode_trajectory, parts.dit, params, noise, context, negative)
    path = np.asarray(jax.jit(lambda: solve(settings.guidance, 4, 5.0))())
    levels = 1000 * teacher.solver_sigmas(4, 5.0)
    for place, t in enumerate([*flow.few_step_timesteps((1000, 500), 5.0), 0.0]):
        (point,) = path[np.isclose(levels, t)]
        got = np.stack([record["trajectory"][place] for record in found])
        np.testing.assert_allclose(got, point, rtol=2e-2, atol=2e-2)
    for record in found:
        np.testing.assert_array_equal(
            np.float32(record["context"]), wanted[record["caption"]][: len(record["context"])]
        )
    batch = STAGES["ode"].data(settings)[0]
    assert batch["trajectory"].shape == (2, 3, 4, 4, 6, 4) and batch["context"].shape == (2, 7, 8)


# Stages without a small world


def test_outside_the_small_world_nothing_is_judged_and_clips_are_shown_where_there_is_a_vae(
    weights, prompt_folder, monkeypatch
):
    settings = settings_of(weights, prompt_folder / "made", vae_weights="")
    assert STAGES["ode"].evaluate(settings)(None, {}) == {}
    videos, captions = STAGES["ode"].sample(settings)(None, {}, None)
    assert len(videos) == len(captions) == 0
    monkeypatch.setattr(clips, "SHOWN", 2)
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 6, 4)).astype(np.float32)
    asked = []

    def roll(average, fixed, batch):
        asked.append(batch["context"])
        return latents

    monkeypatch.setattr(clips, "roller", lambda settings, generate: roll)
    settings.vae_weights = f"{weights}/vae.safetensors"
    now = TrainState(0, {}, {}, {}, 0)
    videos, captions = clips.shown(settings, None)(now, {}, jax.random.key(0))
    np.testing.assert_array_equal(asked[0], encoded(weights, captions))
    vae, params = VAE(config.build(VAEConfig, settings, "vae")), latent._vae(settings)[1]
    whole = jax.jit(lambda z: vae.apply({"params": params}, z, method="decode"))
    std, mean = (np.reshape(params[name], (1, 1, 1, 1, 4)) for name in ("latent_std", "latent_mean"))
    wanted = 127.5 * (1 + np.clip(whole(latents * std + mean), -1, 1))
    np.testing.assert_allclose(videos, wanted, atol=0.5 + 0.02)  # rounded


def test_dropped_captions_are_the_negative_prompt(weights, prompt_folder, monkeypatch):
    settings = settings_of(weights, prompt_folder / "made")
    latents = np.random.default_rng(0).normal(size=(2, 4, 4, 6, 4)).astype(np.float32)
    monkeypatch.setattr(teacher_stage, "DROPPED", 2.0)  # all of them
    update = teacher_stage.update(settings)

    def loss(captions, negative):
        sizes = latent.parts(settings).dit.config
        params = {"dit": checkpoint.load_params(settings.init_from, parameters.abstract("dit", sizes))}
        batch = {"latents": latents, "context": encoded(weights, captions)}
        state = student.init(settings, params)
        return float(update(state, {"negative": {"context": negative}}, batch, 0)[1]["loss"])

    negative = latent.negative(settings)
    assert loss(PROMPTS[:2], negative) == loss(PROMPTS[1:], negative) != loss(PROMPTS[:2], 0 * negative)


@pytest.mark.parametrize("name, field", [("teacher_forcing", "latents"), ("ode", "trajectory")])
def test_step_of_the_full_size_is_traced_by_shapes(name, field):
    settings = config.load(CONFIGS / f"wan_{name}.py")
    stage = STAGES[settings.stage]
    state = jax.eval_shape(functools.partial(stage.init, settings), sources.shapes(stage.networks(settings)))
    leading = (8,) if field == "latents" else (8, 6)
    batch = {
        field: jax.ShapeDtypeStruct((*leading, 21, 60, 104, 16), jnp.float16),
        "context": jax.ShapeDtypeStruct((8, 512, 4096), jnp.float32),
    }
    after, told = jax.eval_shape(stage.update(settings), state, {}, batch, 0)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state) and told["loss"].shape == ()


# Mistakes


def record(**changes):
    """A record as a stage wants it, with changes; None leaves a field out."""
    fields = {
        "caption": "a boat",
        "context": np.ones((3, 8), np.float16),
        "latents": np.ones((4, 4, 6, 4), np.float16),
    }
    return {name: value for name, value in (fields | changes).items() if value is not None}


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"context": None},
            "no encoded prompt .context.; make the records anew with `python -m rfjax.data encode-videos",
        ),
        (
            {"context": np.ones((8, 8), np.float16)},
            r"context of \[8, 8\], but config.dit wants at most \[7, 8\]",
        ),
        ({"context": np.ones((3, 9), np.float16)}, r"context of \[3, 9\]"),
        ({"latents": None}, r"has latents of no size, but this config needs \[4 or more, 4, 6, 4\]"),
        ({"latents": np.ones((3, 4, 6, 4), np.float16)}, r"has latents of \[3, 4, 6, 4\]"),
        ({"latents": np.ones((4, 4, 8, 4), np.float16)}, r"has latents of \[4, 4, 8, 4\]"),
    ],
)
def test_records_that_do_not_fit_are_told_before_training(changes, says, weights, tmp_path):
    data.write_shard(tmp_path / "00000.arrayrecord", [record(**changes)] * 2)
    checkpoint.save_params(tmp_path / "negative.safetensors", {"context": np.zeros((7, 8), np.float32)})
    for stage in ("teacher", "teacher_forcing"):
        with pytest.raises(UserError, match=says):
            STAGES[stage].data(settings_of(weights, tmp_path))


def test_small_world_s_records_need_a_caption_or_a_context(tmp_path):
    settings = config.load(CONFIGS / "shapes_teacher.py")
    settings.update({"data": str(tmp_path), "batch_size": 1})
    data.write_shard(tmp_path / "00000.arrayrecord", [{"latents": np.ones((21, 8, 8, 16), np.float16)}])
    with pytest.raises(UserError, match="no encoded prompt .context. and no caption"):
        STAGES["teacher"].data(settings)


def test_trajectory_of_other_points_is_told(weights, tmp_path):
    trajectory = np.ones((4, 4, 4, 6, 4), np.float16)
    data.write_shard(tmp_path / "00000.arrayrecord", [record(trajectory=trajectory)] * 2)
    with pytest.raises(UserError, match=r"trajectory of \[4, 4, 4, 6, 4\].*\[3, 2 or more, 4, 6, 4\]"):
        STAGES["ode"].data(settings_of(weights, tmp_path))


@pytest.mark.parametrize(
    "words, changes, says",
    [
        (["encode-prompts"], {}, "Write `python -m rfjax.data encode-prompts FILE --config FILE`"),
        (["encode-videos"], {}, "Write `python -m rfjax.data encode-videos FOLDER --config FILE`"),
        (["encode-videos", "none"], {}, "There are no videos (.mp4, .mov, .mkv, .webm) in none"),
        (["encode-prompts", "none.txt"], {}, "Cannot read none.txt: No such file"),
        (["encode-prompts", "{}/empty.txt"], {}, "empty.txt holds no prompt; write one a line"),
        (["encode-prompts", "{}/one.txt"], {"weights": "{}/none"}, "There is no folder"),
        (["encode-prompts", "{}/one.txt"], {"umt5": {"dim": 16}}, "config.umt5.dim is 16 and config.dit.text_dim 8"),
        (["ode-pairs", "more"], {}, "leave 'more' out"),
        (["ode-pairs"], {"prompts": "none"}, "no records in none: make them with `python -m rfjax.data encode-prompts"),
        (["ode-pairs"], {}, "The config names no encoded prompts: set config.prompts"),
        (["encode-prompts", "{}/one.txt"], {"data": ""}, "give one with config.prompts or config.data"),
        (["encode-prompts", "{}/one.txt", "--config.dada=x"], {}, "--config.dada=x changes nothing"),
        (["encode-prompts", "{}/one.txt", "--shard=1"], {}, "There is no flag --shard=1"),
        (["encode-videos", "{}/short"], {}, "No clip came of"),
    ],
)  # fmt: skip
def test_mistake_of_a_data_command_is_one_sentence(words, changes, says, weights, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "one.txt").write_text("a boat")
    save_video(tmp_path / "short" / "a.mp4", range(FRAMES - 1))
    changes = {key: x.format(tmp_path) if isinstance(x, str) else x for key, x in changes.items()}
    settings = settings_of(weights, tmp_path / "made")
    settings.update(changes)
    with pytest.raises(SystemExit) as left:
        make(settings, tmp_path, *(word.format(tmp_path) for word in words))
    told = capsys.readouterr().err.rpartition("\r")[2]  # behind a progress bar
    assert left.value.code == 2 and told.startswith("error: ") and says in told and told.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_command_that_lacks_settings_names_them(weights, tmp_path, capsys):
    settings = settings_of(weights, tmp_path / "made")
    del settings.teacher, settings.record_batch
    with pytest.raises(SystemExit):
        make(settings, tmp_path, "ode-pairs")
    assert "has no record_batch, teacher, which ode-pairs needs" in capsys.readouterr().err


def test_batch_that_the_devices_do_not_divide_is_told(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [None] * 3)
    with pytest.raises(UserError, match="config.record_batch is 4; set it to a multiple of the 3 devices"):
        datasets.local_mesh(4)
