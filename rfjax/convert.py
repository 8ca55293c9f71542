"""Checkpoints of PyTorch into ours and back, strictly: every name is known, every shape agrees, or nothing is written.

    python -m rfjax.convert Wan2.1_VAE.pth weights/                         → weights/vae.safetensors
    python -m rfjax.convert rolling_forcing_dmd.pt weights/                 → weights/dit.safetensors, the averaged generator
    python -m rfjax.convert runs/distill/dit.safetensors student.pt         and back, under the official names

The names in SRC tell which way. Read: .safetensors (whole, in shards, or a folder), .pt and .pth (these need the extra `convert`);
the layouts of Wan, diffusers and transformers.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rfjax import config, names, parameters, tensorfile
from rfjax.dit import DiTConfig
from rfjax.errors import Parser, UserError, exit_cleanly
from rfjax.files import replacing
from rfjax.tensorfile import Entry, Kind, Source
from rfjax.tiny_vae import TinyVAEConfig
from rfjax.tree import flatten, unflatten
from rfjax.umt5 import UMT5Config
from rfjax.vae import VAEConfig

# What wrappers of training put before a name; `model.` leads the names of the few-step checkpoints.
WRAPPERS = re.compile(r"^model\.|_fsdp_wrapped_module\.|_orig_mod\.|^module\.")
# What a checkpoint holds beside the network we have: of TAEHV, the encoder.
BESIDE = {"tiny": re.compile(r"encoder\.\d+\..*")}
# The published statistics of Wan 2.1's latents, which its checkpoint does not hold.
WAN_LATENT_STATISTICS = {
    "latent_mean": np.float32(
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
        + [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
    ),
    "latent_std": np.float32(
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
        + [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
    ),
}


def from_torch(weights: Mapping[str, np.ndarray], module: str, like) -> dict[str, Any]:
    """{torch name: array} in memory → nested parameters with the names and shapes of `like` (arrays or shapes).

    Raises:
      UserError: names that are unknown, missing or given twice, or shapes that differ.
    """
    kinds = {name: Kind(x.shape, x.dtype) for name, x in weights.items()}
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(like).items()}
    entries = to_ours(Source(kinds, lambda name, _: weights[name]), module, shapes)
    return unflatten(
        {e.name: np.concatenate([r().reshape(-1) for r in e.reads]).reshape(e.kind.shape) for e in entries}
    )


def to_ours(source: Source, module: str, shapes: Mapping[str, tuple] | None = None) -> list[Entry]:
    """Our tensors from torch's, layer by layer.

    `shapes` {path: shape} is what the configuration wants; None: what a network of the checkpoint's own sizes has.
    """
    table, problems = _table(source.kinds, module), defaultdict(list)
    placed, laid = defaultdict(dict), {}
    for name in _without_copies(source.kinds):
        if module in BESIDE and BESIDE[module].fullmatch(name):
            continue
        place = names.ours(WRAPPERS.sub("", name), table)
        if place is None:
            problems["unknown"].append(name)
            continue
        shape, dtype = _laid_out(place.layout.ours, source.kinds[name].shape), source.kinds[name].dtype
        if place.layer in placed[place.name]:
            problems["given twice"].append(name)
        elif shape is None or laid.setdefault(place.name, Kind(shape, dtype)) != (shape, dtype):
            problems["of an unexpected shape"].append(f"{name} {list(source.kinds[name].shape)}")
        else:
            placed[place.name][place.layer] = functools.partial(_read, source, name, None, place.layout.ours)
    found = {path: _stacked(set(layers), laid[path].shape) for path, layers in placed.items() if layers}
    for path, shape in found.items():
        if None not in placed[path]:
            lacking = sorted(set(range(shape[0])) - placed[path].keys())
            problems["missing"] += [f"layer {layer} of {path}" for layer in lacking]
    statistics = {
        path: x for path, x in WAN_LATENT_STATISTICS.items() if module == "vae" and path not in found
    }
    found |= {path: x.shape for path, x in statistics.items()}
    _check(found, expected(module, found) if shapes is None else shapes, problems)
    entries = [
        Entry(
            path,
            Kind(found[path], laid[path].dtype),
            [layers[i] for i in sorted(layers, key=lambda i: i or 0)],
        )
        for path, layers in sorted(placed.items())
    ]
    return entries + [
        Entry(path, Kind(x.shape, x.dtype), [functools.partial(np.copy, x)]) for path, x in statistics.items()
    ]


def to_torch(
    source: Source, module: str, layout: str | None = None, shapes: Mapping[str, tuple] | None = None
) -> list[Entry]:
    """Torch's tensors, under the names of a layout, from ours. A VAE's statistics of latents stay behind where they are Wan's."""
    layout = layout or next(iter(names.TABLES[module]))
    if layout not in names.TABLES[module]:
        raise UserError(
            f"There is no layout {layout!r} of {module}; choose {' or '.join(names.TABLES[module])}."
        )
    entries, problems = [], defaultdict(list)
    found = {path: kind.shape for path, kind in source.kinds.items()}
    for path, kind in source.kinds.items():
        if path in WAN_LATENT_STATISTICS and _is_wans(path, source):
            continue
        place = names.theirs(path, names.TABLES[module][layout])
        if place is None:
            problems["unknown"].append(path)
            continue
        name, stacked, layouts = place
        shape = _laid_out(layouts.theirs, kind.shape[stacked:])
        if shape is None:
            problems["of an unexpected shape"].append(f"{path} {list(kind.shape)}")
            continue
        for layer in range(kind.shape[0]) if stacked else [None]:
            read = functools.partial(_read, source, path, layer, layouts.theirs)
            entries.append(Entry(name(layer), Kind(shape, kind.dtype), [read]))
    _check(found, expected(module, found) if shapes is None else shapes, problems)
    return entries


