"""The commands that judge: the judge's own error, runs that go on where they were stopped, and measures of any video."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfjax import sampler, shapes
from rfjax.errors import UserError
from rfjax.evaluate import __main__ as command
from rfjax.evaluate import damage, generate, keep, report, truth, videos
from rfjax.rollout import RolloutConfig
from rfjax.vae import VAE, VAEConfig
from rfjax.video import open_writer

ROOT = Path(__file__).parents[1]


class Renderer:
    """A sampler's stand-in that renders the scenes of its prompts, and knows what it was asked for."""

    video = sampler.VideoConfig(64, 64, 16)
    params = {"dit": np.arange(3.0)}

    def __init__(self, stop_at=None):
        self.scenes = {}
        self.asked, self.stop_at = [], stop_at
        for index in range(8):
            scene = shapes.sample_scene(index, 0, split="held_out")
            self.scenes[shapes.caption(scene)] = scene

    def encode(self, frames):
        return list(frames)

    def latent_frames(self, frames):
        return frames

    def latents(self, captions, seed, count, method, past):
        self.asked.append((method, seed))
        if self.stop_at == len(self.asked):
            raise KeyboardInterrupt
        yield [self.scenes[caption] for caption in captions], count + 5, seed

    def decode(self, blocks):
        for scenes, count, seed in blocks:
            video = np.stack([shapes.render(scene, 11 * seed, count) for scene in scenes])
            yield from np.split(video, [9, 33], axis=1)


TASK = generate.Task(prompts=3, seconds=5.0, seed=0, batch=2)
SCENES = [shapes.sample_scene(index, 0, split="held_out") for index in range(3)]
RUN = ["--prompts", "3", "--seconds", "5", "--batch", "2", "--methods", "rolling,self_forcing"]


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main(list(arguments))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


# ------------------------------------------------------------------------------------------- the judge's own error


@pytest.fixture(scope="module")
def rows():
    return truth.matrix(4, seed=47)  # all four motions, shapes and kinds of surface


def test_rendered_clips_reach_every_ceiling(rows):
    assert {name: rows["rendered"][name] for name in damage.MEASURES} == pytest.approx(
        dict.fromkeys(damage.MEASURES, 1), abs=0.03
    )
    assert rows["rendered"]["drift score"] < 0.02


def test_a_damage_lowers_what_it_must_and_nothing_else(rows):
    assert truth.unexpected(rows) == []
    assert all(rows[name]["drift score"] > rows["rendered"]["drift score"] + 0.01 for name in damage.DAMAGES)
    assert rows["frozen"]["drift score"] == rows["object gone"]["drift score"] == 1
    assert 0.4 < rows["another scene"]["drift score"] <= 1


def test_what_is_unexpected_is_marked(rows):
    wrong = {name: dict(row) for name, row in rows.items()}
    wrong["blurred"]["edge"] = 1.0
    wrong["frozen"]["right colour"] = 0.0
    assert truth.unexpected(wrong) == [("blurred", "edge"), ("frozen", "right colour")]
    assert truth.matrix_table(wrong).count("!") == 2 and "!" not in truth.matrix_table(rows)
    told = {line.split("|")[1].strip(): line for line in truth.matrix_table(rows).splitlines()}
    assert told["blurred"].count("(↓)") >= 1 and told["blurred"].count(" ↓") == len(damage.FALLS["blurred"])
    assert "↓" not in told["rendered"] and "(" not in told["another background"]


# ------------------------------------------------------------------------------------------------- a model's clips


