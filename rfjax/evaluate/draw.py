"""Pictures of a run: every measure over time (matplotlib), and contact sheets."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rfjax.files import replacing
from rfjax.statistics import mean_error

COLUMNS = 12  # moments on a contact sheet
LABEL, GAP, WIDE = 18, 4, 110  # pixels: a line of text, between frames, least for the names of the rows


def figure_class(path: Path):
    """matplotlib's Figure; without matplotlib None, and one line says that `path` is not drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} is not drawn: it takes matplotlib, pip install -e '.[plot]'", file=sys.stderr)
        return None
    return Figure


def bars(rows, label: str, path: Path) -> None:
    """Draws {name: (mean, standard error, values that it is the mean of)}: a bar a name from top to bottom, a dot a value."""
    if (Figure := figure_class(path)) is None:
        return
    figure = Figure(figsize=(7, 0.8 + 0.32 * len(rows)), layout="constrained")
    panel, places = figure.subplots(), np.arange(len(rows))
    means, errors, values = zip(*rows.values(), strict=True)
    panel.barh(places, means, xerr=np.nan_to_num(errors), color="#8fb3d9", ecolor="#33475b", capsize=3)
    for place, dots in zip(places, values, strict=True):
        panel.plot(dots, np.full(len(dots), place), "o", color="#33475b", markersize=3)
    panel.set_yticks(places, list(rows), fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(left=0)
    panel.set_xlabel(label, fontsize=9)
    panel.tick_params(axis="x", labelsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def curves(groups, path: Path) -> None:
    """Draws {group: {title: [clips, S]}}: a panel a title, a line a group, mean and a band of one standard error.

    Without matplotlib nothing is drawn, and one line says so.
    """
    if (Figure := figure_class(path)) is None:
        return
    titles = list(next(iter(groups.values())))
    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(4 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, title in itertools.zip_longest(panels, titles):
        if title is None:
            panel.set_axis_off()
            continue
        for name, measured in groups.items():
            mean, error = mean_error(measured[title].T)
            second = np.arange(1, len(mean) + 1)
            (line,) = panel.plot(second, mean, label=name, linewidth=1.2)
            panel.fill_between(
                second, mean - error, mean + error, alpha=0.2, color=line.get_color(), linewidth=0
            )
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("second", fontsize=8)
        panel.tick_params(labelsize=8)
    if len(groups) > 1:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
        )
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def spread(length: int) -> np.ndarray:
    """The frames of so many that a contact sheet shows, evenly spread over time."""
    return np.linspace(0, length - 1, COLUMNS).round().astype(int)


def strip(frames) -> Image.Image:
    """Frames uint8 [F, H, W, 3] → what a contact sheet shows of them, side by side: a picture [H, COLUMNS · W]."""
    return Image.fromarray(np.concatenate([frames[index] for index in spread(len(frames))], 1))


def sheet(strips, times, title: str, path: Path) -> None:
    """A contact sheet: {name of a row: picture of frames side by side}, the times of its columns in seconds."""
    one = next(iter(strips.values()))
    wide, high, font = one.width // len(times), one.height, ImageFont.load_default(12)
    left = max(WIDE, *(math.ceil(font.getlength(name)) + 2 * GAP for name in strips))
    size = left + len(times) * (wide + GAP), 2 * LABEL + len(strips) * (high + GAP) + GAP
    whole = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(whole)
    draw.text((GAP, 2), title, fill="black", font=font)
    for column, time in enumerate(times):
        draw.text((left + column * (wide + GAP), LABEL + 2), f"{round(time, 1):g} s", fill="black", font=font)
    for row, (name, picture) in enumerate(strips.items()):
        y = 2 * LABEL + row * (high + GAP)
        draw.text((GAP, y + high // 2 - 7), name, fill="black", font=font)
        for column in range(len(times)):
            cell = picture.crop((column * wide, 0, (column + 1) * wide, high))
            whole.paste(cell, (left + column * (wide + GAP), y))
    with replacing(path) as partial:
        whole.save(partial, "png")
