"""Text encoders: captions → fixed features that the DiT's cross-attention reads.

The small world's captions have two dozen words, so its encoder has no parameters: word p of a caption is

    feature[p] = s · onehot(word)  ⊕  0 …  ⊕  [cos(p ω_i), sin(p ω_i)],    ω_i = 100^(-i/12),  i = 0 … 11.

Cross-attention carries no position of its own; the sinusoid is what binds "red" to "circle" where a caption
has two objects. s = √12 gives the word and its position the same norm. Padding is zeros, and so is all of
the unconditional caption.
"""

import dataclasses
import difflib
import re

import numpy as np

from rfjax import shapes
from rfjax.errors import UserError

VOCABULARY = (
    *("a", "an", "and", "over", "background"),
    *(*shapes.SIZES, *shapes.COLOURS, *shapes.SHAPES, *shapes.MOTIONS),
)
POSITION_DIM = 24
_INDEX = {word: index for index, word in enumerate(VOCABULARY)}
_SEPARATORS = re.compile(r"[^\w']+")


@dataclasses.dataclass(frozen=True)
class WordEncoder:
    """One feature vector a word, from the small world's vocabulary."""

    text_len: int = 16  # words; a caption of two objects has 15
    text_dim: int = 48

    def __post_init__(self):
        if self.text_dim < len(VOCABULARY) + POSITION_DIM:
            raise UserError(
                f"text_dim is {self.text_dim}: set it to {len(VOCABULARY) + POSITION_DIM} or more"
            )

    def encode(self, captions):
        """Captions → features.

        Args:
            captions: list of B strings; case and punctuation do not matter.

        Returns:
            float32 [B, text_len, text_dim].

        Raises:
            UserError: a caption that is empty, has a word outside `VOCABULARY`, or more than text_len words.
        """
        features = self.unconditional(len(captions))
        position = _positions(self.text_len)
        for row, caption in zip(features, captions, strict=True):
            words = self._words(caption)
            row[np.arange(len(words)), [_INDEX[word] for word in words]] = np.sqrt(POSITION_DIM / 2)
            row[: len(words), -POSITION_DIM:] = position[: len(words)]
        return features

    def unconditional(self, batch):
        """The features of no caption at all: zeros [batch, text_len, text_dim]."""
        return np.zeros((batch, self.text_len, self.text_dim), np.float32)

    def _words(self, caption):
        words = _SEPARATORS.sub(" ", str(caption).lower()).split()
        if not words:
            raise UserError(f"The prompt is empty: write one like {shapes.PROMPTS[0]!r}")
        unknown = sorted({word for word in words if word not in _INDEX})
        if unknown:
            near = {word: difflib.get_close_matches(word, VOCABULARY, 1, 0.75) for word in unknown}
            told = ", ".join(word + "".join(f" ({other}?)" for other in near[word]) for word in unknown)
            raise UserError(f"Unknown in the prompt: {told}; known words: {', '.join(VOCABULARY)}")
        if len(words) > self.text_len:
            raise UserError(f"The prompt has {len(words)} words: use {self.text_len} or fewer")
        return words


@dataclasses.dataclass(frozen=True)
class Unread:
    """Random features in place of a prompt's, for a transformer whose weights are random too: no encoder is read or run."""

    text_len: int
    text_dim: int

    def encode(self, captions):
        """Captions → float32 [B, text_len, text_dim], the same for every caption."""
        features = np.random.default_rng(0).standard_normal((1, self.text_len, self.text_dim), np.float32)
        return np.repeat(features, len(captions), 0)


def _positions(length):
    """Sinusoids of the word position: float32 [length, POSITION_DIM]."""
    half = POSITION_DIM // 2
    angle = np.arange(length)[:, None] * 100.0 ** (-np.arange(half) / half)
    return np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
