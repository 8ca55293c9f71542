"""A batch of streams without a network: it renders what each prompt says. As a command, the server with it in place of a model:

python tests/fake_live.py --port 8000 --limit 2
"""

import io
import time
from types import SimpleNamespace

import numpy as np
from PIL import Image

from rfjax import shapes, text
from rfjax.errors import UserError
from rfjax.serve import __main__ as command
from rfjax.serve import protocol

RAMP = 4  # steps of a stream before its first frames
WORDS = {"size": shapes.SIZES, "colour": shapes.COLOURS, "shape": shapes.SHAPES, "motion": shapes.MOTIONS}
WORDS["other"] = ("a", "an", "and", "over", "background")


class FakeLive:
    """The same interface as rfjax.live.Live; `pause` seconds a step."""

    def __init__(self, limit: int, pause: float = 0.0):
        self.limit, self.pause, self.warmed = limit, pause, False
        self.sampler = SimpleNamespace(video=SimpleNamespace(height=64, width=64, fps=16))
        self.streams = {}  # slot → [scene, frames shown, steps of the ramp that are left, prompt]
        self.stepped = []  # the slots of each step
        self.policies = []  # of each change

    def warm(self):
        self.warmed = True

    def join(self, prompt, seed):
        stream = [scene(prompt, seed), 0, RAMP, prompt]
        if len(self.streams) == self.limit:
            raise UserError("full")
        slot = min(set(range(self.limit)) - set(self.streams))
        self.streams[slot] = stream
        return slot

    def leave(self, slot):
        del self.streams[slot]

    def change(self, slot, prompt, policy=None):
        self.policies.append(policy)
        self.streams[slot][0], self.streams[slot][3] = scene(prompt, 0), prompt

    def restart(self, slot, seed):
        prompt = self.streams[slot][3]
        self.streams[slot] = [scene(prompt, seed), 0, RAMP, prompt]

    def step(self, slots):
        time.sleep(self.pause)
        self.stepped.append(tuple(slots))
        return {slot: self._block(self.streams[slot]) for slot in slots if self._runs(self.streams[slot])}

    def _runs(self, stream):
        stream[2] -= 1
        return stream[2] < 0

    def _block(self, stream):
        count = 9 if stream[1] == 0 else 12
        stream[1] += count
        return shapes.render(stream[0], stream[1] - count, count)


def scene(prompt, seed):
    """A scene that the prompt describes; UserError for a prompt with another word."""
    text.WordEncoder().encode([prompt])
    said = shapes.parse(prompt)
    named = said.objects[0]._replace(size=said.objects[0].size or "large")
    drawn = shapes.sample_scene(seed)
    thing = shapes._sample_thing(np.random.default_rng(seed), named)
    hue = shapes.HUES[said.background]
    return drawn._replace(things=(thing,), background=said.background, background_hue=hue)


def pixels(frame):
    """What a frame shows: uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(frame.jpeg)).convert("RGB"))


def hello(places, idle=120.0):
    return protocol.Hello(64, 64, 16.0, places, shapes.PROMPTS, WORDS, idle_seconds=idle)


def main(argv=None):
    from rfjax.serve import run

    args = command.parse(argv)
    listener = run.listen(args.host, args.port)
    live, said = FakeLive(args.limit, pause=0.08), hello(args.limit, args.idle)
    run.serve(live, said, listener, args.token, tuple(args.origin))


if __name__ == "__main__":
    main()