def test_a_stopped_run_goes_on(tmp_path):
    """Stopped in its second batch, a run makes that one alone when it is run again, with the scores of one that was not stopped."""
    whole, stopped, again = Renderer(), Renderer(stop_at=2), Renderer()

    def judged(model, name):
        with keep.folder(str(tmp_path / name), {"of": "both"}) as place:
            return generate.judged(model, SCENES, "rolling", TASK, place)

    wanted = judged(whole, "whole")
    with pytest.raises(KeyboardInterrupt):
        judged(stopped, "stopped")
    found = judged(again, "stopped")
    assert whole.asked == [("rolling", 0), ("rolling", 2)] and again.asked == [("rolling", 2)]
    assert keep.plain(found) == keep.plain(wanted) and len(found) == 3
    assert not list(tmp_path.rglob("*.partial"))


def test_another_run_is_refused_in_the_same_folder(tmp_path):
    run = {"seed": 0, "config": {"world": (1, 2)}, "weights": "a"}
    for _ in range(2):
        with keep.folder(str(tmp_path / "run"), run) as place:
            assert place == tmp_path / "run"
    with pytest.raises(UserError, match=r"another run \(not the same seed, weights\); give this one"):
        with keep.folder(str(tmp_path / "run"), run | {"seed": 1, "weights": "b"}):
            pass


def test_a_world_at_another_rate_is_refused(tmp_path, capsys):
    text = (ROOT / "configs/shapes.py").read_text()
    assert '"fps": 16' in text
    (tmp_path / "fast.py").write_text(text.replace('"fps": 16', '"fps": 24'))
    said = "24 frames a second, in a world of 24, but clips are judged at 16"
    assert said in fails(capsys, "--config", str(tmp_path / "fast.py"))


