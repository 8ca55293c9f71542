"""What the server shows: the batch of a config, and what viewers are told of it."""

import argparse
import dataclasses
import functools

import jax
import numpy as np

from rfjax import compilation, config, preflight, prompts, sampler, shapes, text
from rfjax.live import DEFAULT, Live
from rfjax.serve import protocol


class Resident(prompts.PromptEncoder):
    """UMT5 kept in the host's memory, as prompts come at any time; of what viewers write nothing is kept on the disk."""

    @functools.cached_property
    def _read(self):
        return self.reader(jax.local_devices(backend="cpu")[0])

    def _run(self, captions: list[str]) -> list[np.ndarray]:
        return self._read(captions)


def load(args: argparse.Namespace) -> tuple[Live, protocol.Hello]:
    """The batch with its weights, nothing compiled yet; UserError for what cannot run here."""
    compilation.keep_programs(args.compile_cache)
    settings = config.load(args.config)
    if not args.skip_preflight:
        preflight.check(settings, args.limit, preflight.capacity(), "rolling")
    model = sampler.load(settings, args.weights)
    if isinstance(model.encoder, prompts.PromptEncoder):
        encoder = Resident(model.encoder.folder, model.encoder.config, model.encoder.text_len)
        model = dataclasses.replace(model, encoder=encoder)
    small = isinstance(model.encoder, text.WordEncoder)
    examples = shapes.PROMPTS if small else (settings.prompt,)
    return Live(model, args.limit, args.policy or DEFAULT), hello(
        model.video, args.limit, args.idle, examples, small
    )


def hello(
    video: sampler.VideoConfig, places: int, idle: float, examples: tuple[str, ...], small: bool
) -> protocol.Hello:
    """What a viewer is told first; `small`: whether prompts have the small world's words alone."""
    words = {
        "size": shapes.SIZES,
        "colour": shapes.COLOURS,
        "shape": shapes.SHAPES,
        "motion": shapes.MOTIONS,
    }
    known = {word for group in words.values() for word in group}
    words["other"] = tuple(word for word in text.VOCABULARY if word not in known)
    look = (video.width, video.height, video.fps)
    return protocol.Hello(*look, places, examples, words if small else {}, idle_seconds=idle)
