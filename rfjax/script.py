"""A video's prompts, each from a time on: a text file with lines such as

    0:00 a large red circle bouncing over a blue background
    0:20 a large green circle bouncing over a blue background

minutes and seconds into the video (hours go before, fractions of a second behind). Empty lines, and lines that begin with #, say
nothing. A mistake is told with the number of its line, before work starts.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from jax import Array

from rfjax import files
from rfjax.change import Change
from rfjax.errors import UserError
from rfjax.sampler import Sampler, block_lengths
from rfjax.stream import Stream

LAST = 10.0  # seconds that the last prompt is shown, where nothing else is said
EXAMPLE = "0:20 a red circle …"
_LINE = re.compile(r"(?:(\d+):(?=\d\d:))?(\d+):([0-5]\d(?:\.\d+)?)\s+(\S.*)")


class Line(NamedTuple):
    """A prompt and the time from which it holds."""

    place: str  # "story.txt, line 3"
    seconds: float
    prompt: str


def read(path: str, seconds: float | None) -> tuple[list[Line], float]:
    """The lines of a script, and how long the video is: `seconds`, or until LAST after the last prompt.

    Raises:
      UserError: a file that cannot be read or says nothing; a line without time or prompt; times that do not begin at 0:00, do not
        rise, or lie beyond `seconds`.
    """
    lines = [
        _line(f"{path}, line {number}", line)
        for number, line in enumerate(files.lines(path), start=1)
        if line and not line.startswith("#")
    ]
    if not lines:
        raise UserError(f"{path} holds no prompt; write lines such as {EXAMPLE!r}.")
    if lines[0].seconds:
        raise UserError(f"{lines[0].place}: the first prompt must come at 0:00, where the video begins.")
    for before, line in itertools.pairwise(lines):
        if line.seconds <= before.seconds:
            raise UserError(f"{line.place}: its time must be later than that of the prompt before.")
        if seconds is not None and line.seconds >= seconds:
            raise UserError(
                f"{line.place}: it comes when the video is over; --seconds {seconds:g} must be more."
            )
    return lines, lines[-1].seconds + LAST if seconds is None else seconds


def _line(place: str, line: str) -> Line:
    match = _LINE.fullmatch(line)
    if not match:
        raise UserError(f"{place}: write minutes:seconds and a prompt, such as {EXAMPLE!r}, not {line!r}.")
    hours, minutes, seconds, prompt = match.groups()
    return Line(place, 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds), prompt)


def check(lines: list[Line], model: Sampler) -> None:
    """UserError for a prompt that cannot be read, or that comes within the same block as the one before."""
    try:
        model.encoder.encode([line.prompt for line in lines])  # all at once: UMT5 is loaded but once
    except UserError:
        for line in lines:
            _read(line, model)
        raise
    for before, line in itertools.pairwise(lines):
        if block(line.seconds, model) == block(before.seconds, model):
            length = block_lengths(model.vae.config, model.rollout)[1] / model.video.fps
            raise UserError(
                f"{line.place}: it comes in the same block as the prompt before; {length:g} s between them are enough."
            )


def _read(line: Line, model: Sampler) -> None:
    """UserError with the line's place where its prompt cannot be read."""
    try:
        model.encoder.encode([line.prompt])
    except UserError as error:
        raise UserError(f"{line.place}: {error}") from error


def block(seconds: float, model: Sampler) -> int:
    """Which block is on screen at a time."""
    first, later = block_lengths(model.vae.config, model.rollout)
    return (round(seconds * model.video.fps) - first) // later + 1


def play(lines: list[Line], model: Sampler, stream: Stream, clips: int, change: Change) -> Iterator[Array]:
    """The blocks of a stream whose prompts, one for all its clips, change in time.

    A prompt changes just before the block is taken that is on screen at its time: the first that can show anything of it.
    """
    coming = lines[1:]
    for number in itertools.count():
        if coming and block(coming[0].seconds, model) == number:
            stream.change(model.bind([coming.pop(0).prompt] * clips).text_kv, change)
        shown = next(stream, None)
        if shown is None:
            return
        yield shown
