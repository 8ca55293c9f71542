"""Makes the weights that ship with the package from those of finished runs, in half precision.

    python -m rfjax.release runs/vae/vae.safetensors runs/distill/dit.safetensors rfjax/assets/shapes

Weights are read back in float32, so only their last bits are lost; the files are half the size.
"""

from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from rfjax import checkpoint, tree
from rfjax.errors import Parser, UserError, exit_cleanly


def halve(source: Path, folder: Path) -> Path:
    """Writes a .safetensors file of weights again in float16, under its name in `folder`.

    Raises:
      UserError: no such file, damaged, or a weight too large for float16.
    """
    try:
        weights = safetensors.numpy.load_file(source)
    except (FileNotFoundError, SafetensorError, ValueError) as error:
        raise UserError(f"Cannot read the weights in {source} ({error}); train that stage first.") from error
    with np.errstate(over="ignore"):  # found below, and told in a sentence
        halves = {name: weight.astype("float16") for name, weight in weights.items()}
    infinite = [name for name, weight in halves.items() if not np.isfinite(weight).all()]
    if infinite:
        raise UserError(
            f"{infinite[0]} in {source} is too large for float16; train with a lower learning rate."
        )
    checkpoint.save_params(folder / source.name, tree.unflatten(halves))
    return folder / source.name


@exit_cleanly
def main(argv=None) -> None:
    parser = Parser(prog="python -m rfjax.release", description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", type=Path, help=".safetensors files")
    parser.add_argument("folder", type=Path, help="where they go, under the same names")
    args = parser.parse_args(argv)
    targets = [(args.folder / source.name).resolve() for source in args.weights]
    if len(set(targets)) < len(targets) or {source.resolve() for source in args.weights} & set(targets):
        raise UserError(
            "Each file of weights needs a name of its own, and a folder that it is not in already."
        )
    args.folder.mkdir(parents=True, exist_ok=True)
    for source in args.weights:
        path = halve(source, args.folder)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
