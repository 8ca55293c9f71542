"""What a run tells, by process 0: metrics.jsonl (one object a line), tensorboard, sample clips and contact sheets."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import tensorboardX
from tqdm import tqdm

from rfjax import distributed, video
from rfjax.files import replacing


class Log:
    """Writer of a run's metrics under `folder`. What an earlier run wrote from step `start` on is dropped.

    Only process 0 writes.
    """

    def __init__(self, folder: str | os.PathLike, start: int):
        self.folder, self.writes = Path(folder), distributed.is_main()
        if not self.writes:
            return
        self.path = self.folder / "metrics.jsonl"
        _keep_before(self.path, start)
        self._lines = self.path.open("a")
        self._board = tensorboardX.SummaryWriter(str(self.folder / "tensorboard"), purge_step=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line, and one tensorboard point for each value."""
        if not self.writes:
            return
        self._lines.write(
            json.dumps({"step": step} | {name: float(f"{v:.6g}") for name, v in values.items()}) + "\n"
        )
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def has(self, step: int, names: Sequence[str]) -> bool:
        """Whether process 0's log has a line of a step with these metrics alone, so that a run that goes on need not measure them.

        All processes must ask.
        """
        there = self.writes and any(
            row["step"] == step and row.keys() <= {"step", *names}
            for row in map(json.loads, self.path.read_text().splitlines())
        )
        return not distributed.agree(not there)

    def clips(self, step: int, clips: np.ndarray, captions, fps: float) -> None:
        """clips uint8 [N, F, H, W, 3] → samples/STEP_INDEX.mp4 and .png, and captions in tensorboard."""
        if not self.writes:
            return
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        for index, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
            for suffix in ("mp4", "png"):
                path = folder / f"{step:06d}_{index}.{suffix}"
                with video.open_writer(path, fps, clip.shape[1:3]) as writer:
                    writer.write(clip)
            self._board.add_text(f"sample_{index}", caption, step)
            self._board.add_images(
                f"sample_{index}", clip[:: max(1, len(clip) // 4)], step, dataformats="NHWC"
            )

    def close(self) -> None:
        if self.writes:
            self._lines.close()
            self._board.close()


def progress(start: int, steps: int) -> tqdm:
    """The steps from `start` on, with a bar that process 0 shows."""
    return tqdm(
        range(start, steps),
        initial=start,
        total=steps,
        dynamic_ncols=True,
        disable=not distributed.is_main(),
    )


def means(recent: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Mean of each metric over some steps, of those that are finite; without the metrics that never are."""
    recent = jax.device_get(recent)
    names = dict.fromkeys(name for values in recent for name in values)  # a critic's warm-up has fewer
    columns = {name: [float(values[name]) for values in recent if name in values] for name in names}
    finite = {name: [value for value in column if math.isfinite(value)] for name, column in columns.items()}
    return {name: float(np.mean(column)) for name, column in finite.items() if column}


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames […, H, W, 3] in [-1, 1] → uint8 of the same shape on the host, rounded and clamped.

    All processes must ask: frames may be spread over them.
    """
    return (np.clip(distributed.whole(frames) * 127.5 + 127.5, 0, 255) + 0.5).astype(np.uint8)


def _keep_before(path: Path, start: int) -> None:
    """Drop the lines of steps ≥ start, and a line that a stop cut in two."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] < start:
                kept.append(line + "\n")
        except ValueError:
            break
    with replacing(path) as partial:
        partial.write_text("".join(kept))
