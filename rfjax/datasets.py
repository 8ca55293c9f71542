"""How data sets are made: each kind is a Plan, whose `make` gives the records of one shard. `python -m rfjax.data` runs them.

Encoders and the teacher run on the devices of this process alone, so that several processes need nothing of each other: a batch is
split over them, and so are the teacher's parameters.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from rfjax import config, data, files, footage, prompts, shapes, sharding, teacher, weights
from rfjax.dit import DiT
from rfjax.errors import UserError
from rfjax.stages import latent, sources, student
from rfjax.umt5 import UMT5Config

VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
ORDER = ("seed", "record_batch", "shard_records")  # settings that say which record is where
SHARD = 64  # prompts or videos of a shard where the config does not say


class Plan(NamedTuple):
    """A data set that is to be made."""

    folder: str
    shards: int
    make: Callable[[int], Iterable[dict[str, Any]]]  # shard → its records
    about: dict[str, Any]  # what it is made of: anything JSON takes
    negative: Callable[[], np.ndarray] | None = None  # the negative prompt's embedding [text_len, text_dim]
    skipped: Sequence[str] = ()  # sentences on what gave no records, once they are made
    sources: Sequence[str | Path] = ()  # files and folders whose contents it is made from


def clip_latents(settings) -> Plan:
    """Clips of the small world, settings.record_frames latent frames of each."""
    world = config.build(shapes.World, settings, "world")
    encode = latent.video_encoder(settings)
    frames = video_frames(settings)
    clips = data.clips(frames, settings.record_batch, settings.seed, world)
    per_shard = _per_shard(settings)

    def make(index):
        for place in _batches(per_shard, index):
            batch = clips[place]
            yield from _records(batch["caption"], "latents", encode(batch["video"]))

    about = _about(settings, *ORDER, "record_frames", "world", "vae")
    return Plan(settings.data, settings.shards, make, about, sources=[settings.vae_weights])


def ode_pairs(settings) -> Plan:
    """Trajectories of the teacher at the few-step list's levels and at the end, from prompts in turn.

    Prompts are the encoded ones in settings.prompts, else the small world's captions. Trajectory i depends on (seed, i) alone.
    """
    latent.whole_blocks(settings, "record_frames")
    encoded, per_shard = settings.get("prompts", ""), _per_shard(settings)
    texts = latent.texts(settings, encoded, settings.record_batch)
    solve = _solver(settings)

    def make(index):
        for place in _batches(per_shard, index):
            batch = texts[place]
            key = jax.random.fold_in(jax.random.key(settings.seed), place)
            path = solve(batch["context"], key)
            yield from _records(batch["caption"], "trajectory", path, batch["context"] if encoded else None)

    names = (
        "record_frames",
        "teacher",
        "teacher_dit",
        "guidance",
        "solver_steps",
        "rollout",
        "world",
        "video",
        "prompts",
    )
    sources = [settings.teacher, *([encoded] if encoded else [])]
    return Plan(settings.data, settings.shards, make, _about(settings, *ORDER, *names), sources=sources)


def _solver(settings):
    """f(context [B, text_len, text_dim], key) → trajectories [B, S + 1, F, h, w, C]."""
    parts = latent.parts(settings)
    mesh = local_mesh(settings.record_batch)
    sizes = student.teacher_sizes(settings)
    source = {"teacher": student.transformer(sizes, settings.teacher, frozen=True)}
    params = sources.load(source, jax.random.key(0), mesh)["teacher"]
    places = teacher.few_step_indices(parts.rollout.steps, settings.solver_steps)
    places = np.append(places, settings.solver_steps)
    negative = latent.negative(settings)

    @jax.jit
    def solve(params, context, key):
        noise = jax.random.normal(key, (context.shape[0], settings.record_frames, *parts.frame_shape[1:]))
        path = teacher.ode_trajectory(
            DiT(sizes),
            params,
            noise,
            context,
            jnp.broadcast_to(negative, context.shape),
            settings.guidance,
            settings.solver_steps,
            parts.rollout.shift,
        )
        return jnp.moveaxis(path[places], 0, 1)

    def run(context, key):
        with jax.set_mesh(mesh):
            batch = sharding.put_batch({"context": context}, mesh)
            return np.asarray(solve(params, batch["context"], key))

    return run


def encoded_prompts(settings, file: str) -> Plan:
    """The prompts of a text file, one a line, through the config's text encoder; and its negative prompt.

    UserError: no such file, none in it, or a word that the small world does not know.
    """
    lines = files.prompts(file)
    read, size = text_reader(settings, lines), settings.get("shard_records", SHARD)

    def make(index):
        here = lines[index * size : (index + 1) * size]
        for caption in tqdm(here, desc=f"shard {index}", unit=" prompt", leave=False):
            yield {"caption": caption, "context": read(caption)}

    about = _about(settings, "text", "umt5", "negative_prompt") | _digest(lines, size)
    folder = latent.prompt_folder(settings)
    if not folder:
        raise UserError("The config reads no encoded prompts; give one with config.prompts or config.data.")
    return Plan(
        folder,
        -(-len(lines) // size),
        make,
        about,
        _negative(settings, read),
        sources=_text_weights(settings),
    )


def encoded_videos(settings, folder: str) -> Plan:
    """The videos of a folder, each in clips of settings.record_frames latent frames at the config's size and frame rate.

    The caption of clip.mp4 is in clip.txt beside it. UserError before work starts: no videos, or a caption that is missing, empty
    or of words that the small world does not know. A video that cannot be read, or is shorter than a clip, is skipped and told.
    """
    videos = captioned_videos(folder)
    read = text_reader(settings, [caption for _, caption in videos])
    encode, mesh = latent.video_encoder(settings), local_mesh(settings.record_batch)
    look, frames = latent.video(settings), video_frames(settings)
    size, skipped = settings.get("shard_records", SHARD), []

    def clips(path, caption):
        found = False
        try:
            for clip in footage.clips(path, (look.height, look.width), look.fps, frames):
                found = True
                yield caption, clip
        except UserError as error:
            skipped.append(str(error))
        else:
            if not found:
                skipped.append(f"{path} is shorter than a clip of {frames} frames at {look.fps:g} a second.")

    def make(index):
        here = tqdm(
            videos[index * size : (index + 1) * size], desc=f"shard {index}", unit=" video", leave=False
        )
        rows = itertools.chain.from_iterable(itertools.starmap(clips, here))
        while batch := list(itertools.islice(rows, settings.record_batch)):
            captions, video = zip(*batch, strict=True)
            rest = settings.record_batch - len(batch)  # the last is filled up: one program serves all
            video = np.pad(np.stack(video), ((0, rest), *[(0, 0)] * 4))
            latents = encode(sharding.put_batch({"video": video}, mesh)["video"])[: len(batch)]
            yield from _records(captions, "latents", latents, [read(caption) for caption in captions])

    about = _about(settings, "record_frames", "video", "world", "vae", "text", "umt5", "negative_prompt")
    about |= _digest([f"{path.relative_to(folder)}: {caption}" for path, caption in videos], size)
    negative = _negative(settings, read)
    sources = [settings.vae_weights, *_text_weights(settings)]
    return Plan(settings.data, -(-len(videos) // size), make, about, negative, skipped, sources)


def captioned_videos(folder: str) -> list[tuple[Path, str]]:
    """(path, caption) of every video in a folder and the folders in it, by name; UserError where one has no caption."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in VIDEOS)
    if not paths:
        raise UserError(
            f"There are no videos ({', '.join(VIDEOS)}) in {folder}; give the folder that holds them."
        )
    return [(path, _caption(path.with_suffix(".txt"), path)) for path in paths]


