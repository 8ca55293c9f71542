"""Data sets as grain pipelines: element i is a pure function of (seed, i), so a run resumes by its counters.

    clips     the small world's videos, rendered on the fly          {"video", "caption"}
    captions  the small world's captions                             {"caption"}
    records   arrays kept in ArrayRecord shards (latents, …)         {"caption", whatever was written}

A pipeline is a `grain.MapDataset` of batches: index it, or `iterate` it. Captions travel as strings, so that
their encoder is chosen where they are used.
"""

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from flax import serialization

from rfjax import checkpoint, shapes
from rfjax.errors import UserError
from rfjax.files import replacing

ENDLESS = 2**48  # elements of a generated data set
LATEST_START = 16 * 60  # a clip starts within the first minute of its scene
SUFFIX = ".arrayrecord"
UNFINISHED = (".partial", ".tmp")  # what a file that is not yet whole is called
WAIT = 5  # seconds between two looks at what other processes have made
ABOUT = "about.json"  # beside the shards: what they are made of
CONTENTS = "fingerprints of what they are made from"  # there, {path: fingerprint}
LOOKS, BLOCK = 64, 4096  # of a fingerprint: blocks of a file, and bytes of each


def clips(frames, batch_size, seed=0, world=shapes.WORLD, split="train"):
    """Videos of the small world, every one of another scene, from a random frame on.

    Returns:
        grain.MapDataset of {"video": uint8 [batch_size, frames, size, size, 3], "caption": str [batch_size]}.
    """
    scene = functools.partial(_clip, frames=frames, seed=seed, world=world, split=split)
    return grain.MapDataset.range(ENDLESS).map(scene).batch(batch_size)


def _clip(index, frames, seed, world, split):
    scene = shapes.sample_scene(index, seed, world, split)
    rng = np.random.default_rng((seed, index, shapes.SPLITS.index(split), 1))  # not the stream of the scene
    start = int(rng.integers(LATEST_START))
    return {"video": shapes.render(scene, start, frames), "caption": shapes.caption(scene)}


def captions(batch_size, seed=0, world=shapes.WORLD, split="train"):
    """Captions of the small world: grain.MapDataset of {"caption": str [batch_size]}."""

    def element(index):
        return {"caption": shapes.caption(shapes.sample_scene(index, seed, world, split))}

    return grain.MapDataset.range(ENDLESS).map(element).batch(batch_size)


def records(folder, batch_size, made_by, seed=0, read=lambda record: record):
    """Records written by `write_shard`, shuffled anew in every pass, for ever.

    Args:
        folder: where the shards lie.
        made_by: the command that makes them, for the error message.
        read: f(record) → record, what is done to each before they are batched.

    Returns:
        grain.MapDataset of dicts of arrays [batch_size, …]; strings become one str array.

    Raises:
        UserError: no such folder, no records in it, or a damaged shard.
    """
    shards = sorted(str(path) for path in Path(folder).glob(f"*{SUFFIX}"))
    if not shards:
        raise UserError(f"There are no records in {folder}: make them with `{made_by}`")
    try:
        source = grain.sources.ArrayRecordDataSource(shards)
        count = len(source)
    except Exception as error:  # array_record raises bare RuntimeError or ValueError
        raise UserError(f"a file in {folder} is damaged ({error}): delete it and run `{made_by}`") from error
    if not count:
        raise UserError(f"{folder} holds no records: run `{made_by}`")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    return dataset.map(serialization.msgpack_restore).map(read).batch(batch_size)


def write_shards(folder, make: Callable[[int], Iterable[dict]], shards):
    """Writes shard after shard, skipping those that are there: run again after a stop, it goes on.

    Of P processes that write to one folder, process p makes the shards p, p + P, ….

    Args:
        folder: made if missing.
        make: shard index → its records, an iterable of dicts of arrays and strings, alike in shapes.
        shards: how many shards the folder shall hold.
    """
    for index in range(jax.process_index(), shards, jax.process_count()):
        path = Path(folder) / f"{index:05d}{SUFFIX}"
        if not path.exists():
            write_shard(path, make(index))


