"""Prompts at times: what a script says, when a video obeys it, and that every mistake is told by its line."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import sample
from rfjax import change, config, sampler, script
from rfjax.errors import UserError

RED, BLUE = (
    "a large red circle bouncing over a blue background",
    "a small blue star spinning over a red background",
)
TINY = str(Path(__file__).parents[1] / "configs/tiny.py")
BLOCKS = 12


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Works in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model():
    return sampler.load(config.load(TINY))


def read(text, seconds=None):
    Path("story.txt").write_text(text)
    return script.read("story.txt", seconds)


def test_lines_are_times_and_prompts():
    lines, seconds = read(f"# a story\n\n0:00 {RED}\n 1:02.5\t{BLUE} # 2\n01:00:00 {RED}\n")
    assert [(line.seconds, line.prompt) for line in lines] == [(0, RED), (62.5, f"{BLUE} # 2"), (3600, RED)]
    assert seconds == 3610
    assert lines[1].place == "story.txt, line 4"
    assert read(f"0:00 {RED}", 3.5)[1] == 3.5
    assert read(f"\ufeff0:00 {RED}")[0][0].prompt == RED  # as some editors begin a file


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "holds no prompt"),
        ("# only this", "holds no prompt"),
        (f"0:01 {RED}", "line 1: the first prompt must come at 0:00"),
        (f"0:00 {RED}\n\n0:05", "line 3: write minutes:seconds and a prompt"),
        (f"0:00 {RED}\n5 {BLUE}", "line 2: write minutes:seconds"),
        (f"0:00 {RED}\n0:60 {BLUE}", "line 2: write minutes:seconds"),
        (f"0:00 {RED}\n1:2:03 {BLUE}", "line 2: write minutes:seconds"),
        (f"0:00 {RED}\n-0:05 {BLUE}", "line 2: write minutes:seconds"),
        (f"{RED}", "line 1: write minutes:seconds"),
        (f"0:00 {RED}\n0:05 {BLUE}\n0:05 {RED}", "line 3: its time must be later"),
        (f"0:00 {RED}\n0:05 {BLUE}\n# so\n0:04 {RED}", "line 4: its time must be later"),
        (f"0:00 {RED}\n0:20 {BLUE}", "line 2: it comes when the video is over; --seconds 20 must be more"),
    ],
)
def test_mistakes_are_told_by_their_line(text, says):
    with pytest.raises(UserError, match=f"story.txt.*{says}"):
        read(text, 20.0)


def test_a_file_that_cannot_be_read_is_told():
    with pytest.raises(UserError, match="Cannot read none.txt: No such file"):
        script.read("none.txt", None)
    Path("bytes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        script.read("bytes.txt", None)


def test_prompts_are_read_before_any_work(model):
    with pytest.raises(UserError, match="line 2: Unknown in the prompt: dragon"):
        script.check(read(f"0:00 {RED}\n0:05 a dragon")[0], model)
    with pytest.raises(UserError, match="line 3: it comes in the same block as the prompt before; 0.75 s"):
        script.check(read(f"0:00 {RED}\n0:04.5 {BLUE}\n0:05 {RED}")[0], model)
    script.check(read(f"0:00 {RED}\n0:05 {BLUE}\n0:05.8 {RED}")[0], model)


def test_all_prompts_are_encoded_at_once(model):
    """An encoder that is loaded for every call is loaded but once."""
    asked = []
    encoder = SimpleNamespace(encode=asked.append)
    script.check(read(f"0:00 {RED}\n0:05 {BLUE}")[0], dataclasses.replace(model, encoder=encoder))
    assert asked == [[RED, BLUE]]


def test_the_block_on_screen(model):
    """Nine frames come first, then twelve at a time, sixteen a second."""
    shown = np.repeat(np.arange(20), [9] + 19 * [12])
    assert [script.block(frame / 16, model) for frame in range(len(shown))] == shown.tolist()


def clip(model, text, policy, method="rolling"):
    """The latents of a script's video, block by block."""
    lines, how = read(text)[0], change.parse(policy)
    stream = model.latents([RED], 3, 3 * BLOCKS, method, recall=True)
    return np.stack(list(script.play(lines, model, stream, 1, how)))[:, 0]


@pytest.mark.parametrize(
    "time, policy, method, first",
    [
        ("0:04", "keep", "rolling", 5),
        ("0:04", "renoise:9+recache:sink", "rolling", 5),
        ("0:01", "keep", "rolling", 1),
        ("0:04", "renoise:9", "self_forcing", 5),
    ],
)
def test_the_prompt_changes_for_the_block_that_is_on_screen_then(model, time, policy, method, first):
    """`first` is the first block that is any other."""
    plain, other = (clip(model, f"0:00 {RED}{more}", policy, method) for more in ("", f"\n{time} {BLUE}"))
    assert plain.shape == other.shape == (BLOCKS, 3, 4, 4, 4)
    differ = np.abs(plain - other).max((1, 2, 3, 4))
    assert differ[:first].max() == 0 and differ[first:].min() > 0.01


def test_every_prompt_has_its_turn(model):
    """As a stream does that is talked to before its blocks 4 and 10."""
    shown = clip(model, f"0:00 {RED}\n0:03 {BLUE}\n0:07.5 {RED}", "keep")
    stream = model.latents([RED], 3, 3 * BLOCKS, recall=True)
    for number, block in enumerate(shown):
        if number in (4, 10):
            stream.change(model.bind([BLUE if number == 4 else RED]).text_kv, change.parse("keep"))
        np.testing.assert_array_equal(block, next(stream)[0])


def test_the_command_makes_a_video_of_a_script(capsys):
    Path("story.txt").write_text(f"0:00 {RED}\n0:01.5 {BLUE}\n")
    files = ["--out", "a.gif", "--save_latents", "a.npz"]
    arguments = ["--config", TINY, "--script", "story.txt", *files]
    sample.main([*arguments, "--seconds", "3", "--change", "recache"])
    told = capsys.readouterr().out
    assert f'a.gif: 48 frames, 3.0 s, "{RED}", from 1.5 s "{BLUE}"' in told
    assert np.load("a.npz")["latents"].shape == (1, 15, 4, 4, 4)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--script", "story.txt", "--prompt", RED], "--script has all prompts"),
        (["--script", "story.txt", "--seconds", "5"], "story.txt, line 2: it comes when the video is over"),
        (["--script", "dragon.txt"], "dragon.txt, line 1: Unknown in the prompt: dragon"),
        (["--script", "none.txt"], "Cannot read none.txt"),
        (["--script", "story.txt", "--change", "slowly"], "'slowly' is no way to change a prompt"),
        (["--change", "recache"], "--change says what new prompts do; give it with --script"),
    ],
)
def test_mistakes_of_the_command_are_one_sentence_and_leave_nothing(capsys, arguments, says):
    Path("story.txt").write_text(f"0:00 {RED}\n0:06 {BLUE}\n")
    Path("dragon.txt").write_text("0:00 a dragon\n")
    with pytest.raises(SystemExit) as stop:
        sample.main(["--config", TINY, *arguments])
    assert stop.value.code == 2
    assert f"error: {says}" in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["dragon.txt", "story.txt"]