def _is_wans(path: str, source: Source) -> bool:
    """Whether statistics of latents are those that PyTorch's code has in itself."""
    found = source.load(path, None)
    return np.array_equal(found, WAN_LATENT_STATISTICS[path].astype(found.dtype))


def _read(
    source: Source, name: str, layer: int | None, layout: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    return layout(source.load(name, layer))


def _without_copies(found: Mapping) -> list[str]:
    # T5 shares its embedding, and some of its checkpoints hold it twice.
    copies = {"encoder.embed_tokens.weight"} if "shared.weight" in found else set()
    return [name for name in found if name not in copies]


def _known(found: Sequence[str], table: Sequence[names.Rule]) -> int:
    return sum(names.ours(WRAPPERS.sub("", name), table) is not None for name in found)


def _table(found: Sequence[str], module: str) -> Sequence[names.Rule]:
    """The layout of the module that knows most of the names."""
    return max(names.TABLES[module].values(), key=functools.partial(_known, found))


def module_of(found: Sequence[str]) -> tuple[str, bool]:
    """(dit, vae, umt5 or tiny, whether the names are ours), by which network knows most of them; UserError when none knows any."""
    counts = {}
    for module, tables in names.TABLES.items():
        counts[module, False] = _known(found, _table(found, module))
        table = next(iter(tables.values()))
        counts[module, True] = sum(names.theirs(name, table) is not None for name in found)
    best = max(counts, key=counts.get)
    if not counts[best]:
        raise UserError(
            f"No network here has a weight named {min(found, default='(none)')}; is it another model?"
        )
    return best


def _laid_out(layout: Callable[[np.ndarray], np.ndarray], shape: tuple) -> tuple | None:
    """The shape that a layout gives, by an array that takes no memory; None if it takes no such shape."""
    try:
        return layout(np.broadcast_to(np.float32(0), shape)).shape
    except (ValueError, IndexError):
        return None


def _stacked(layers: set[int | None], shape: tuple) -> tuple:
    return shape if None in layers else (1 + max(layers), *shape)


def expected(module: str, found: Mapping[str, tuple], settings=None) -> dict[str, tuple]:
    """{path: shape} of the network that a config describes, or else of one with the sizes that `found` shows."""
    try:
        sizes = (
            _sizes(module, found)
            if settings is None
            else config.build(parameters.SIZES[module], settings, module)
        )
    except KeyError as error:
        raise UserError(
            f"The checkpoint lacks {error.args[0]}, which tells the sizes; is it whole?"
        ) from error
    return {path: tuple(leaf.shape) for path, leaf in flatten(parameters.as_filed(module, sizes)).items()}


def _sizes(module: str, found: Mapping[str, tuple]):
    """The sizes that the weights' shapes show; KeyError with the name of a weight that is not there."""
    match module:
        case "dit":
            rows, dim = found["patch_embedding/kernel"]
            layers, _, ffn = found["blocks/ffn_in/kernel"]
            text, freq = found["text_in/kernel"][0], found["time_in/kernel"][0]
            sizes = dict(dim=dim, ffn_dim=ffn, num_heads=1, num_layers=layers, text_dim=text, freq_dim=freq)
            return DiTConfig(**sizes, text_len=1, in_dim=rows // 4)
        case "umt5":
            vocab, dim = found["token_embedding/embedding"]
            (layers, _, attn), ffn = found["blocks/attn_q/kernel"], found["blocks/ffn_in/kernel"][-1]
            _, buckets, heads = found["blocks/position_bias"]
            return UMT5Config(vocab, dim, attn, ffn, heads, layers, buckets)
        case "tiny":
            depths = sorted(path for path in found if re.fullmatch(r"conv_\d+/kernel", path))
            widths = (found["conv_in/kernel"][-1], *(found[path][-1] for path in depths))
            grown = tuple(shape[1] == 2 * shape[0] for path, shape in sorted(found.items()) if "grow" in path)
            return TinyVAEConfig(found["conv_in/kernel"][-2], widths, grown)
        case "vae":
            return VAEConfig(dim=96)


def _check(found: Mapping[str, tuple], wanted: Mapping[str, tuple], problems: dict[str, list[str]]) -> None:
    """UserError that lists all that does not fit, ten names of each kind."""
    problems["missing"] += sorted(wanted.keys() - found.keys())
    problems["unknown"] += sorted(found.keys() - wanted.keys())
    differing = [path for path in wanted.keys() & found.keys() if wanted[path] != found[path]]
    problems["of an unexpected shape"] += [
        f"{path} {list(found[path])} in place of {list(wanted[path])}" for path in sorted(differing)
    ]
    told = [
        f"{len(listed)} {what} ({', '.join(listed[:10])}{', …' if len(listed) > 10 else ''})"
        for what, listed in problems.items()
        if listed
    ]
    if told:
        raise UserError(
            f"The checkpoint is not of this network: weights {'; '.join(told)}; nothing was written."
        )


def save(path: Path, entries: list[Entry]) -> None:
    """Writes .safetensors, or for PyTorch .pth (names and tensors) or .pt ({"generator": …} with `model.` before names)."""
    if path.suffix not in (".pt", ".pth"):
        return tensorfile.write(path, entries)
    torch = tensorfile.torch_module()
    tensors = {entry.name: _tensor(torch, entry.reads[0]()) for entry in entries}
    if path.suffix == ".pt":
        tensors = {"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        torch.save(tensors, unfinished)


def _tensor(torch, array: np.ndarray):
    array = np.array(array, order="C")  # torch wants memory that it may write
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def convert(src: Path, dst: Path, part: str | None = None, layout: str | None = None, settings=None) -> Path:
    """Converts a checkpoint, to PyTorch where its names are ours and else from it, and says where it is.

    `settings` is a config that it has to fit.
    """
    source = tensorfile.read(src, part)
    module, is_ours = module_of(list(source.kinds))
    shapes = None if settings is None else expected(module, {}, settings)
    if is_ours:
        if dst.suffix not in (".safetensors", ".pt", ".pth"):
            raise UserError(f"{src} goes to PyTorch: give a .safetensors, .pt or .pth file, not {dst}.")
        entries = to_torch(source, module, layout, shapes)
    else:
        dst = dst if dst.suffix == ".safetensors" else dst / f"{module}.safetensors"
        entries = to_ours(source, module, shapes)
    save(dst, entries)
    print(f"{len(source.kinds)} tensors of {module}, {'ours → PyTorch' if is_ours else 'PyTorch → ours'}")
    return dst


@exit_cleanly
def main(argv=None) -> None:
    parser = Parser(
        prog="python -m rfjax.convert",
        description=__doc__,
    )
    add = parser.add_argument
    add("src", type=Path, help="a file, an index of shards, or a folder that holds one of them")
    add(
        "dst", type=Path, help="from PyTorch: a folder or .safetensors; to PyTorch: .safetensors, .pt or .pth"
    )
    add(
        "--part",
        help=f"which network of a .pt file (default the first there is of {', '.join(tensorfile.PARTS)})",
    )
    add(
        "--layout",
        help="names on the way to PyTorch: wan, diffusers, transformers, taehv (default: the network's first of these)",
    )
    add(
        "--config",
        help="a config that the checkpoint has to fit (default: sizes are read off; the VAE's are Wan's)",
    )
    args = parser.parse_args(argv)
    settings = config.load(args.config) if args.config else None
    path = convert(args.src, args.dst, args.part, args.layout, settings)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
