"""Prompts for Wan's transformer: its tokenizer, the UMT5 encoder, and a folder of prompts that were encoded before.

Encoding needs 11 GB of weights (float32: 23 GB) for a few numbers: they are kept, and the encoder is only loaded for a new prompt.
Where new prompts come at any time, a `Resident` one is loaded once and stays.
"""

import dataclasses
import functools
import hashlib
import html
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from rfjax import checkpoint, compilation, config, files, parameters, umt5
from rfjax.dit import DiTConfig
from rfjax.errors import UserError
from rfjax.text import Unread, WordEncoder
from rfjax.umt5 import UMT5, UMT5Config

FILES = ["umt5.safetensors", "tokenizer.json"]
KEPT = "~/.cache/rfjax/prompts"  # where encoded prompts are kept


def configured(settings, network: DiTConfig) -> WordEncoder | UMT5Config:
    """What reads prompts: UMT5 where the config has it, else the small world's words. UserError where it does not fit `network`."""
    if "umt5" in settings:
        sizes = config.build(UMT5Config, settings, "umt5")
        config.same("umt5.dim", sizes.dim, "dit.text_dim", network.text_dim)
        return sizes
    words = config.build(WordEncoder, settings, "text")
    config.same("text.text_dim", words.text_dim, "dit.text_dim", network.text_dim)
    return words


def encoder(reader: WordEncoder | UMT5Config, folder: Path | None, network: DiTConfig):
    """The encoder that `configured` has described, UMT5 from the FILES of a folder; without one it reads nothing."""
    if isinstance(reader, WordEncoder):
        return reader
    if folder is None:
        return Unread(network.text_len, network.text_dim)
    return PromptEncoder(folder, reader, network.text_len, Path(KEPT).expanduser())


def _extra(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"Prompts for Wan need {name}: pip install -e '.[wan]'.") from error


def clean(text: str) -> str:
    """The prompt as Wan reads it: broken encodings mended, HTML entities resolved (twice), whitespace made single spaces."""
    text = html.unescape(html.unescape(_extra("ftfy").fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """tokenizer.json, as `tokenizers` reads it: cleaned prompts → ids and masks of a fixed length."""

    def __init__(self, path: str | os.PathLike, length: int):
        tokenizers = _extra("tokenizers")
        if not os.path.isfile(path):
            raise UserError(f"There is no tokenizer {path}; put UMT5's tokenizer.json there.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(f"The tokenizer {path} is damaged ({error}); copy it again.") from error
        self.length = length
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def __call__(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [B, length], 0 behind a prompt's end, and mask bool. A longer prompt is cut, with a warning."""
        ids = np.zeros((len(prompts), self.length), np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, (prompt, encoding) in enumerate(
            zip(prompts, self._tokenizer.encode_batch([clean(prompt) for prompt in prompts]), strict=True)
        ):
            tokens = encoding.ids
            if len(tokens) > self.length:
                warnings.warn(
                    f"The prompt {prompt[:40]!r}… has {len(tokens)} tokens; all after {self.length} are cut.",
                    stacklevel=2,
                )
                tokens = tokens[: self.length - 1] + tokens[-1:]  # the end mark stays
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return ids, mask


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """UMT5 with its tokenizer, from the files umt5.safetensors and tokenizer.json of a folder of weights."""

    folder: Path
    config: UMT5Config
    text_len: int = 512
    cache: Path | None = None  # where encoded prompts are kept; None: nowhere

    @property
    def text_dim(self) -> int:
        return self.config.dim

    def encode(self, captions: list[str]) -> np.ndarray:
        """float32 [B, text_len, text_dim], 0 behind each prompt's end.

        Raises:
          UserError: an empty prompt, a missing or damaged tokenizer or encoder.
        """
        if not all(clean(caption) for caption in captions):
            raise UserError("The prompt is empty; say what to show.")
        kept = {caption: self._kept(caption) for caption in captions}
        new = [caption for caption, features in kept.items() if features is None]
        for caption, features in zip(new, self._run(new) if new else (), strict=True):
            kept[caption] = features
            self._keep(caption, features)
        out = np.zeros((len(captions), self.text_len, self.text_dim), np.float32)
        for row, caption in zip(out, captions, strict=True):
            row[: len(kept[caption])] = kept[caption]
        return out

    @functools.cached_property
    def resident(self) -> "Resident":
        """The same encoder for prompts that come at any time; all who ask share it."""
        return Resident(self.folder, self.config, self.text_len)

    def _run(self, captions: list[str]) -> list[np.ndarray]:
        """Features up to each prompt's end, on the host: accelerators need their memory for the video."""
        return self.reader(compilation.host())(captions)

    def reader(self, device: jax.Device) -> Callable[[list[str]], list[np.ndarray]]:
        """f(captions) → features of each up to its end, float32 [n, text_dim], one prompt at a time.

        Weights are loaded at f's first call, and stay on the device as long as f is there. UserError as for `encode`, but an empty
        prompt has features too: those of the end mark.
        """
        tokenize = Tokenizer(self.folder / "tokenizer.json", self.text_len)
        run = jax.jit(functools.partial(umt5.prompt_features, UMT5(self.config)))

        @functools.cache
        def params():
            return checkpoint.load_params(
                self.folder / "umt5.safetensors", parameters.as_filed("umt5", self.config)
            )

        def read(captions):
            ids, mask = tokenize(captions)
            with jax.default_device(device):
                features = [run(params(), ids[i : i + 1], mask[i : i + 1])[0] for i in range(len(captions))]
            return [np.asarray(x, np.float32)[: m.sum()] for x, m in zip(features, mask, strict=True)]

        return read

    def _place(self, caption: str) -> Path | None:
        if self.cache is None:
            return None
        stamp = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(self.folder.glob("umt5*"))]
        key = json.dumps([clean(caption), stamp, self.text_len, dataclasses.asdict(self.config)])
        return self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.npy"

    def _kept(self, caption: str) -> np.ndarray | None:
        place = self._place(caption)
        try:
            return None if place is None else np.load(place)
        except (OSError, ValueError, EOFError):  # not there, or cut short by a full disk: encoded again
            return None

    def _keep(self, caption: str, features: np.ndarray) -> None:
        """What cannot be kept costs only the time to encode it again, so it is no error."""
        place = self._place(caption)
        if place is None:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(place) as unfinished, unfinished.open("wb") as file:
                np.save(file, features)
        except OSError as error:
            print(
                f"Encoded prompts are not kept: {place.parent}: {error.strerror or error}.", file=sys.stderr
            )


class Resident(PromptEncoder):
    """UMT5 that stays in the host's memory from its first prompt on. Of what is said nothing is kept on the disk."""

    resident = property(lambda self: self)

    @functools.cached_property
    def _run(self) -> Callable[[list[str]], list[np.ndarray]]:
        return self.reader(compilation.host())
