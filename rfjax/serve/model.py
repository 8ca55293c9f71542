"""What the server shows: the batch of a config, and what viewers are told of it."""

import argparse

from rfjax import change, compilation, config, preflight, sampler, shapes, text
from rfjax.errors import UserError
from rfjax.live import Live
from rfjax.serve import protocol


def load(args: argparse.Namespace) -> tuple[Live, protocol.Hello]:
    """The batch with its weights, nothing compiled yet; UserError for what cannot run here."""
    policy = args.policy or change.DEFAULT
    change.parse(policy)  # before the weights are fetched
    compilation.keep_programs(args.compile_cache)
    settings = config.load(args.config)
    if settings.get("method", "rolling") != "rolling":
        raise UserError(
            f"{args.config} is for {settings.method}, and the server rolls out by rolling windows; give another."
        )
    if not args.skip_preflight:
        preflight.check(settings, args.limit, preflight.capacity(), "rolling")
    model = sampler.load(settings, args.weights)
    small = isinstance(model.encoder, text.WordEncoder)
    examples = shapes.PROMPTS if small else (settings.get("prompt", ""),)
    return Live(model, args.limit, policy), hello(model.video, args.limit, args.idle, examples, small)


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
