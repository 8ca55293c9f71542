"""Clips damaged on purpose from their middle on, and what each damage must change: the judge is judged by them.

A damage changes the scene (the second half shows another colour, background, speed, …, at the same time of the same path)
or the pixels (blur, hue, a frozen picture).
"""

import dataclasses

import numpy as np

from rfjax import shapes

MEASURES = (  # columns of the matrix: what the last 5 s get right, then the parts of the drift score
    *("right shape", "right colour", "right size", "right background", "right motion", "count"),
    *("colour", "surface", "size", "shape", "edge", "background", "motion", "moving"),
)
OBJECT = {"right shape", "right colour", "right size", "right motion", "count"}
OBJECT |= {"colour", "surface", "size", "shape", "edge", "motion", "moving"}


def blur(video, sigma=1.2):
    """uint8 [F, H, W, 3] after a Gaussian blur of so many pixels; the picture's edge goes on as it is."""
    taps = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    out = video.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(out, [(4, 4) if side == axis else (0, 0) for side in range(4)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(taps), axis)
        out = windows @ (taps / taps.sum()).astype(np.float32)
    return (out + 0.5).astype(np.uint8)


def noisy(video, rng, level=4.0):
    """uint8 video after Gaussian noise of so many levels of 255."""
    return np.clip(video + level * rng.standard_normal(video.shape, np.float32) + 0.5, 0, 255).astype(
        np.uint8
    )


def turn_hue(video, degrees=20.0):
    """uint8 video whose colours are all turned around the grey axis: another hue of most of the same names."""
    angle = np.deg2rad(degrees)
    grey = np.full((3, 3), 1 / 3)
    across = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turn = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) * grey + np.sin(angle) * across
    return np.clip(video @ turn.T.astype(np.float32) + 0.5, 0, 255).astype(np.uint8)


def _thing(scene, **changes):
    return scene._replace(things=tuple(thing._replace(**changes) for thing in scene.things))


def _colour(scene):
    """The object in a name's colour that is neither its own nor the background's."""
    thing = scene.things[0]
    free = [name for name in shapes.COLOURS if name not in (thing.name.colour, scene.background)]
    name = max(free, key=lambda name: abs((shapes.HUES[name] - thing.hue + 180) % 360 - 180))
    return _thing(scene, hue=shapes.HUES[name], name=thing.name._replace(colour=name))


def _background(scene):
    """Another background's hue and texture, as far from its own and not the object's."""
    taken = scene.things[0].name.colour, scene.background
    name = max(
        (name for name in shapes.COLOURS if name not in taken),
        key=lambda name: abs((shapes.HUES[name] - scene.background_hue + 180) % 360 - 180),
    )
    return scene._replace(background=name, background_hue=shapes.HUES[name], waves=scene.waves[::-1] * -1)


def _shape(scene):
    name = scene.things[0].name
    return _thing(scene, name=name._replace(shape="circle" if name.shape == "star" else "star"))


def _size(scene):
    name = scene.things[0].name
    return _thing(scene, name=name._replace(size="small" if name.size == "large" else "large"))


def _surface(scene):
    return _thing(scene, pattern="plain" if scene.things[0].pattern != "plain" else "dots")


def _rendered(change):
    def damaged(scene, start, frames):
        return shapes.render(change(scene), start, frames)

    return damaged


def _filtered(change):
    def damaged(scene, start, frames):
        return change(shapes.render(scene, start, frames))

    return damaged


def _frozen(scene, start, frames):
    return np.repeat(shapes.render(scene, start, 1), frames, 0)


def _faster(scene, start, frames):
    """Twice as fast: every second frame, from the same one on."""
    world = dataclasses.replace(scene.world, fps=scene.world.fps // 2)
    return shapes.render(scene._replace(world=world), start // 2, frames)


DAMAGES = {  # name: (scene, start, frames) → uint8 [frames, H, W, 3]
    "blurred": _filtered(blur),
    "hue turned": _filtered(turn_hue),
    "frozen": _frozen,
    "object gone": _rendered(lambda scene: scene._replace(things=())),
    "another colour": _rendered(_colour),
    "another surface": _rendered(_surface),
    "another shape": _rendered(_shape),
    "another size": _rendered(_size),
    "another background": _rendered(_background),
    "twice as fast": _faster,
}
FALLS = {  # what a damage must change
    "blurred": {"edge"},
    "hue turned": {"colour", "background"},
    "frozen": {"right motion", "motion", "moving"},
    "object gone": OBJECT,
    "another colour": {"right colour", "colour"},
    "another surface": {"surface"},
    "another shape": {"right shape", "shape"},
    "another size": {"right size", "size"},
    "another background": {"right background", "background"},
    "twice as fast": {"motion"},
}
MAY_FALL = {  # what it may change besides; the rest it must leave
    "blurred": {"shape", "surface", "size", "moving", "right shape"},
    "hue turned": {"right colour", "right background", "surface"},
    "frozen": set(),
    "object gone": {"background"},
    "another colour": {"surface"},
    "another surface": {"moving", "colour", "motion", "right motion"},  # a plain circle turns unseen
    "another shape": {"surface", "colour", "size", "right size", "edge", "motion", "moving", "right motion"},
    "another size": {"shape", "edge", "moving", "motion", "surface", "right motion"},
    "another background": set(),
    "twice as fast": {"moving", "right motion"},
}


def damaged(scene, frames, name):
    """A clip of a scene, uint8 [frames, H, W, 3], whose second half has a damage."""
    half = frames // 2
    return np.concatenate([shapes.render(scene, 0, half), DAMAGES[name](scene, half, frames - half)])
