"""Rolls out a model in batches, judges its clips, and keeps every finished batch, so that a run that was stopped goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from rfjax import drift, sampler, shapes
from rfjax.evaluate import draw, keep
from rfjax.files import replacing
from rfjax.score import score

SHOWN = 4  # clips whose frames are kept for the contact sheets


class Task(NamedTuple):
    """What is rolled out, by each method."""

    prompts: int
    seconds: float
    seed: int
    batch: int
    given: str | None = None  # "picture", "video" or nothing


def described(task: Task, model: sampler.Sampler, settings: Any) -> dict[str, Any]:
    """What a run's scores depend on, apart from the method: another in the same folder is refused."""
    return task._asdict() | {
        "config": settings.to_dict(),
        "weights": keep.fingerprint(model.params),
        "judge": drift.VERSION,
    }


def judged(
    model: sampler.Sampler, scenes: list[shapes.Scene], method: str, task: Task, place: Path
) -> list[dict[str, Any]]:
    """Scores of one clip a scene's caption, see `rfjax.score.score`; finished batches in the folder `place` are not made again."""
    scores, seconds = [], round(task.prompts * task.seconds)
    with tqdm(total=seconds, desc=method, unit=" s of video") as bar:
        for start in range(0, len(scenes), task.batch):
            some = scenes[start : start + task.batch]
            file = place / "batches" / f"{method}_{start:05d}.json"
            if file.exists():
                bar.update(len(some) * task.seconds)
            else:
                _judge_batch(model, some, start, method, task, file, bar)
            scores += [keep.arrays(one) for one in keep.read(file)]
    return scores


def _judge_batch(model, scenes, start, method, task, file, bar):
    captions = [shapes.caption(scene) for scene in scenes]
    frames = round(task.seconds * model.video.fps)
    videos = []
    for block in rolled(model, scenes, start, method, task):
        videos.append(block[:, : frames - sum(part.shape[1] for part in videos)])
        bar.update(videos[-1].shape[1] * len(scenes) / model.video.fps)
    videos = np.concatenate(videos, 1)
    bar.set_postfix_str("judging")
    scores = [score(*pair, model.video.fps) for pair in zip(videos, captions, strict=True)]
    for index, video in enumerate(videos[: max(0, SHOWN - start)], start):
        _keep_strip(video, strip(file.parent, method, index))
    bar.set_postfix_str("")
    keep.write(file, scores)  # last: a batch that is there is whole


def rolled(model, scenes, start, method, task: Task) -> Iterator[np.ndarray]:
    """Frames of scenes start, start + 1, … as they are made, uint8 [B, m, H, W, 3]: at least task.seconds of each."""
    captions = [shapes.caption(scene) for scene in scenes]
    past = model.encode(beginnings(model, scenes, task.given))
    count = model.latent_frames(round(task.seconds * model.video.fps))
    return model.decode(model.latents(captions, task.seed + start, count, method, past))


def beginnings(model, scenes, given):
    """The frames that clips begin with, uint8 [B, H, W, 3]: of their scenes the first ("picture"), the first 33, or none."""
    if given is None:
        return []
    first, later = sampler.block_lengths(model.vae.config, model.rollout)
    length = 1 if given == "picture" else first + 2 * later
    videos = np.stack([shapes.render(scene, 0, length) for scene in scenes], 1)
    return np.repeat(videos, first, 0) if given == "picture" else videos


def strip(batches: Path, method: str, index: int) -> Path:
    """Where frames of a clip, evenly spread over time, lie side by side, see `draw.strip`."""
    return batches / f"{method}_{index:05d}.png"


def _keep_strip(video, path):
    with replacing(path) as partial:
        draw.strip(video).save(partial, "png")