def wait_for(folder, shards):
    """Waits until all shards are in a folder: where several processes make them, none may leave before the others."""
    while not all((Path(folder) / f"{index:05d}{SUFFIX}").exists() for index in range(shards)):
        time.sleep(WAIT)


def count(folder) -> int:
    """Records in a folder."""
    return len(grain.sources.ArrayRecordDataSource(sorted(map(str, Path(folder).glob(f"*{SUFFIX}")))))


def discard(folder, *names):
    """Removes a folder's shards, what they are made of, and other files by name; the folder too if it is empty then."""
    folder = Path(folder)
    for path in (*folder.glob(f"*{SUFFIX}"), folder / ABOUT, *(folder / name for name in names)):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def write_shard(path, examples):
    """Writes records to one file, which appears under its name only when complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*.partial"):  # by a process that was killed
        left.unlink()
    with replacing(path) as partial:
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for example in examples:
            writer.write(serialization.msgpack_serialize(example))
        writer.close()


def claim(folder, about: dict, sources: Iterable[str | os.PathLike] = ()):
    """Notes in a folder what its records are made of, so that shards of two kinds never mix.

    Args:
        about: names and values, anything JSON takes.
        sources: files and folders that the records are made from, such as weights; what is in them is noted by `fingerprint`.

    Raises:
        UserError: the folder holds records that are made of something else, or from other contents under the same path.
    """
    path, about = Path(folder) / ABOUT, json.loads(json.dumps(about))
    contents = {str(source): fingerprint(source) for source in sources}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(about | {CONTENTS: contents}, indent=1))
    found = claimed(folder)
    before = found.pop(CONTENTS, {})
    differing = sorted(name for name in about | found if about.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"The records in {folder} were made with {name} = {found.get(name)!r}, now it is {about.get(name)!r}: "
            "delete the folder, or name another in the config."
        )
    if sorted(before.values()) != sorted(contents.values()):  # the files may have moved
        changed = [source for source, digest in contents.items() if digest not in before.values()]
        raise UserError(
            f"The records in {folder} were made from something else than {', '.join(changed) or 'now'}: delete the folder, "
            "or name another in the config."
        )


def claimed(folder) -> dict:
    """What `claim` has noted in a folder; empty where nothing is."""
    path = Path(folder) / ABOUT
    return json.loads(path.read_text()) if path.exists() else {}


def fingerprint(source: str | os.PathLike) -> str:
    """What tells the contents of a file or folder from others, quickly: a hash of names, sizes, and a sample of the bytes.

    Of a run's folder its newest checkpoint counts. The sample is LOOKS blocks of each file, evenly spaced from its beginning to
    its end: training changes all of them.
    """
    source, digest = checkpoint.newest(source), hashlib.sha256()
    files = sorted(file for file in source.rglob("*") if file.is_file() and file.suffix not in UNFINISHED)
    for path in files if source.is_dir() else [source]:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(source)} {size}\n".encode())
        with path.open("rb") as file:
            for look in range(LOOKS):
                file.seek(max(0, size - BLOCK) * look // (LOOKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def share(make, config, mine, parts):
    """This process's rows of the batches of `make(config)`, the same rows however many processes there are.

    Args:
        make: config → grain.MapDataset of dicts of numeric arrays [config.batch_size · n, …].
        mine: which of the `parts` equal parts of every batch, in order (`sharding.batch_parts`); they divide the batch.
    """
    if len(mine) == parts:
        return make(config)
    config = config.copy_and_resolve_references()
    config.batch_size //= parts
    dataset = make(config)  # element b · parts + i is part i of batch b

    def rows(batch):
        own = [dataset[batch * parts + part] for part in mine]
        return {name: np.concatenate([part[name] for part in own]) for name in own[0]}

    return grain.MapDataset.range(len(dataset) // parts).map(rows)


def iterate(dataset, threads=2):
    """MapDataset → iterator that reads ahead; its get_state() / set_state(state) resume it exactly."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(options))