def test_a_report_is_not_written_over_another_s(tmp_path, capsys):
    keep.claim(tmp_path / "run", {"seed": 0})
    for what in (["--ground_truth", "1"], ["--videos", str(tmp_path)]):
        write(tmp_path / "a.mp4", np.zeros((8, 32, 32, 3), np.uint8))
        assert "holds the scores of another run" in fails(capsys, *what, "--out", str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_run_in_8_bits_is_another_run(tmp_path, monkeypatch, capsys):
    """Also where only the cache is, of which the weights tell nothing."""
    monkeypatch.setattr(generate.keep, "fingerprint", lambda params: "the same")
    monkeypatch.setattr(generate, "judged", lambda *_: [])
    monkeypatch.setattr(command.sampler, "load", lambda *_, **__: types.SimpleNamespace(params={}))
    for name in ("sheets", "told"):
        monkeypatch.setattr(command, name, lambda *_: None)
    args = ["--prompts", "1", "--out", str(tmp_path / "run")]
    for _ in range(2):
        command.of_model(command.parse(args))
    with pytest.raises(UserError, match=r"another run \(not the same config\)"):
        command.of_model(command.parse([*args, "--quantize", "kv8"]))


def test_weights_have_a_fingerprint():
    tree = {"dit": {"a": np.zeros(3), "b": np.ones(3)}}
    same = {"dit": {"a": np.zeros(3), "b": np.ones(3)}}
    other = {"dit": {"a": np.zeros(3), "b": np.array([1, 1, 1 + 1e-9])}}
    assert keep.fingerprint(tree) == keep.fingerprint(same) != keep.fingerprint(other)


def test_scores_survive_being_kept(tmp_path):
    scores = {"a": np.array([1.5, np.nan]), "b": {"c": True, "d": float("nan")}, "e": np.array([True, False])}
    keep.write(tmp_path / "scores.json", scores)
    found = keep.arrays(keep.read(tmp_path / "scores.json"))
    np.testing.assert_array_equal(found["a"], scores["a"])
    np.testing.assert_array_equal(found["e"], scores["e"])
    assert found["b"]["c"] is True and np.isnan(found["b"]["d"])


def test_the_command_writes_its_folder(tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "run"
    monkeypatch.setattr(sampler, "load", lambda *_, **__: Renderer())
    command.main([*RUN, "--out", str(out)])
    text = (out / "report.md").read_text()
    assert text in capsys.readouterr().out
    assert "## rolling" in text and "## self_forcing" in text and "| drift score |" in text
    figures = json.loads((out / "report.json").read_text())
    assert len(figures["rolling"]["clips"]) == 3
    assert figures["rolling"]["summary"]["right shape, last 5 s"]["mean"] == 1
    drifts = [
        [clip["change"]["score"] for clip in figures[name]["clips"]] for name in ("rolling", "self_forcing")
    ]
    ratio = figures["ratios to self_forcing"]["rolling"]
    assert ratio["value"] == pytest.approx(np.mean(drifts[0]) / np.mean(drifts[1])) or np.mean(drifts[1]) == 0
    with Image.open(out / "sheet_2.png") as sheet:  # two rows, twelve columns
        assert sheet.width > 12 * 64 and sheet.height > 2 * 64
    assert not (out / "sheet_3.png").exists()
    (out / "report.md").unlink()
    command.main([*RUN, "--out", str(out)])
    assert (out / "report.md").read_text() == text
    assert "another run (not the same seed)" in fails(capsys, *RUN, "--seed", "1", "--out", str(out))


def test_two_methods_are_compared_clip_by_clip():
    """Where every clip has half the drift, so has every resample, however much the clips differ."""
    theirs = [0.1, 0.4, 0.9]
    methods = {"a": [value / 2 for value in theirs], "b": theirs}
    told = report.compared(
        {name: [{"change": {"score": value}} for value in some] for name, some in methods.items()}
    )
    *_, ours, other = told.splitlines()
    error = np.std(theirs, ddof=1) / np.sqrt(3)
    assert ours == f"| a | {np.mean(theirs) / 2:.3f} ± {error / 2:.3f} | 0.50 (0.50 … 0.50) |"
    assert other == f"| b | {np.mean(theirs):.3f} ± {error:.3f} | 1 |"
    assert "| a | 0.000 | – |" in report.compared({name: [{"change": {"score": 0.0}}] for name in "ab"})


def test_measures_are_drawn(tmp_path):
    curve = {"a": np.array([[1.0, 2.0, np.nan], [2.0, 4.0, np.nan]]), "b": np.ones((2, 3))}
    command.draw.curves({"one": curve, "two": curve}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10


def test_given_beginnings_are_the_scenes_own_frames():
    model = types.SimpleNamespace(vae=VAE(VAEConfig(dim=8)), rollout=RolloutConfig())
    assert generate.beginnings(model, SCENES, None) == []
    picture, video = (generate.beginnings(model, SCENES, given) for given in ("picture", "video"))
    for clip, scene in enumerate(SCENES):
        rendered = shapes.render(scene, 0, 33)
        np.testing.assert_array_equal(video[:, clip], rendered)
        np.testing.assert_array_equal(picture[:, clip], rendered[:1].repeat(9, 0))


def test_report_counts_and_averages():
    scores = truth.judge(4, 6, shapes.WORLD)
    scores[0]["first"]["shape"] = False
    scores[0]["change"]["score"] = 0.4
    for clip in scores[1:]:
        clip["change"]["score"] = 0.0
    text = report.tables(scores)
    assert "| shape | 75.0 | 100.0 | 100.0 |" in text and "| all | 75.0 | 100.0 | |" in text
    assert "4 clips of 6 s" in text and "| hue (degrees) | 0.0" in text
    assert "0.100 ± 0.100" in text  # mean of 0.4, 0, 0, 0, and 0.2 / √4
    assert {curve.shape for curve in report.curves(scores).values()} == {(4, 6)}


@pytest.mark.parametrize(
    ("words", "count"), [([], 64), (["--prompts", "held_out"], 64), (["--prompts", "3"], 3)]
)
def test_captions_are_asked_for_by_number_or_name(words, count):
    assert command.parse(words).prompts == count


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ground_truth", "0"], "Need at least one clip"),
        (["--seconds", "4"], "A clip is judged by 5 seconds"),
        (["--videos", "nowhere"], "There is no folder nowhere"),
        (["--methods", "forcing"], "There is no method 'forcing'"),
        (
            ["--out", "report.md"],
            "--out takes a folder, and report.md is a file's name; give one such as report.",
        ),
        (["--damage"], "give --ground_truth N with it"),
        (["--prompts", "many"], "argument --prompts"),
        (["--videos", ""], "There is no folder ''"),
        (["--seed", "-1"], "--seed must lie between 0"),
        (["--seed", str(2**32 - 1)], "--seed must lie between 0"),
        (["--videos", "."], "There is no mp4 file in ."),
    ],
)
def test_a_mistake_is_one_sentence(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------- any video


def write(path, video, fps=8):
    with open_writer(path, fps, video.shape[1:3], scale=1, crf=4) as writer:
        writer.write(video)


def test_videos_are_measured(tmp_path, capsys):
    """A clip that is blurred half way, one that turns grey, one that stays: a measure falls where it must, and there alone."""
    scene = shapes.sample_scene(1)._replace(world=shapes.World(fps=8))
    video = shapes.render(scene, 0, 88)
    grey = (video[44:] @ [0.2126, 0.7152, 0.0722])[..., None].repeat(3, -1).astype(np.uint8)
    for name, later in (("same", video[44:]), ("soft", damage.blur(video[44:])), ("grey", grey)):
        write(tmp_path / f"{name}.mp4", np.concatenate([video[:44], later]))
    command.main(["--videos", str(tmp_path), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (tmp_path / "out" / "report.md").read_text() in capsys.readouterr().out
    assert len(found["same.mp4"]["flow"]) == 11
    shown = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    assert shown.shape[1] > 12 * 128 and shown.std() > 10
    ratio = {
        (name[:4], measure): np.mean(values[-5:]) / np.mean(values[:5])
        for name, row in found.items()
        for measure, values in row.items()
        if measure in ("sharpness", "saturation", "contrast")
    }
    falls = {
        ("soft", "sharpness"),
        ("grey", "saturation"),
        ("grey", "sharpness"),
    }  # in colours that have lost an edge
    assert {pair for pair, value in ratio.items() if value < 0.8} == falls
    assert all(value == pytest.approx(1, abs=0.15) for pair, value in ratio.items() if pair not in falls)
    drifted = {name: np.mean(row["colour drift"][-5:]) for name, row in found.items()}
    assert drifted["grey.mp4"] > 5 > max(drifted["same.mp4"], drifted["soft.mp4"])


def test_block_flow_finds_a_shift():
    noise = np.random.default_rng(0).uniform(0, 255, (64, 96)).astype(np.float32)
    assert videos.block_flow(noise[8:-8, 8:-8], noise[6:-10, 11:-5]) == pytest.approx(np.hypot(2, 3))
    assert videos.block_flow(noise, noise) == 0
    assert videos.block_flow(np.zeros((64, 64)), np.zeros((64, 64))) == 0


def test_flicker_is_not_a_fade(tmp_path):
    fade = np.arange(96, dtype=np.float32)[:, None, None, None] * np.ones((1, 32, 32, 3))
    still = np.full((96, 32, 32, 3), 100.0)
    still[::2] += 6
    for name, video in (("fade", fade), ("flicker", still)):
        write(tmp_path / f"{name}.mp4", video.astype(np.uint8))
    fade, flicker = (videos.measure(tmp_path / f"{name}.mp4")[0]["flicker"] for name in ("fade", "flicker"))
    assert fade.max() < 1 and flicker.min() > 4


def test_a_video_that_is_too_short_or_damaged_is_told(tmp_path, capsys):
    write(tmp_path / "a.mp4", np.zeros((40, 32, 32, 3), np.uint8))
    assert "a.mp4 has 5 s; give videos of 10 s or more." in fails(capsys, "--videos", str(tmp_path))
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert "Cannot read the video" in fails(capsys, "--videos", str(tmp_path))
