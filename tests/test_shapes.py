"""The small world against closed forms: determinism, random access, physics, captions, held-out names."""

import itertools

import numpy as np
import pytest

from rfjax import shapes
from rfjax.errors import UserError

TWO = shapes.World(objects=2)


def scenes(count=40, world=shapes.WORLD, split="train"):
    return [shapes.sample_scene(index, 3, world, split) for index in range(count)]


@pytest.mark.parametrize("world", [shapes.WORLD, TWO])
def test_scene_and_video_are_a_function_of_seed_index_split(world):
    first, again = (shapes.render(shapes.sample_scene(7, 1, world), 5, 4) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for other in [(8, 1, world), (7, 2, world), (7, 1, world, "held_out")]:
        assert (shapes.render(shapes.sample_scene(*other), 5, 4) != first).any()


@pytest.mark.parametrize("world", [shapes.WORLD, TWO, shapes.World(size=32)])
def test_any_span_renders_alone(world):
    for scene in scenes(8, world):
        whole = shapes.render(scene, 0, 40)
        assert whole.shape == (40, world.size, world.size, 3) and whole.dtype == np.uint8
        np.testing.assert_array_equal(whole[23:31], shapes.render(scene, 23, 8))
        assert np.isfinite(shapes.pose(scene.things[0], [1e7])[0]).all()


def test_bounce_is_step_by_step_reflection():
    scene = next(s for s in scenes() if s.things[0].name.motion == "bouncing")
    thing, dt = scene.things[0], 1e-3
    left, right, top, bottom = (
        shapes.RADII[thing.name.size] * side for side in shapes.BOUNDS[thing.name.shape]
    )
    low, high = np.array([-left, -top]), shapes.SPAN - np.array([right, bottom])
    centre, velocity = shapes.pose(thing, [0.0])[0][0].copy(), None
    velocity = (shapes.pose(thing, [1e-6])[0][0] - centre) / 1e-6
    for _ in range(5000):
        centre += velocity * dt
        velocity = np.where(
            centre < low, np.abs(velocity), np.where(centre > high, -np.abs(velocity), velocity)
        )
        centre = np.where(centre < low, 2 * low - centre, np.where(centre > high, 2 * high - centre, centre))
    np.testing.assert_allclose(centre, shapes.pose(thing, [5.0])[0][0], atol=0.02)


def test_every_object_but_a_drifting_one_stays_inside_the_frame():
    for scene in scenes(60):
        thing = scene.things[0]
        if thing.name.motion == "drifting":
            continue
        centre, _ = shapes.pose(thing, np.linspace(0, 60, 999))
        left, right, top, bottom = (
            shapes.RADII[thing.name.size] * side for side in shapes.BOUNDS[thing.name.shape]
        )
        assert (centre.min(0) >= [-left - 1e-6, -top - 1e-6]).all()
        assert (centre.max(0) <= shapes.SPAN - np.array([right, bottom]) + 1e-6).all()


def test_steps_are_smooth():
    for scene in scenes(30):
        centre, angle = shapes.pose(scene.things[0], np.arange(200) / 16)
        step = np.diff(centre, axis=0)
        step -= shapes.SPAN * np.round(step / shapes.SPAN) * (scene.things[0].name.motion == "drifting")
        assert np.hypot(*step.T).max() <= 36 / 16 + 1e-6
        assert np.abs(np.diff(angle)).max() <= 2.5 / 16 + 1e-6


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("size", shapes.SIZES)
def test_signed_distance_agrees_with_a_polygon(shape, size):
    radius = shapes.RADII[size]
    corners = {"circle": 720, "square": 4, "triangle": 3, "star": 10}[shape]
    outer = np.full(corners, shapes.OUTER[shape] * radius)
    if shape == "star":
        outer[1::2] /= 2
    turn = np.pi / 4 * (shape == "square") - np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    polygon = outer[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    grid = np.linspace(-21.3, 21.3, 60)
    x, y = np.meshgrid(grid, grid)
    ax, ay = polygon.T[:, :, None, None]
    bx, by = np.roll(polygon, -1, 0).T[:, :, None, None]
    crosses = ((ay > y) != (by > y)) & (x < (bx - ax) * (y - ay) / np.where(by == ay, 1, by - ay) + ax)
    inside = crosses.sum(0) % 2 == 1
    along = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
    gaps = np.hypot(x - ax - along * (bx - ax), y - ay - along * (by - ay))
    distance = gaps.min(0)
    ours = shapes.signed_distance(shape, x, y, radius)
    clear = distance > 0.01 * radius
    np.testing.assert_array_equal((ours < 0)[clear], inside[clear])
    nearest = ((along > 0) & (along < 1) & (gaps == distance)).any(0)  # on an edge, not at a corner
    np.testing.assert_allclose(np.abs(ours)[inside & nearest], distance[inside & nearest], atol=0.02)


@pytest.mark.parametrize("world", [shapes.WORLD, TWO])
@pytest.mark.parametrize("split", shapes.SPLITS)
def test_caption_says_the_names_and_parses_back(world, split):
    unsaid = 0
    for scene in scenes(60, world, split):
        text = shapes.caption(scene)
        named = shapes.parse(text)
        assert shapes.parse(text.upper().replace(" over", ", over") + ".") == named
        assert shapes.write_caption(named) == text
        assert named.background == scene.background
        for said, thing in zip(named.objects, scene.things, strict=True):
            assert said == (thing.name if thing.says_size else thing.name._replace(size=None))
            assert said.colour != scene.background
            unsaid += said.size is None
            assert shapes.held_out(said.shape, said.colour, said.motion) == (split == "held_out")
    assert 0.15 < unsaid / (60 * world.objects) < 0.45


def test_held_out_is_one_colour_of_every_shape_and_motion():
    combos = list(itertools.product(shapes.SHAPES, shapes.COLOURS, shapes.MOTIONS))
    kept = [combo for combo in combos if shapes.held_out(*combo)]
    assert len(kept) * 8 == len(combos)
    assert {(shape, motion) for shape, _, motion in kept} == set(
        itertools.product(shapes.SHAPES, shapes.MOTIONS)
    )
    assert {colour for _, colour, _ in kept} == set(shapes.COLOURS)


def test_default_prompts_are_captions_seen_in_training():
    for prompt in shapes.PROMPTS:
        named = shapes.parse(prompt)
        assert shapes.write_caption(named) == prompt
        assert not any(shapes.held_out(o.shape, o.colour, o.motion) for o in named.objects)
        assert named.background not in {o.colour for o in named.objects}
    assert shapes.prompts(3) == [shapes.caption(shapes.sample_scene(i, split="held_out")) for i in range(3)]


@pytest.mark.parametrize(
    "text", ["", "a dog", "a red circle over a blue background", "a red circle bouncing"]
)
def test_what_is_not_a_caption_is_refused(text):
    with pytest.raises(UserError, match="cannot read the caption"):
        shapes.parse(text)


def test_unknown_split_and_count_are_refused():
    with pytest.raises(UserError, match="split"):
        shapes.sample_scene(0, split="test")
    with pytest.raises(UserError, match="1 or 2"):
        shapes.sample_scene(0, world=shapes.World(objects=3))


def test_a_spinning_circle_visibly_turns():
    turning = [
        s for s in scenes(300) if (s.things[0].name.shape, s.things[0].name.motion) == ("circle", "spinning")
    ]
    assert turning
    for scene in turning:
        assert np.ptp(shapes.render(scene, 0, 16).astype(int), axis=0).max() > 40
