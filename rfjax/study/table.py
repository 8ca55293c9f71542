"""What is finished of the study as a table, as JSON, and in pictures."""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rfjax import config, drift, shapes
from rfjax.evaluate import draw, generate, keep, report
from rfjax.files import replacing
from rfjax.score import WINDOW
from rfjax.statistics import Ratio, bootstrap_ratio, crossed_error
from rfjax.study import clips, rows, work
from rfjax.study.clips import Values
from rfjax.study.rows import REFERENCE, ROWS, Study

DRIFT, FIRST, LAST, DYNAMIC = (
    "drift score",
    f"right, first {WINDOW} s",
    f"right, last {WINDOW} s",
    "dynamic degree",
)
NAMED = {  # what captions name: {it: the columns of whether it is right, at first and at last}
    name: tuple(f"{name} right, {when} {WINDOW} s" for when in ("first", "last"))
    for name in ("shape", "colour", "size", "motion", "background")
}
AIM = 0.25  # of the reference's drift: the hypothesis, fixed before any row was trained
OVER_TIME = (  # of the curves of a row those that are drawn
    "overlap with the named shape, %",
    "sharpness of the outline, 1/pixels",
    "dynamic degree, % of the object",
    "drift of the colour, ΔE",
    "drift of the radius, %",
    "drift of the background, ΔE",
)
Scores = dict[str, dict[int, list[dict[str, Any]]]]  # {row: {training seed: scores of its clips}}


def collect(study: Study) -> Scores:
    """The scores of all rows and seeds that are judged in the study's folder, asked for or not."""
    found: Scores = {}
    for name, seed in sorted(judged(study), key=lambda pair: pair[1]):
        job, method = rows.judge(study, name, seed), ROWS[name].method
        starts = range(0, study.prompts, study.batch)
        files = [job.folder / "batches" / f"{method}_{start:05d}.json" for start in starts]
        found.setdefault(name, {})[seed] = [keep.arrays(clip) for file in files for clip in keep.read(file)]
    return {name: found[name] for name in ROWS if name in found}


def judged(study: Study) -> set[tuple[str, int]]:
    """(row, training seed) of the finished judgings in the study's folder."""
    folders = (study.workdir / "judged").glob("*_*")
    named = (folder.name.rpartition("_") for folder in folders)
    pairs = {(name, int(seed)) for name, _, seed in named if name in ROWS and seed.isdecimal()}
    return {pair for pair in pairs if work.finished(rows.judge(study, *pair)) is not None}


def measures(clip: dict[str, Any]) -> dict[str, float]:
    """The numbers of one clip that the table is made of."""
    change = clip["change"]
    right = {
        name: float(np.mean(list(clip[part].values()))) for name, part in ((FIRST, "first"), (LAST, "last"))
    }
    moves = {"moving": change["moving"], DYNAMIC: float(np.mean(clip["level"][DYNAMIC]))}
    named = {
        column: float(clip[when].get(name, np.nan))  # a caption may leave out the size
        for name, columns in NAMED.items()
        for column, when in zip(columns, ("first", "last"), strict=True)
    }
    parts = {name: change["parts"][name] for name in drift.PARTS}
    return {DRIFT: change["score"]} | parts | right | moves | named


def values(found: Scores) -> Values:
    """The numbers of all clips."""
    return {
        name: {seed: clips.columns([measures(clip) for clip in some]) for seed, some in seeds.items()}
        for name, seeds in found.items()
    }


def figures(found: Values, against: str = REFERENCE) -> dict[str, dict[str, Any]]:
    """{row: its seeds, {measure: mean, standard error, mean of each seed}, ratios of means to those of the row `against`}."""
    tables = {name: _arrays(seeds) for name, seeds in found.items()}
    return {name: _row(name, found, tables, against) for name in found}


def _arrays(seeds) -> dict[str, np.ndarray]:
    """{measure: [seeds, prompts]}."""
    first, *_ = some = list(seeds.values())
    return {measure: np.stack([one[measure] for one in some]) for measure in first}