def _caption(file: Path, video: Path) -> str:
    caption = " ".join(" ".join(files.lines(file) if file.exists() else []).split())
    if not caption:
        raise UserError(f"{video} has no caption; write what it shows to {file}.")
    return caption


def text_reader(settings, captions: list[str]):
    """f(caption) → its embedding, bfloat16 [n, text_dim], n its own length. UserError for captions that it cannot read, now.

    UMT5 is loaded at the first caption, on this process's first device.
    """
    words = latent.words(settings)
    if words:
        for caption in captions:
            words.encode([caption])
        return lambda caption: trimmed(words.encode([caption])[0])
    sizes = config.build(UMT5Config, settings, "umt5")
    config.same("umt5.dim", sizes.dim, "dit.text_dim", settings.dit.text_dim)
    folder = _text_weights(settings)[0].parent
    read = prompts.PromptEncoder(folder, sizes, settings.dit.text_len).reader(jax.local_devices()[0])

    @functools.lru_cache(maxsize=64)  # the clips of a long video share their caption
    def embedding(caption):
        return read([caption])[0].astype(jnp.bfloat16)

    return embedding


def _text_weights(settings) -> list[Path]:
    """The text encoder's files; none for the small world's words."""
    names = [] if latent.words(settings) else prompts.FILES
    return [weights.locate(settings.weights, names) / name for name in names]


