"""Where weights are: in a folder, or in a repository of the hub (huggingface.co), from which they are fetched and converted once.

What is fetched is kept in our form under $RFJAX_WEIGHTS, else ~/.cache/rfjax/weights, in one folder a repository; the originals
stay in the hub's own cache. What a repository lacks comes from Wan's, by a link, so that the text encoder is kept only once.
"""

import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from rfjax import convert, files, tensorfile
from rfjax.errors import UserError

DEFAULT_FOLDER = "~/.cache/rfjax/weights"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
BASE = "Wan-AI/Wan2.1-T2V-1.3B"
# Which file of a public repository holds which of ours. Repositories that are not here hold ours, under our names.
FILES = {
    BASE: {
        "dit.safetensors": "diffusion_pytorch_model.safetensors",
        "vae.safetensors": "Wan2.1_VAE.pth",
        "umt5.safetensors": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer.json": "google/umt5-xxl/tokenizer.json",
    },
    "TencentARC/RollingForcing": {"dit.safetensors": "checkpoints/rolling_forcing_dmd.pt"},
    "gdhe17/Self-Forcing": {"dit.safetensors": "checkpoints/self_forcing_dmd.pt"},
}
Place = tuple[str, str]  # a repository and a file of it
# What has the same source whichever weights it goes with.
ONLY: dict[str, Place] = {
    "tokenizer.json": (BASE, FILES[BASE]["tokenizer.json"]),
    "tiny.safetensors": ("github.com/madebyollin/taehv", "taew2_1.pth"),
}


def locate(weights: str, wanted: Sequence[str]) -> Path:
    """The folder that holds every wanted file. Of a repository, what its folder lacks is fetched and converted.

    Args:
      weights: a folder, or the id of a repository of the hub, such as "TencentARC/RollingForcing".
      wanted: of dit.safetensors, vae.safetensors, umt5.safetensors, tiny.safetensors and tokenizer.json those that are needed.

    Raises:
      UserError: no such folder, files that it lacks or no repository has, a hub that is out of reach or refuses, a package that is
        not installed, or a checkpoint that does not convert.
    """
    folder = Path(weights).expanduser()
    if folder.is_dir():
        if lacking := _lacking(folder, wanted):
            raise UserError(f"The folder {folder} lacks {', '.join(lacking)}; {_by_hand(folder, lacking)}.")
        return folder
    meant_here = (
        folder.parent != Path() and folder.parent.is_dir()
    )  # weights/mine: a folder, though it reads like an id
    if folder.exists() or meant_here or not HUB_ID.fullmatch(weights):
        raise UserError(
            f"There is no folder {weights}; name one that holds {', '.join(wanted)}, "
            "or a repository of the hub such as TencentARC/RollingForcing."
        )
    folder = _kept(weights)
    lacking = _lacking(folder, wanted)
    if nowhere := [name for name in lacking if not _places(weights, name)]:
        raise UserError(f"{weights} lacks {', '.join(nowhere)}; {_by_hand(folder, nowhere)}.")
    if lacking:
        _make(folder)
    for name in lacking:
        by_hand = _by_hand(folder, _lacking(folder, wanted), weights)
        kept = _fetch(name, _places(weights, name), by_hand)
        if kept.parent != folder:  # the link is relative, so that all folders can move together
            with files.replacing(folder / name) as link:
                link.symlink_to(os.path.relpath(kept, folder))
    return folder


def here(weights: str, wanted: Sequence[str]) -> bool:
    """Whether all wanted files of a folder or a repository, as `locate` takes them, are on this machine: none is fetched."""
    folder = Path(weights).expanduser()
    return not _lacking(folder if folder.is_dir() else _kept(weights), wanted)


def _kept(repo: str) -> Path:
    return Path(os.environ.get("RFJAX_WEIGHTS") or DEFAULT_FOLDER).expanduser() / repo.replace("/", "--")


def _lacking(folder: Path, wanted: Sequence[str]) -> list[str]:
    return [name for name in wanted if not (folder / name).is_file()]


def _places(repo: str, name: str) -> list[Place]:
    """Where to look for a file, in turn: the repository, then Wan's, which lends everything but its transformer."""
    own = FILES.get(repo, {name: name})
    lent = {} if repo == BASE or name == "dit.safetensors" else FILES[BASE]
    return [(of, files[name]) for of, files in ((repo, own), (BASE, lent)) if name in files]


def _fetch(name: str, places: Sequence[Place], by_hand: str) -> Path:
    """Our file, in the folder of the first repository that has it."""
    (repo, file), *others = places
    kept = _kept(repo) / name
    if kept.is_file():
        return kept
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        said = f"To fetch {file} from {repo}, install huggingface_hub: pip install -e '.[wan]'."
        raise UserError(said) from error
    _make(kept.parent)
    if file.endswith((".pt", ".pth")):
        tensorfile.torch_module()  # asked for before gigabytes are fetched that could not be read
    # HTTPError: the hub's HTTP client has it, and its refusals derive from it. Built-in errors: hf_xet, which carries large files.
    trouble = (errors.HTTPError, errors.EntryNotFoundError, errors.HFValidationError)
    try:
        source = Path(hf_hub_download(repo, file))
    except (*trouble, ConnectionError, TimeoutError, RuntimeError) as error:
        if others and isinstance(error, errors.RemoteEntryNotFoundError):
            return _fetch(name, others, by_hand)
        raise UserError(f"{file} of {repo} could not be fetched ({_reason(error)}); {by_hand}.") from error
    if Path(file).name == name:
        with files.replacing(kept) as copy:
            shutil.copyfile(source, copy)
    else:
        convert.convert(source, kept.parent, None, None, None)
    print(f"{file} of {repo} → {kept}")
    return kept


def _make(folder: Path) -> None:
    """Makes a folder for weights; UserError where none can be kept there, told before gigabytes are fetched."""
    files.refuse_bucket(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"Weights cannot be kept in {folder} ({error.strerror}); set $RFJAX_WEIGHTS to a folder that can be written to."
        ) from error


def _reason(error: BaseException) -> str:
    """The first sentence of what went wrong."""
    if isinstance(error, FileNotFoundError):  # LocalEntryNotFoundError only says to check the connection
        error = error.__cause__ or error
    said = re.split(r"\n|\b\. ", str(error))[0].rstrip(".")
    return f"{type(error).__name__}: {said}"


def _by_hand(folder: Path, names: Sequence[str], repo: str = "") -> str:
    """How to put files into a folder without the hub."""
    made, copied = [], []
    for name in names:
        public = [place for place in _places(repo, name) if repo and place[0] in FILES]
        of, file = ONLY.get(name) or next(iter(public), ("", ""))
        if Path(file).name == name:
            copied.append(f"copy {file} of {of} to {folder}")
        else:
            made.append(f"{name} from {f'{file} of {of}' if of else 'its checkpoint'}")
    ways = [f"make {', '.join(made)} with `python -m rfjax.convert SRC {folder}`"] if made else []
    return ", and ".join(ways + copied)
