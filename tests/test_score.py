"""Scores against the captions, and the drift score's parts against its definition."""

import numpy as np
import pytest

from rfjax import detect, drift, shapes
from rfjax.colour import hue_gap
from rfjax.errors import UserError
from rfjax.evaluate import report
from rfjax.score import ATTRIBUTES, LEVELS, score

TWO = shapes.World(objects=2)


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
    hue = hue_gap(scene.things[0].hue, 125.0)
    np.testing.assert_allclose(result["drift"]["hue"], [0] * 5 + [hue] * 5, atol=0.5)
    assert list(result["drift"]["pattern"]) == [0] * 5 + [1] * 5
    assert result["change"]["parts"]["colour"] > 0.5 and result["change"]["parts"]["motion"] == 0
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


def test_swapped_captions_are_judged_wrong():
    scenes = [shapes.sample_scene(index) for index in range(2)]
    pairs = zip(scenes, scenes[::-1], strict=True)
    scores = [score(shapes.render(scene, 0, 80), shapes.caption(other)) for scene, other in pairs]
    assert not any(all(clip["first"].values()) for clip in scores)


def test_levels_of_a_rendered_clip():
    """Each against what the scene was drawn from; the colour is a little off its name in every scene."""
    scene = shapes.sample_scene(0)
    thing = scene.things[0]
    named = scene._replace(things=(thing._replace(hue=shapes.HUES[thing.name.colour], pattern="plain"),))
    level = score(shapes.render(named, 0, 96), shapes.caption(scene))["level"]
    assert set(level) == set(LEVELS) and all(len(values) == 6 for values in level.values())
    assert level["overlap with the named shape"].min() > 90
    assert level["error of the named colour"].max() < 1
    assert not level["objects too many or too few"].any()


def test_two_objects_keep_their_order_in_the_drift_score():
    scene = shapes.sample_scene(1, 5, TWO)
    result = score(shapes.render(scene, 0, 160), shapes.caption(scene))
    assert result["change"]["score"] < 0.05 and result["change"]["moving"] == 1


def test_parts_lie_between_their_anchors():
    low, high = ({name: pair[side] for name, pair in drift.ANCHORS.items()} for side in (0, 1))
    half = {name: (low[name] + high[name]) / 2 for name in low}
    for apart, value in [(low, 0), (half, 0.5), (high, 1), (dict.fromkeys(low, np.inf), 1)]:
        assert drift.parts(apart) == pytest.approx(dict.fromkeys(drift.PARTS, value))
    assert drift.parts(low | {"edge": high["edge"]})["form"] == 1


def test_the_drift_score_by_hand():
    """One part at its worst is a sixth; what moves half as little as anything rendered keeps half; frozen and empty are 1."""
    scene = shapes.sample_scene(0)
    first = detect.detect(shapes.render(scene, 0, 80))
    named = [scene.things[0].name]
    assert drift.between(first, first, named)["score"] == 0
    far = first._replace(texture=1 - first.texture)
    assert drift.between(first, far, named)["score"] == pytest.approx(1 / 6)
    slow = far._replace(changed=drift.LEAST[named[0].motion] / 2 * first.objects[0].area)
    assert drift.between(first, slow, named)["score"] == pytest.approx(1 - 0.5 * 5 / 6)
    assert drift.between(first, first._replace(changed=0.0), named)["score"] == 1
    gone = detect.detect(np.full((80, 64, 64, 3), 90, np.uint8))
    assert drift.between(first, gone, named)["score"] == 1


def test_a_clip_is_judged_by_its_last_five_seconds():
    """15 s that stand still from 9.4 s on."""
    scene = shapes.sample_scene(0)
    video = shapes.render(scene, 0, 240)
    video[150:] = video[150]
    found = score(video, shapes.caption(scene))
    assert found["change"]["moving"] == 0 and found["change"]["score"] == 1
    assert found["first"]["motion"] and not found["last"]["motion"]
    told = report.summary([found])
    assert told["right motion, first 5 s"]["mean"] == 1 and told["right motion, last 5 s"]["mean"] == 0
