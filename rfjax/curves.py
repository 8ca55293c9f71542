"""Draws what runs of `train.py` have logged: a panel a metric, a line a run. docs/recipes.md says what to look for.

    python -m rfjax.curves runs/teacher_long --out teacher_long.png
    python -m rfjax.curves runs/distill runs/study/trained/self_forcing_0 --metrics critic_loss,latent_std --out distill.png

Takes `pip install -e '.[plot]'`. A metric is drawn as it was logged, and where there are 40 points of it or more also as a running
mean over a twentieth of them.
"""

import difflib
import json
import math
from pathlib import Path

import numpy as np

from rfjax.errors import Parser, UserError, exit_cleanly
from rfjax.files import check_writable, replacing

SPEED = "steps_per_second"  # of the machine, not of the training
MANY = 40  # points from which on a running mean is drawn
Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # {metric: (steps [N], values [N])}


def read(run: Path) -> Curves:
    """What a run has logged, in the order in which it came; counts of skipped steps only where there were any.

    UserError where there is no log, or nothing in it.
    """
    path, points = run / "metrics.jsonl", {}
    if not path.is_file():
        raise UserError(f"There is no {path}; give the folder of a run of train.py.")
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the last one, of a run that was killed while it wrote
            break
        step = row.pop("step")
        for name, value in row.items():
            points.setdefault(name, []).append((step, value))
    curves = {name: tuple(np.array(rows, float).T) for name, rows in points.items() if name != SPEED}
    curves = {name: curve for name, curve in curves.items() if name != "skipped" or curve[1].any()}
    if not curves:
        raise UserError(f"{path} holds nothing to draw yet.")
    return curves


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value's neighbourhood of a twentieth of all, [N] → [N]; at the ends of what there is of it."""
    window = np.ones(max(1, len(values) // 20))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def chosen(runs: dict[str, Curves], metrics: str | None) -> list[str]:
    """The metrics to draw: those asked for, else all; UserError for one that no run has."""
    there = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    wanted = metrics.split(",") if metrics else there
    for name in wanted:
        if name not in there:
            near = difflib.get_close_matches(name, there, 1) or [", ".join(there)]
            raise UserError(f"No run has logged {name!r}; did you mean {near[0]}?")
    return wanted


def draw(runs: dict[str, Curves], metrics: list[str], path: Path) -> None:
    """Draws them; UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Drawing takes matplotlib: pip install -e '.[plot]'") from error
    columns = min(4, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(2.9 * columns, 2.2 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[len(metrics) :]:
        panel.set_axis_off()
    lines = {}
    for panel, metric in zip(panels, metrics, strict=False):
        for number, (name, curves) in enumerate(runs.items()):
            if metric not in curves:
                continue
            (steps, values), colour = curves[metric], f"C{number}"
            few = len(values) < MANY
            (lines[name],) = panel.plot(
                steps, values if few else running_mean(values), color=colour, linewidth=1.3
            )
            panel.plot(
                steps, values, "." if few else "-", color=colour, alpha=0.6 if few else 0.25, linewidth=0.7
            )
        if metric.startswith("right_"):  # shares of clips
            panel.set_ylim(-0.03, 1.03)
        panel.set_title(metric, fontsize=9)
        panel.tick_params(labelsize=7)
    figure.supxlabel("step", fontsize=8)
    if len(runs) > 1:
        figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3, fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=90)


@exit_cleanly
def main(argv=None) -> None:
    parser = Parser(prog="python -m rfjax.curves", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--metrics", help="names by commas (default: all that the runs have)")
    parser.add_argument("--out", required=True, metavar="PNG", help="the picture")
    args = parser.parse_args(argv)
    check_writable(args.out)
    runs = {str(run): read(run) for run in args.runs}
    draw(runs, chosen(runs, args.metrics), Path(args.out))
    print(f"{args.out}: {', '.join(runs)}")


if __name__ == "__main__":
    main()
