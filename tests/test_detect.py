"""The detector against the renderer: what it finds is what was drawn, crisp or blurred, one object or two."""

import types

import numpy as np
import pytest

from rfjax import detect, shapes
from rfjax.errors import UserError
from rfjax.evaluate import beginnings, blurred, evaluate_videos, ground_truth, main
from rfjax.rollout import RolloutConfig
from rfjax.score import ATTRIBUTES, report, score
from rfjax.vae import VAE, VAEConfig

TWO = shapes.World(objects=2)


def said(thing):
    return thing.name._asdict() | {"pattern": thing.pattern}


@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("index", range(10))
def test_finds_every_attribute(index, damage):
    scene = shapes.sample_scene(index, 11, split=shapes.SPLITS[index % 2])
    thing = scene.things[0]
    video = shapes.render(scene, 37 * index, 80)
    found = detect.detect(blurred(video, np.random.default_rng(0)) if damage else video)
    assert {name: getattr(found.objects[0], name) for name in said(thing)} == said(thing)
    assert found.background == scene.background
    assert detect.hue_gap(found.objects[0].hue, thing.hue) < 1
    assert detect.hue_gap(found.background_hue, scene.background_hue) < 1
    assert found.objects[0].radius == pytest.approx(shapes.RADII[thing.name.size], rel=0.1)
    if thing.pattern == "stripes" and thing.name.motion != "spinning":
        off = (found.objects[0].stripe_angle - thing.pattern_angle + np.pi / 2) % np.pi - np.pi / 2
        assert abs(off) < 0.1


def test_tracks_the_centre_across_the_frames_edge():
    scene = next(
        scene
        for scene in (shapes.sample_scene(index) for index in range(50))
        if scene.things[0].name[0] == "circle" and scene.things[0].name.motion == "drifting"
    )
    drawn, _ = shapes.pose(scene.things[0], np.arange(60) / 16)
    found = detect.measure(shapes.render(scene, 0, 60)).tracks[0].centre
    assert np.abs((found - drawn + 32) % 64 - 32).max() < 0.3


def test_two_objects_that_hide_each_other():
    right = 0
    for index in range(6):
        scene = shapes.sample_scene(index, 5, TWO)
        found = detect.detect(shapes.render(scene, 0, 80), objects=2)
        names = {(o.shape, o.colour, o.motion, o.size) for o in found.objects}
        right += sum(tuple(thing.name) in names for thing in scene.things)
    assert right >= 11


def test_a_frozen_clip_is_still_and_an_empty_one_shows_nothing():
    scene = shapes.sample_scene(3)
    frozen = np.repeat(shapes.render(scene, 0, 1), 80, 0)
    assert detect.detect(frozen).objects[0].motion == "still"
    found = detect.detect(np.full((80, 64, 64, 3), 90, np.uint8))
    assert found.objects == (detect.NOTHING,) and found.background is None


def test_jitter_is_no_motion():
    scene = shapes.sample_scene(3)
    frame = shapes.render(scene, 0, 1)[0]
    rng = np.random.default_rng(0)
    video = np.stack([np.roll(frame, rng.integers(-9, 10, 2), (0, 1)) for _ in range(80)])
    assert detect.detect(video).objects[0].motion is None


def test_score_of_a_clip_that_changes_half_way():
    """Red turns green and stripes go: the first 5 s are right, the last 5 s are not, and drift says so."""
    scene = next(
        scene
        for scene in (shapes.sample_scene(index) for index in range(500))
        if scene.things[0].name.colour == "red" and scene.things[0].pattern == "stripes"
    )
    later = scene._replace(things=(scene.things[0]._replace(hue=125.0, pattern="plain"),))
    video = np.concatenate([shapes.render(scene, 0, 80), shapes.render(later, 80, 80)])
    result = score(video, shapes.caption(scene))
    assert all(result["first"].values())
    assert not result["last"].pop("colour") and all(result["last"].values())
    assert list(result["seconds"]["colour"]) == [True] * 5 + [False] * 5
    hue = detect.hue_gap(scene.things[0].hue, 125.0)
    np.testing.assert_allclose(result["drift"]["hue"], [0] * 5 + [hue] * 5, atol=0.5)
    assert list(result["drift"]["pattern"]) == [0] * 5 + [1] * 5
    assert max(result["drift"]["background"]) < 1


def test_score_does_not_judge_a_size_left_unsaid():
    scene = next(s for s in (shapes.sample_scene(i) for i in range(99)) if not s.things[0].says_size)
    result = score(shapes.render(scene, 0, 80), shapes.caption(scene))
    assert set(result["first"]) == set(ATTRIBUTES) - {"size"}


def test_score_refuses_what_is_not_a_caption():
    with pytest.raises(UserError, match="caption"):
        score(np.zeros((16, 64, 64, 3), np.uint8), "a dog")


def test_score_matches_two_objects_in_any_order():
    scene = shapes.sample_scene(1, 5, TWO)
    video = shapes.render(scene, 0, 80)
    named = shapes.parse(shapes.caption(scene))
    texts = [shapes.write_caption(named._replace(objects=named.objects[::turn])) for turn in (1, -1)]
    first, second = (score(video, text)["first"] for text in texts)
    assert first == second and all(first.values())


def test_score_judges_the_said_size_of_either_object():
    scene = shapes.sample_scene(1, 5, TWO)
    video = shapes.render(scene, 0, 80)
    for said, wrong in [((True, False), False), ((False, True), False), ((True, False), True)]:
        named = [
            thing.name._replace(size=thing.name.size if keep else None)
            for thing, keep in zip(scene.things, said, strict=True)
        ]
        if wrong:
            named[0] = named[0]._replace(size=next(size for size in shapes.SIZES if size != named[0].size))
        text = shapes.write_caption(shapes.Caption(tuple(named), scene.background))
        assert score(video, text)["first"]["size"] != wrong


def test_report_counts_and_averages():
    scores = ground_truth(4, 6, shapes.WORLD)
    scores[0]["first"]["shape"] = False
    text = report(scores)
    assert "| shape | 75.0 | 100.0 | 100.0 |" in text and "| all | 75.0 | 100.0 | |" in text
    assert "4 clips of 6 s" in text and "| hue (degrees) | 0.0" in text


def test_swapped_captions_are_judged_wrong():
    scenes = [shapes.sample_scene(index) for index in range(2)]
    videos = (shapes.render(scene, 0, 80) for scene in scenes)
    scores = evaluate_videos(videos, [shapes.caption(scene) for scene in scenes[::-1]])
    assert not any(all(clip["first"].values()) for clip in scores)


def test_given_beginnings_are_the_scenes_own_frames():
    model = types.SimpleNamespace(vae=VAE(VAEConfig(dim=8)), rollout=RolloutConfig())
    scenes = [shapes.sample_scene(index, split="held_out") for index in range(2)]
    assert beginnings(model, scenes, None) == []
    picture, video = (beginnings(model, scenes, given) for given in ("picture", "video"))
    for clip, scene in enumerate(scenes):
        rendered = shapes.render(scene, 0, 33)
        np.testing.assert_array_equal(video[:, clip], rendered)
        np.testing.assert_array_equal(picture[:, clip], rendered[:1].repeat(9, 0))


def test_command_writes_its_tables(tmp_path, capsys):
    main(["--ground_truth", "1", "--seconds", "5", "--out", str(tmp_path / "report.md")])
    assert (tmp_path / "report.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--ground_truth", "0"])
    assert "error: Need at least one clip" in capsys.readouterr().err
