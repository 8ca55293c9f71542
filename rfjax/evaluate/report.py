"""Many clips' scores as Markdown tables and as JSON: means ± standard errors over clips."""

import numpy as np

from rfjax import drift
from rfjax.score import ATTRIBUTES, DRIFTS, KEPT, LEVELS, REFERENCE, WINDOW
from rfjax.statistics import bootstrap_ratio, mean_error

SECONDS = (2, 5, 10, 20, 30, 60, 120)  # shown in the tables of drift by second


def tables(scores):
    """Markdown of many clips' scores (`rfjax.score.score`)."""
    parts = (score_table, _right_table, _level_table, _drift_table, _kept_table)
    return "\n\n".join(part(scores) for part in parts) + "\n"


def curves(scores):
    """{title: [clips, S]}: what is drawn over time; clips are cut to the shortest, NaN where a caption does not say."""
    length = min(len(clip["level"]["speed"]) for clip in scores)
    unnamed = np.full(length, np.nan)
    named = {
        f"right {name}, %": 100
        * np.array([clip["seconds"].get(name, unnamed)[:length] for clip in scores], float)
        for name in ATTRIBUTES
        if any(name in clip["seconds"] for clip in scores)
    }
    for kind, units, word in (("level", LEVELS, ""), ("drift", DRIFTS, "drift of the ")):
        for name, unit in units.items():
            title = f"{word}{name.replace('_', ' ')}{f', {unit}' * bool(unit)}"
            named[title] = np.array([clip[kind][name][:length] for clip in scores])
    return named


def summary(scores):
    """{measure: {"mean", "error"}} of the drift score, its parts, and what is right in the last 5 s."""
    found = {"drift score": [clip["change"]["score"] for clip in scores]}
    found["moving"] = [clip["change"]["moving"] for clip in scores]
    for name in drift.PARTS:
        found[name] = [clip["change"]["parts"][name] for clip in scores]
    for part in ("first", "last"):
        for name in ATTRIBUTES:
            found[f"right {name}, {part} {WINDOW} s"] = [clip[part].get(name, np.nan) for clip in scores]
    pairs = {name: mean_error(np.array(values, float)) for name, values in found.items()}
    return {name: {"mean": float(mean), "error": float(error)} for name, (mean, error) in pairs.items()}


def score_table(scores):
    """The drift score and its parts, each 0 (as rendered) … 1 (another scene, or frozen)."""
    found = summary(scores)
    names = ("drift score", *drift.PARTS, "moving")
    cells = (_with_error(*found[name].values(), ".3f") for name in names)
    title = f"Drift, last {WINDOW} s against first {WINDOW} s: 0 as rendered … 1 another scene or frozen"
    if min(len(clip["level"]["speed"]) for clip in scores) < 2 * WINDOW:
        title += f" (of little use here: in clips under {2 * WINDOW} s the two overlap)"
    rows = f"| {' | '.join(names)} |", "|---" * len(names) + "|", f"| {' | '.join(cells)} |"
    return "\n".join([title, "", *rows])


def compared(methods):
    """The drift scores of several methods, {name: scores}, in one table, and each one's ratio to the last, paired by clips."""
    *_, last = methods
    found = ratios(methods)
    lines = [f"| drift score | mean ± standard error over clips | ratio to {last} (95 %) |", "|---|---|---|"]
    for name, scores in methods.items():
        drifts = [clip["change"]["score"] for clip in scores]
        ratio = found[name].text if name in found else "1"
        lines.append(f"| {name} | {_with_error(*mean_error(drifts), '.3f')} | {ratio} |")
    return "\n".join(lines)


def ratios(methods):
    """{method: `statistics.Ratio` of its mean drift score to the last method's}, paired by clips."""
    *names, last = methods
    drifts = {name: [[clip["change"]["score"] for clip in scores]] for name, scores in methods.items()}
    return {name: bootstrap_ratio(drifts[name], drifts[last]) for name in names}


def _right_table(scores):
    length = min(len(clip["seconds"]["shape"]) for clip in scores)
    lines = [f"{len(scores)} clips of {length} s or more: right, %", ""]
    lines += [f"| | first {WINDOW} s | last {WINDOW} s | worst second |", "|---|---|---|---|"]
    for name in ATTRIBUTES:
        first, last = (
            [clip[part][name] for clip in scores if name in clip[part]] for part in ("first", "last")
        )
        seconds = [clip["seconds"][name][:length] for clip in scores if name in clip["seconds"]]
        worst = f"{100 * np.mean(seconds, 0).min():.1f}" if seconds else "–"
        if first:
            lines.append(f"| {name} | {100 * np.mean(first):.1f} | {100 * np.mean(last):.1f} | {worst} |")
    first, last = (100 * np.mean([all(clip[part].values()) for clip in scores]) for part in ("first", "last"))
    return "\n".join([*lines, f"| all | {first:.1f} | {last:.1f} | |"])


def _level_table(scores):
    series = {
        f"{name}{f' ({unit})' * bool(unit)}": [clip["level"][name] for clip in scores]
        for name, unit in LEVELS.items()
    }
    return f"Second by second, mean over\n\n{ends_table(series)}"


def ends_table(series):
    """{name: [S] of every clip} → first and last 5 s and their difference, mean ± standard error over clips."""
    lines = [f"| | first {WINDOW} s | last {WINDOW} s | change |", "|---|---|---|---|"]
    for name, clips in series.items():
        ends = np.array([[_mean(clip[:WINDOW]), _mean(clip[-WINDOW:])] for clip in clips]).T
        pairs = zip(*mean_error(np.array([*ends, ends[1] - ends[0]])), strict=True)
        cells = (_with_error(*pair, ".3g") for pair in pairs)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_error(mean, error, form):
    """A mean ± its standard error, which one clip has none of; "–" where nothing can be said."""
    if not np.isfinite(mean):
        return "–"
    return f"{mean:{form}} ± {error:{form}}" if np.isfinite(error) else f"{mean:{form}}"


def _mean(values):
    known = values[np.isfinite(values)]
    return known.mean() if known.size else np.nan


def _drift_table(scores):
    length = min(len(clip["drift"]["hue"]) for clip in scores)
    shown = sorted({second for second in SECONDS if second < length} | {length})
    lines = [f"Drift from the first {REFERENCE} s, mean over clips in the second that ends at", ""]
    lines += [f"| | {' | '.join(f'{second} s' for second in shown)} |", "|---" * (len(shown) + 1) + "|"]
    for name, unit in DRIFTS.items():
        mean, _ = mean_error(np.array([clip["drift"][name][:length] for clip in scores], float).T)
        cells = " | ".join(_with_error(mean[second - 1], np.nan, ".2f") for second in shown)
        lines.append(f"| {name.replace('_', ' ')} ({unit}) | {cells} |")
    return "\n".join(lines)


def _kept_table(scores):
    lines = [
        f"Motion of the last {WINDOW} s against the first, mean ± standard error over the clips whose motion has it",
        "",
        f"| {' | '.join(f'{name} ({unit})' for name, unit in KEPT.items())} |",
        "|---" * len(KEPT) + "|",
    ]
    found = [mean_error(np.array([clip["kept"][name] for clip in scores], float)) for name in KEPT]
    return "\n".join([*lines, f"| {' | '.join(_with_error(*pair, '.1f') for pair in found)} |"])
