"""The detector against the renderer: what it finds is what was drawn, crisp or blurred, one object or two."""

from pathlib import Path

import numpy as np
import pytest

from rfjax import colour, config, detect, shapes
from rfjax.colour import hue_gap
from rfjax.errors import UserError
from rfjax.evaluate.truth import soft
from rfjax.stages import STAGES

TWO = shapes.World(objects=2)


def said(thing):
    return thing.name._asdict() | {"pattern": thing.pattern}


@pytest.mark.parametrize("damage", [False, True])
@pytest.mark.parametrize("index", range(10))
def test_finds_every_attribute(index, damage):
    scene = shapes.sample_scene(index, 11, split=shapes.SPLITS[index % 2])
    thing = scene.things[0]
    video = shapes.render(scene, 37 * index, 80)
    found = detect.detect(soft(video, np.random.default_rng(0)) if damage else video)
    assert {name: getattr(found.objects[0], name) for name in said(thing)} == said(thing)
    assert found.background == scene.background
    assert hue_gap(found.objects[0].hue, thing.hue) < 1
    assert hue_gap(found.background_hue, scene.background_hue) < 1
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


def test_motion_is_that_of_the_scene():
    """What each motion's physics keeps, against the numbers that the scene was drawn from."""
    for motion in shapes.MOTIONS:
        scene = next(
            scene
            for scene in (shapes.sample_scene(index) for index in range(99))
            if scene.things[0].name.motion == motion
        )
        thing, path = scene.things[0], detect.detect(shapes.render(scene, 40, 80)).objects[0].path
        arc = 2 * thing.orbit * abs(np.sin(thing.rate * 3 / 16)) / (6 / 16)  # a chord of 6 frames
        drawn = {
            "drifting": (path.velocity, thing.velocity),
            "bouncing": (path.folded, np.abs(thing.velocity)),
            "orbiting": ([path.speed, path.orbit_rate], [arc, thing.rate]),
            "spinning": (path.turn, thing.rate),
        }
        np.testing.assert_allclose(*drawn[motion], rtol=0.05, atol=0.2)


def test_objects_are_counted():
    frames = np.full((4, 64, 64, 3), 90, np.uint8)
    for frame, places in enumerate([[], [(20, 20)], [(5, 40), (40, 10)], [(-6, -6), (30, 30)]]):
        for row, column in places:
            rows, columns = (np.arange(start, start + 14) % 64 for start in (row, column))
            frames[frame, rows[:, None], columns] = 220, 60, 60
    measured = detect.measure(frames)
    assert list(measured.count) == [0, 1, 2, 2]
    assert detect.summarise(measured).miscount == 0.75  # none and two do not make up for each other


@pytest.mark.parametrize("width", [1, 2, 4])
def test_sharpness_of_a_ramp(width):
    """A band whose two edges are ramps of this width: slope 1 / width, in central differences half of it at the two ends."""
    ramp = np.clip((np.arange(64) - 16) / width, 0, 1) * np.clip((48 - np.arange(64)) / width, 0, 1)
    video = np.repeat((40 + 170 * ramp)[None, None, :, None], 64, 1).repeat(3, 3).astype(np.uint8)
    slopes = np.diff(np.clip(np.arange(-2, width + 3) / width, 0, 1))
    central = (slopes[1:] + slopes[:-1]) / 2
    wanted = (central**2).sum()
    assert detect.measure(video).tracks[0].edge[0] == pytest.approx(wanted, rel=0.08)


def test_an_outline_without_an_inside_has_no_sharpness():
    video = np.full((4, 64, 64, 3), 40, np.uint8)
    video[:, 10:54:4, 8:56] = 90  # lines of a pixel: nothing lies two pixels deep
    assert np.all(detect.measure(video).tracks[0].edge == 0)


def test_colours_in_cielab():
    """Published values of sRGB's primaries and white."""
    rgb = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    wanted = [
        [100, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [0, 0, 0],
    ]
    np.testing.assert_allclose(colour.lab(rgb), wanted, atol=0.02)
    assert colour.delta_e(rgb[0], rgb[4]) == pytest.approx(100, abs=0.01)


@pytest.mark.parametrize(
    "world, says",
    [({"size": 32}, "size is 32, but clips are judged at 64"), ({"fps": 24}, "of 24, but .* at 16")],
)
def test_a_stage_does_not_judge_by_another_world_than_the_judge_s(world, says):
    settings = config.load(Path(__file__).parents[1] / "configs/shapes_ode.py")
    settings.world.update(world)
    with pytest.raises(UserError, match=says):
        STAGES["ode"].evaluate(settings)
