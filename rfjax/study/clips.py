"""The measures of every judged clip, `clips.csv`: all that the study's numbers are made of, and small enough to be published.

A line is a clip: the row, its training seed, the number of its caption, and a column for each measure.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from rfjax.errors import UserError
from rfjax.evaluate import keep
from rfjax.files import replacing
from rfjax.study.rows import ROWS

FILE = "clips.csv"
KEYS = ("row", "seed", "clip")
Values = dict[str, dict[int, dict[str, np.ndarray]]]  # {row: {training seed: {measure: [clips]}}}


def write(folder: Path, values: Values) -> None:
    """To six digits, there only when complete."""
    with replacing(folder / FILE) as partial, partial.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*KEYS, *_measures(values)])
        for name, seeds in values.items():
            for seed, clips in seeds.items():
                for number, numbers in enumerate(zip(*clips.values(), strict=True)):
                    lines.writerow([name, seed, number, *(f"{value:.6g}" for value in numbers)])


def read(folder: Path) -> Values:
    """UserError where no such file is there, or it is damaged."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"There is no {path}; give the folder of a study that has judged something.")
    lines: dict[str, dict[int, list]] = {}
    try:
        with path.open(newline="") as file:
            head, *rest = csv.reader(file)
        measures = head[len(KEYS) :]
        for name, seed, _, *numbers in rest:
            clip = dict(zip(measures, map(float, numbers), strict=True))
            lines.setdefault(name, {}).setdefault(int(seed), []).append(clip)
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); take it again from where it came.") from error
    return {name: {seed: columns(clips) for seed, clips in seeds.items()} for name, seeds in lines.items()}


def columns(clips: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Measures of clips one by one → {measure: [clips]}."""
    return {name: np.array([clip[name] for clip in clips]) for name in clips[0]}


def beside(folder: Path, run: dict[str, Any], alone: bool = False) -> Values:
    """What another study has judged; UserError where it was not judged as `run` says, or is not whole.

    alone: nothing stands beside it, so what it has noted besides, such as the files that it began with, is not compared.
    """
    note = folder / keep.RUN
    if not note.is_file():
        raise UserError(f"There is no {note}, which says how clips were judged; it belongs beside {FILE}.")
    there = keep.read(note)
    if alone:
        there = {name: value for name, value in there.items() if name in run}
    if differ := keep.differences(there, run):
        raise UserError(f"The study in {folder} cannot stand beside this one: it has not the same {differ}.")
    values = read(folder)
    for name, seeds in values.items():
        for seed, clips in seeds.items():
            if (count := len(next(iter(clips.values())))) != run["prompts"]:
                raise UserError(
                    f"{folder / FILE} is damaged: of {name}, seed {seed}, it has {count} clips of {run['prompts']}."
                )
    if unknown := values.keys() - ROWS.keys():
        raise UserError(
            f"{folder / FILE} has rows that are not in rfjax/study/rows.py: {', '.join(sorted(unknown))}."
        )
    return values


def _measures(values: Values) -> list[str]:
    return list(next(iter(next(iter(values.values())).values())))
