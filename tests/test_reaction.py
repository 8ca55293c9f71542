"""How a stream reacts to a new prompt, judged on rendered clips whose colours change at a known frame."""

import numpy as np
import pytest

from rfjax import reaction, shapes

FRAMES, CHANGE = 64, 12


def scene(kind):
    """A scene, and what it looks like after the change."""
    before = shapes.sample_scene(3)
    named = shapes.parse(reaction.turned(shapes.caption(before), kind))
    if kind == "background":
        hue = shapes.HUES[named.background]
        return before, before._replace(background=named.background, background_hue=hue)
    thing = before.things[0]
    colour = named.objects[0].colour
    other = thing._replace(name=thing.name._replace(colour=colour), hue=shapes.HUES[colour])
    return before, before._replace(things=(other,))


def clip(kind, change=CHANGE):
    """uint8 frames before a new prompt, and after it: the change is there from frame `change` on."""
    before, after = scene(kind)
    video = shapes.render(before, 0, 48 + change), shapes.render(after, 48 + change, FRAMES - change)
    return np.split(np.concatenate(video), [48])


@pytest.mark.parametrize("kind", ["colour", "background"])
def test_the_frame_from_which_a_change_is_seen_and_what_stays(kind):
    caption = reaction.turned(shapes.caption(scene(kind)[0]), kind)
    found = reaction.judge(*clip(kind), caption, kind, 16)
    assert found.seen == CHANGE and found.shape and found.size and found.rest < 3
    calm = reaction.judge(*clip(kind, FRAMES), caption, kind, 16)
    assert np.isnan(calm.seen) and calm.jump < found.jump and calm.step == pytest.approx(found.step, abs=1)


def test_a_leap_of_the_object_is_told():
    before, after = clip("colour")
    caption = reaction.turned(shapes.caption(scene("colour")[0]), "colour")
    moved = np.concatenate([after[:20], np.roll(after[20:], (20, 20), (1, 2))])
    found = reaction.judge(before, moved, caption, "colour", 16)
    assert found.step == pytest.approx(np.hypot(20, 20), abs=4)


@pytest.mark.parametrize(
    "own, other", [("red", "cyan"), ("cyan", "red"), ("pink", "blue"), ("orange", "cyan")]
)
def test_a_turned_caption_names_another_colour(own, other):
    caption = f"a large {own} circle bouncing over a {other} background"
    for kind in ("colour", "background"):
        old, new = shapes.parse(caption), shapes.parse(reaction.turned(caption, kind))
        (thing, turned), swap = (old.objects[0], new.objects[0]), kind == "colour"
        assert (turned.colour != thing.colour, new.background != old.background) == (swap, not swap)
        assert turned.colour != new.background
        assert turned._replace(colour="") == thing._replace(colour="")


class Fake:
    """Streams of a rendered scene, whose object takes another colour where the prompt changes; its background never does."""

    clips = {change: clip("colour", change) for change in (CHANGE, FRAMES)}

    def __init__(self, model, captions, seed):
        self.captions, self.before = captions, self.clips[CHANGE][0][None]

    def after(self, captions, policy):
        said = captions != self.captions
        return self.clips[CHANGE if said else FRAMES][1][None]


def test_the_table_of_the_command(monkeypatch, tmp_path, capsys):
    class Sampler:
        video = reaction.sampler.VideoConfig(64, 64, 16)

    monkeypatch.setattr(reaction, "Forks", Fake)
    monkeypatch.setattr(reaction.sampler, "load", lambda settings, place: Sampler())
    only = scene("colour")[0]
    monkeypatch.setattr(reaction.shapes, "sample_scene", lambda *_: only)
    out = tmp_path / "table.md"
    reaction.main(["--clips", "1", "--policies", "keep", "--out", str(out)])
    colour, background = out.read_text().split("## Another background")
    rows = [line.split(" | ")[:3] for line in colour.splitlines()[4:6]]
    assert rows == [
        [f"| {reaction.NONE}", "–", "–"],
        ["| keep", f"{CHANGE} ({CHANGE})", "100"],
    ]
    assert "| keep | – | 0 |" in background and out.read_text() in capsys.readouterr().out


def test_a_world_that_is_not_judged_is_told_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    text = (reaction.ROOT / "configs/shapes.py").read_text()
    (tmp_path / "fast.py").write_text(text.replace('"fps": 16', '"fps": 24'))
    monkeypatch.setattr(reaction.sampler, "load", None)
    with pytest.raises(SystemExit):
        reaction.main(["--config", str(tmp_path / "fast.py")])
    assert "24 frames a second, in a world of 24, but clips are judged at 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--clips", "0"], "raise --clips"),
        (["--policies", "keep,fade"], "'fade' is no way to change a prompt"),
        (["--out", "nowhere/a.md"], "cannot be written"),
    ],
)
def test_mistakes_are_told_before_work(capsys, arguments, says):
    with pytest.raises(SystemExit):
        reaction.main(arguments)
    assert says in capsys.readouterr().err