def local_mesh(batch: int) -> Mesh:
    """Mesh of this process's devices, batch and parameters split over them; UserError for a batch that they do not divide."""
    devices = jax.local_devices()
    if batch % len(devices):
        raise UserError(
            f"config.record_batch is {batch}; set it to a multiple of the {len(devices)} devices of this process."
        )
    return sharding.make_mesh(sharding.MeshConfig(1, len(devices), 1), devices)


def video_frames(settings) -> int:
    """Video frames of a record's latent frames."""
    return 1 + latent.temporal_stride(settings) * (settings.record_frames - 1)


def _about(settings, *names) -> dict[str, Any]:
    """{name: value} of those settings that the config has."""
    return {name: settings.to_dict()[name] for name in names if name in settings}


def _digest(sources: list[str], size: int) -> dict[str, Any]:
    """What tells one list of sources from another."""
    digest = hashlib.sha256("\n".join(sources).encode()).hexdigest()
    return {"shard_records": size, "number of sources": len(sources), "SHA-256 of the sources": digest}


def _negative(settings, read):
    """f() → the config's negative prompt, bfloat16 [text_len, text_dim]; None for the small world, where it is zeros."""
    if latent.words(settings):
        return None

    def embedding():
        context = read(settings.get("negative_prompt", ""))
        return np.pad(context, ((0, settings.dit.text_len - len(context)), (0, 0)))

    return embedding


def _per_shard(settings) -> int:
    """Batches of a shard; UserError where it takes none."""
    if settings.shard_records < settings.record_batch:
        raise UserError(
            f"config.shard_records is {settings.shard_records}; set it to a multiple of the {settings.record_batch} records "
            "of a batch (config.record_batch)."
        )
    return settings.shard_records // settings.record_batch


def _batches(per_shard: int, index: int) -> Iterator[int]:
    """The places of a shard's batches among all batches."""
    for number in tqdm(range(per_shard), desc=f"shard {index}", unit=" batch", leave=False):
        yield index * per_shard + number


def _records(captions, name, arrays, contexts=None):
    for row, (caption, array) in enumerate(zip(captions, np.asarray(arrays, np.float16), strict=True)):
        record = {"caption": str(caption), name: array}
        yield record if contexts is None else record | {"context": trimmed(contexts[row])}


def trimmed(context: np.ndarray) -> np.ndarray:
    """An embedding [text_len, text_dim] up to its prompt's end: bfloat16 [n, text_dim], in which UMT5 runs, and half the size."""
    return context[: context.any(-1).nonzero()[0].max() + 1].astype(jnp.bfloat16)
