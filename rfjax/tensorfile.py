"""Files of weights, read and written tensor by tensor: safetensors, whole or in shards, and PyTorch's .pt and .pth.

bfloat16 stays bfloat16, and no more than one tensor is held at a time: files are mapped anew for each, since what was read
of a mapping counts as memory of the process.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from rfjax.errors import UserError
from rfjax.files import replacing

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
PARTS = ("generator_ema", "generator", "model")  # of a .pt file with several networks, the first there is


class Kind(NamedTuple):
    """What a tensor is, without its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Source(NamedTuple):
    """A file of tensors. `load(name, layer)` reads one, or one row of its leading axis."""

    kinds: Mapping[str, Kind]
    load: Callable[[str, int | None], np.ndarray]


class Entry(NamedTuple):
    """A tensor to be written: its pieces, one after another along the leading axis, are read when their turn comes."""

    name: str
    kind: Kind
    reads: Sequence[Callable[[], np.ndarray]]


def read(path: str | os.PathLike, part: str | None = None) -> Source:
    """Opens a .safetensors file, an index of shards (*.index.json), a folder of either, or a .pt or .pth file.

    Args:
      path: the file or folder.
      part: which network of a .pt file that holds several, such as "generator" or "critic"; None = the first of PARTS.

    Raises:
      UserError: nothing there, damaged, of a type that is not floating point, or a pickle that would run code.
    """
    path = _file(Path(path))
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path, part)
    if part is not None:
        raise UserError(f"{path} holds one network; leave out --part.")
    try:
        if path.suffix == ".json":
            shards = set(json.loads(path.read_text())["weight_map"].values())
            files = [path.parent / name for name in sorted(shards)]
        else:
            files = [path]
        kinds, where = {}, {}
        for file in files:
            with safe_open(file, "numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  a safetensors file, not a dict
                    if name in where:
                        raise UserError(f"{path}: {name} is in two shards; copy them again.")
                    kinds[name], where[name] = _kind(path, name, tensors.get_slice(name)), file
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged or not what its name says ({error}); copy it again.") from error

    def load(name: str, layer: int | None = None) -> np.ndarray:
        with safe_open(
            where[name], "numpy"
        ) as tensors:  # opened anew: what was read of a mapped file stays in memory
            return tensors.get_tensor(name) if layer is None else tensors.get_slice(name)[layer]

    return Source(kinds, load)


def _file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise UserError(
                f"{path} holds {len(found)} files of weights; name the one to convert, or an index of shards."
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"There is no file {path}; give the path of a checkpoint.")
    if path.suffix not in (".safetensors", ".json", ".pt", ".pth"):
        raise UserError(f"{path} is not .safetensors, .index.json, .pt or .pth; give one of those.")
    return path


def _kind(path: Path, name: str, piece) -> Kind:
    if piece.get_dtype() not in DTYPES:
        raise UserError(f"{path}: {name} is of type {piece.get_dtype()}; only floating point is converted.")
    return Kind(tuple(piece.get_shape()), DTYPES[piece.get_dtype()])


def torch_module():
    """The torch package; UserError without it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "Files of PyTorch need torch: pip install -e '.[convert]', or use .safetensors."
        ) from error
    return torch


def _read_torch(path: Path, part: str | None) -> Source:
    torch = torch_module()

    def open_anew():
        return _part(path, torch.load(path, map_location="cpu", mmap=True, weights_only=True), part)

    try:
        tensors = open_anew()
    except UserError:
        raise
    except Exception as error:  # a damaged file and one with code in it raise much the same
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which is not loaded since it may run code ({reason})."
        ) from error
    kinds = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
            raise UserError(f"{path}: {name} is not a floating-point tensor; give a file of weights.")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _CODES:
            raise UserError(f"{path}: {name} is of {dtype}; give a file of weights in 16 bits or more.")
        kinds[name] = Kind(tuple(tensor.shape), DTYPES[_CODES[dtype]])

    def load(name: str, layer: int | None = None) -> np.ndarray:
        tensor = open_anew()[name]
        tensor = tensor if layer is None else tensor[layer]
        if tensor.dtype == torch.bfloat16:  # numpy knows it only through its bits
            return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    return Source(kinds, load)


_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _part(path: Path, content, part: str | None) -> Mapping:
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not weights by name.")
    parts = [name for name, value in content.items() if isinstance(value, Mapping)]
    if not parts and part is None:
        return content
    chosen = part or next((name for name in PARTS if name in parts), None)
    if chosen not in parts:
        there = ", ".join(map(str, parts)) or "one network only"
        raise UserError(f"{path} has {there}; choose one with --part.")
    return content[chosen]


def write(path: str | os.PathLike, entries: Sequence[Entry]) -> None:
    """Writes a .safetensors file, piece by piece, under its name only when complete."""
    path, header, at = Path(path), {}, 0
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for name, kind, _ in entries:
        size = int(np.prod(kind.shape, dtype=np.int64)) * kind.dtype.itemsize
        offsets = [at, at + size]
        header[name] = {"dtype": codes[kind.dtype], "shape": list(kind.shape), "data_offsets": offsets}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for read_piece in entry.reads:
                piece = np.ascontiguousarray(read_piece(), entry.kind.dtype)
                file.write(piece.reshape(-1).view(np.uint8).data)
