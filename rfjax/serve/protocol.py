"""What a viewer and the server tell each other.

A viewer sends JSON texts, `{"type": "prompt", "prompt": "…"}`: one of `REQUESTS`, with exactly its fields. The server answers with
JSON texts, one of the replies below, and sends every frame as a binary message: frame number and prompt number as
big-endian uint32, then a JPEG. Both numbers are 0 at a start; the prompt number is the count of prompts taken since.
"""

import dataclasses
import json
import re
import struct

from rfjax.errors import UserError

NAME = "rfjax.1"  # the subprotocol that a viewer asks for
MESSAGE = 16_384  # bytes of a viewer's message at most; the socket of a longer one is closed with code 1009
PROMPT = 2_000  # characters of a prompt at most
SEEDS = 2**32
REQUESTS_PER_SECOND, BURST = 10.0, 20.0
BYTES_PER_SECOND, BYTES = 16_384.0, 32_768.0

# Codes with which the server closes a socket (RFC 6455, section 7.4); the reason is a sentence.
GOING, BROKEN, FORBIDDEN, LATER = 1001, 1011, 1008, 1013
IDLE = 4000  # of our own: nothing came from the viewer for long


class Refusal(UserError):
    """A request that is not done, and why. The stream goes on as it was."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code  # "malformed" | "prompt" | "full" | "state" | "late"


# ----------------------------------------------------------------------------------------------------- requests


@dataclasses.dataclass(frozen=True)
class Start:
    """A stream from nothing; where one runs, it begins anew."""

    prompt: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Another prompt for the stream that runs."""

    prompt: str


@dataclasses.dataclass(frozen=True)
class Pause:
    """Holds the stream, or lets it go on; its place is kept."""

    paused: bool


@dataclasses.dataclass(frozen=True)
class Stop:
    """Ends the stream and frees its place; the socket stays."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """Asks for `Figures`; also says that someone is there."""


Request = Start | Prompt | Pause | Stop | Stats
REQUESTS = {kind.__name__.lower(): kind for kind in (Start, Prompt, Pause, Stop, Stats)}
WANTED = {str: "a text", int: "a whole number", bool: "true or false"}


def parse(message: str | bytes) -> Request:
    """The request that a message holds; Refusal for any other text."""
    if isinstance(message, bytes):
        raise Refusal("malformed", "Requests are JSON texts; this was a binary message.")
    try:
        told = json.loads(message)
    except (ValueError, RecursionError):
        raise Refusal("malformed", "The message is no JSON.") from None
    kind = told.pop("type", None) if isinstance(told, dict) else None
    if not isinstance(kind, str) or kind not in REQUESTS:
        raise Refusal("malformed", f'A request is an object whose "type" is one of {", ".join(REQUESTS)}.')
    fields = {field.name: field.type for field in dataclasses.fields(REQUESTS[kind])}
    if set(told) != set(fields):
        needs = ", ".join(fields) or "nothing else"
        raise Refusal("malformed", f'A request of type "{kind}" has {needs} beside its type.')
    for name, wanted in fields.items():
        if type(told[name]) is not wanted:  # not isinstance: true is no number
            raise Refusal("malformed", f'"{name}" must be {WANTED[wanted]}.')
    return _checked(REQUESTS[kind](**told))


def _checked(request: Request) -> Request:
    """The request, its prompt in one line; Refusal where its prompt or its seed is out of bounds."""
    if not 0 <= getattr(request, "seed", 0) < SEEDS:
        raise Refusal("malformed", f"The seed must be from 0 to {SEEDS - 1}.")
    if not isinstance(request, Start | Prompt):
        return request
    if len(request.prompt) > PROMPT:
        raise Refusal(
            "prompt", f"The prompt has {len(request.prompt)} characters; {PROMPT} is the most it may have."
        )
    if re.search(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]", request.prompt):
        raise Refusal("prompt", "The prompt has characters that are no text.")
    prompt = " ".join(request.prompt.split())
    if not prompt:
        raise Refusal("prompt", "The prompt is empty; say what to show.")
    return dataclasses.replace(request, prompt=prompt)


class Rate:
    """A viewer's allowance of requests, or of bytes: `burst` at once, `per_second` in the long run."""

    def __init__(self, per_second: float = REQUESTS_PER_SECOND, burst: float = BURST):
        self.per_second, self.burst = per_second, burst
        self.left, self.at = burst, 0.0

    def allows(self, now: float, count: float = 1) -> bool:
        """Whether so many more may come at this time, in seconds."""
        self.left = min(self.burst, self.left + (now - self.at) * self.per_second)
        self.at = now
        self.left -= count
        return self.left >= 0


# ------------------------------------------------------------------------------------------------------ replies


@dataclasses.dataclass(frozen=True)
class Hello:
    """The first word on a socket: what this server shows, and what it takes."""

    width: int
    height: int
    fps: float
    places: int
    examples: tuple[str, ...]
    words: dict[str, tuple[str, ...]]  # group → the words that a prompt may have; {}: any
    prompt_limit: int = PROMPT
    idle_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Started:
    """The stream has its place; frames 0, 1, … of it are to come, and none of an earlier one."""

    prompt: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Prompted:
    """The prompt is taken; frames that were made with it say `number`."""

    prompt: str
    number: int


@dataclasses.dataclass(frozen=True)
class Paused:
    paused: bool


@dataclasses.dataclass(frozen=True)
class Stopped:
    """No frame comes after this."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """How it goes."""

    places: int
    taken: int
    frames: int  # of this stream
    dropped: int  # of these, not sent, as the viewer was too slow
    ahead_seconds: float  # what the viewer has in hand, by the server's clock
    step_seconds: float  # what the newest step of the batch took


@dataclasses.dataclass(frozen=True)
class Refused:
    code: str
    message: str


Reply = Hello | Started | Prompted | Paused | Stopped | Figures | Refused


def text(reply: Reply) -> str:
    """The reply as it is sent."""
    return json.dumps({"type": type(reply).__name__.lower()} | dataclasses.asdict(reply))


# ------------------------------------------------------------------------------------------------------- frames


@dataclasses.dataclass(frozen=True)
class Frame:
    number: int
    prompt: int
    jpeg: bytes


HEADER = struct.Struct(">II")


def binary(frame: Frame) -> bytes:
    """The frame as it is sent."""
    return HEADER.pack(frame.number, frame.prompt) + frame.jpeg


def frame(message: bytes) -> Frame:
    """The frame that a binary message holds."""
    return Frame(*HEADER.unpack_from(message), message[HEADER.size :])