def _row(name: str, found: Values, tables, against: str) -> dict[str, Any]:
    row, seeds = ROWS[name], list(found[name])
    figures = {"title": row.title, "seeds": seeds, "paper's drift": row.paper, "measures": {}}
    figures |= {"named": {}, "against": against, "ratios": {}}
    shares = {column for columns in NAMED.values() for column in columns}
    for measure, scores in tables[name].items():
        if measure in shares:
            named = scores[~np.isnan(scores)]
            figures["named"][measure] = float(named.mean()) if named.size else np.nan
        else:
            mean, error = crossed_error(scores)
            figures["measures"][measure] = {"mean": mean, "error": error, "by seed": list(scores.mean(1))}
    common = [seed for seed in found.get(against, {}) if seed in seeds]
    if name == against or not common:
        return figures
    ours, theirs = ([list(found[one]).index(seed) for seed in common] for one in (name, against))
    for measure in (DRIFT, FIRST, DYNAMIC):
        ratio = bootstrap_ratio(tables[name][measure][ours], tables[against][measure][theirs])
        figures["ratios"][measure] = ratio._asdict() | {"seeds": len(common)}
    return figures


def text(study: Study, found: dict[str, dict[str, Any]], others: Collection[str] = ()) -> str:
    """The figures as Markdown; `others` are rows that were judged elsewhere."""
    if not found:
        return "Nothing is judged yet.\n"
    here = found.keys() & set(study.rows) - set(others)
    against = next(iter(found.values()))["against"]
    done = {(name, seed) for name in here for seed in found[name]["seeds"]}
    wanted = done | set(rows.pairs(study))
    few = _fewer(found)
    found = {
        name: row | {"title": row["title"] + r" \*" * (name in others) + " ¹" * (name in few)}
        for name, row in found.items()
    }
    parts = [
        f"{len(done)} of {len(wanted)} judged, each on {study.prompts} held-out captions × {study.seconds:g} s; "
        "mean ± standard error over training seeds and prompts.",
        r"\* judged elsewhere, with the same starts and captions" if others else "",
        _main_table(found),
        f"¹ the ratio is over the training seeds that the row and {ROWS[against].title} both have. Of one seed, errors and "
        "intervals are over captions alone."
        if few
        else "",
        "" if against in found else _unjudged(against),
        "The paper's drift is the change of imaging quality, another measure: its order of the rows is what compares.",
        "Parts of the drift score, 0 as rendered … 1 another scene; moving, 0 frozen … 1:",
        _table(["row", *drift.PARTS, "moving"], [_parts(row) for row in found.values()]),
        f"What captions name, right in % of the clips that name it, first → last {WINDOW} s:",
        _table(["row", *NAMED], [_named(row) for row in found.values()]),
        _hypothesis(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _fewer(found) -> set[str]:
    """The rows whose ratio leaves out training seeds, their own or those of the row that it is to."""
    against = next(iter(found.values()))["against"]
    theirs = len(found[against]["seeds"]) if against in found else 0
    return {
        name
        for name, row in found.items()
        if row["ratios"] and row["ratios"][DRIFT]["seeds"] < max(theirs, len(row["seeds"]))
    }


def _unjudged(against: str) -> str:
    """Why there are no ratios."""
    return (
        f"No ratios: {ROWS[against].title} is not judged; judge it too (--rows {against}), or give --beside a study that "
        "has it."
    )


def _main_table(found) -> str:
    head = [
        "row",
        DRIFT,
        f"ratio to {ROWS[next(iter(found.values()))['against']].title} (95 %)",
        f"{FIRST}, %",
        f"{LAST}, %",
        "dynamic degree, %",
        "seeds",
    ]
    lines = []
    for row in found.values():
        one, paper = row["measures"], row["paper's drift"]
        cells = [row["title"], _cell(one[DRIFT]), _ratio(row["ratios"].get(DRIFT))]
        cells += [_cell(one[FIRST], 100, ".1f"), _cell(one[LAST], 100, ".1f"), _cell(one[DYNAMIC], 1, ".0f")]
        lines.append([*cells, str(len(row["seeds"])), "–" if paper is None else f"{paper:g}"])
    return _table([*head, "the paper's drift"], lines)


def _parts(row) -> list[str]:
    return [row["title"], *(_cell(row["measures"][name]) for name in (*drift.PARTS, "moving"))]


def _named(row) -> list[str]:
    told = ([row["named"].get(column, np.nan) for column in columns] for columns in NAMED.values())
    cells = (f"{100 * first:.0f} → {100 * last:.0f}" if first == first else "–" for first, last in told)
    return [row["title"], *cells]


def _hypothesis(found) -> str:
    """The ratios of Rolling Forcing to the reference, each beside what was wanted of it."""
    ratios, against = (found.get(rows.BASE, {}).get(name) for name in ("ratios", "against"))
    if not ratios or against != REFERENCE:
        return ""
    drifts, first, moves = (ratios[name] for name in (DRIFT, FIRST, DYNAMIC))
    wanted = [
        (DRIFT, drifts, f"all of the interval ≤ {AIM}", drifts["high"] <= AIM),
        (FIRST, first, "not all of the interval < 1", first["high"] >= 1),
        (DYNAMIC, moves, "not all of the interval < 1", moves["high"] >= 1),
    ]
    lines = [
        [name, _ratio(ratio), want, "met" if met else "not met", str(ratio["seeds"])]
        for name, ratio, want, met in wanted
    ]
    title = f"The hypothesis: {ROWS[rows.BASE].title} against {ROWS[REFERENCE].title}, ratios of means"
    return f"{title}\n\n{_table(['measure', 'ratio (95 %)', 'wanted', 'so far', 'seeds'], lines)}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    first, *rest = (f"| {' | '.join(cells)} |" for cells in [head, *lines])
    return "\n".join([first, "|---" * len(head) + "|", *rest])


def _cell(one, scale: float = 1, form: str = ".3f") -> str:
    mean, error = scale * one["mean"], scale * one["error"]
    return f"{mean:{form}} ± {error:{form}}" if math.isfinite(error) else f"{mean:{form}}"


def _ratio(ratio) -> str:
    return Ratio(ratio["value"], ratio["low"], ratio["high"], ratio["below"]).text if ratio else "–"


def publish(study: Study, others: Values | None = None, against: str = REFERENCE) -> str:
    """Writes study.md, study.json and the pictures of the asked rows, clips.csv of all that is judged; the text of study.md.

    others: what was judged elsewhere, for the rows that are not judged here. against: the row to which ratios are given, which is
    shown where it is judged, asked for or not.
    """
    scores = collect(study)
    shown = dict.fromkeys((*study.rows, against))
    found, ours = {name: scores[name] for name in shown if name in scores}, values(scores)
    both = {name: ours[name] for name in found}
    both |= {name: ours.get(name, row) for name, row in (others or {}).items()}
    elsewhere = both.keys() - ours.keys()
    numbers = figures({name: both[name] for name in ROWS if name in both}, against)
    words = text(study, numbers, elsewhere)
    if not found:
        return words
    clips.write(study.workdir, ours)
    with replacing(study.workdir / "study.md") as path:
        path.write_text(words)
    keep.write(study.workdir / "study.json", numbers)
    _draw(study, found, numbers, elsewhere)
    return words


def _draw(study: Study, found: Scores, numbers, others: Collection[str] = ()) -> None:
    few = _fewer(numbers)
    scores = {
        row["title"] + " *" * (name in others) + " ¹" * (name in few): row["measures"][DRIFT]
        for name, row in numbers.items()
    }
    drifts = {title: (one["mean"], one["error"], one["by seed"]) for title, one in scores.items()}
    label = f"drift score after {study.seconds:g} s, ± standard error; a dot is a training seed"
    draw.bars(drifts, label, study.workdir / "drift.png")
    core = [name for name in found if ROWS[name].core]
    further = [name for name in found if not ROWS[name].core]
    for names, file in ((core, "by_second.png"), (further, "by_second_further.png")):
        if names:
            draw.curves({ROWS[name].title: _curves(found[name]) for name in names}, study.workdir / file)
    world = config.build(shapes.World, work.settings(), "world")
    times = np.linspace(0, study.seconds, draw.COLUMNS)
    for index in range(min(study.prompts, generate.SHOWN)):
        caption = shapes.caption(shapes.sample_scene(index, 0, world, "held_out"))
        strips = {
            ROWS[name].title: Image.open(_strip(study, name, min(found[name]), index)) for name in found
        }
        draw.sheet(strips, times, caption, study.workdir / f"sheet_{index}.png")


def _curves(seeds) -> dict[str, np.ndarray]:
    """{title: [clips of all seeds, S]}."""
    whole = report.curves([clip for clips in seeds.values() for clip in clips])
    return {title: whole[title] for title in OVER_TIME}


def _strip(study: Study, name: str, seed: int, index: int) -> Path:
    return generate.strip(rows.judge(study, name, seed).folder / "batches", ROWS[name].method, index)
