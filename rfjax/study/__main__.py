"""Does Rolling Forcing hold where Self Forcing drifts? Trains and judges the rows of the study (docs/drift.md, "The study").

    python -m rfjax.study            # all rows in order; stopped and run again, it goes on
    python -m rfjax.study --list     # the rows, their commands, and what is done
    python -m rfjax.study --table    # the table and the pictures of what is finished, and nothing else
    python -m rfjax.study --rows no_sink --beside docs/logs/study    # one row anew, in a table with the published ones
    python -m rfjax.study --rows rolling_forcing,self_forcing --seeds 0 --prompts 8 --seconds 20 --steps 10 --workdir runs/try

Run it in the root of the repository, after docs/small_world.md up to the ODE initialisation.
"""

import argparse
import difflib
import functools
import shlex
from pathlib import Path

from rfjax.errors import Parser, UserError, exit_cleanly
from rfjax.score import WINDOW
from rfjax.study import clips, rows, table, work
from rfjax.study.rows import Study


def parse(argv) -> argparse.Namespace:
    parser = Parser(
        prog="python -m rfjax.study",
        description=__doc__,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="tell the rows, their commands, and what is done")
    what.add_argument("--table", action="store_true", help="only make the table and the pictures")
    add("--rows", default=",".join(rows.ROWS), help="some of them, by commas (default all)")
    seeds = ",".join(map(str, rows.SEEDS))
    add(
        "--seeds",
        default=seeds,
        help="training seeds, by commas (default %(default)s); a row that is not core has the first alone",
    )
    add("--prompts", type=int, default=64, metavar="N", help="held-out captions (default %(default)s)")
    add("--seconds", type=float, default=120.0, help="length of the clips (default %(default)g)")
    add("--batch", type=int, default=16, help="clips rolled out together (default %(default)s)")
    add("--steps", type=int, help="of every training (default: as its config says)")
    add(
        "--beside",
        metavar="DIR",
        help="a study judged elsewhere (clips.csv, run.json): rows for the same table",
    )
    add(
        "--against",
        default=rows.REFERENCE,
        metavar="ROW",
        help="to which the table gives the ratios (default %(default)s)",
    )
    add("--workdir", default="runs/study", metavar="DIR", help="where all of it goes (default %(default)s)")
    return parser.parse_args(argv)


def asked(args) -> Study:
    """The study of the flags; UserError for rows and numbers that cannot be."""
    names = tuple(dict.fromkeys(args.rows.split(",")))
    for name in (*names, args.against):
        if name not in rows.ROWS:
            near = difflib.get_close_matches(name, rows.ROWS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(rows.ROWS)}."
            raise UserError(f"There is no row {name!r}; {hint}")
    seeds = args.seeds.split(",")
    if not all(seed.isdecimal() and int(seed) < 2**31 for seed in seeds):
        raise UserError(f"--seeds takes whole numbers from 0 by commas, such as 0,1,2, not {args.seeds!r}.")
    counts = args.prompts, args.batch, args.steps or 1
    if min(counts) < 1 or args.steps == 0 or not 2 * WINDOW <= args.seconds < float("inf"):
        raise UserError(
            f"Need one or more of --prompts, --batch and --steps, and --seconds of {2 * WINDOW} or more."
        )
    numbers = args.prompts, args.seconds, args.batch, args.steps
    return Study(Path(args.workdir), names, tuple(dict.fromkeys(map(int, seeds))), *numbers)


def told(study: Study) -> str:
    """The rows, what is done of each, and its commands."""
    base, lines = work.settings(), []
    work.check_rows(base)
    for name, seed in rows.pairs(study):
        row = rows.ROWS[name]
        jobs = rows.train(study, row.trained, seed, base), rows.judge(study, name, seed)
        trained, judged = (work.finished(job) is not None for job in jobs)
        state = "judged" if judged else "trained" if trained else "not begun"
        lines.append(f"{name}, seed {seed} ({row.title}): {state}")
        lines += [f"    {shlex.join(words)}" for job in jobs for words in job.commands]
    return "\n".join([*lines, work.outlook(study, rows.jobs(study, base))])


def elsewhere(study: Study, folder: Path, only_table: bool) -> clips.Values:
    """What the study in another folder has judged; UserError where it cannot stand beside this one."""
    if run := work.noted(study):
        return clips.beside(folder, run)
    if (
        only_table
    ):  # nothing is judged here, and nothing will be: it need not have begun with the files that are here
        return clips.beside(folder, work.numbers(study), alone=True)
    return clips.beside(folder, work.identity(study))


@exit_cleanly
def main(argv=None) -> None:
    args = parse(argv)
    study = asked(args)
    if args.list:
        print(told(study))
        return
    study = work.as_judged(study) if args.table else study
    others = elsewhere(study, Path(args.beside), args.table) if args.beside else {}
    after = functools.partial(table.publish, study, others, args.against)
    if not args.table and not work.run(study, work.check(study), after):
        print("Stopped; run the same command to go on.")
        return
    print(after())


if __name__ == "__main__":
    main()
