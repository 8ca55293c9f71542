"""Runs the commands of the study one after another, and notes what is done, so that it goes on where it was stopped."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rfjax import checkpoint, config, data, drift
from rfjax.errors import UserError
from rfjax.evaluate import keep
from rfjax.rollout import METHODS, RolloutConfig
from rfjax.stages import distill
from rfjax.study import rows
from rfjax.study.rows import Job, Study

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NUMBERS = ("prompts", "seconds", "batch", "steps")  # of a Study, which all its scores have in common
FREE = ("rolling_share", "scored_blocks", "rollout")  # what a row may change of the config BASE


def settings() -> Any:
    """The config BASE; UserError where it is not here."""
    path = rows.CONFIGS / f"{rows.BASE}.py"
    if not path.exists():
        raise UserError(f"There is no {path} here; run the study in the root of the repository.")
    return config.load(path)


def check(study: Study) -> list[Job]:
    """What is to be done, finished or not, in order.

    UserError where a config changes more than a row may, where a start is missing, or where the folder holds something else than
    this study would put there.
    """
    base = settings()
    check_rows(base)
    run = identity(study)
    keep.check(str(study.workdir), "--workdir")
    keep.claim(study.workdir, run)
    jobs = rows.jobs(study, base)
    for job in jobs:
        _check_finished(job)
    return jobs


def check_rows(base) -> None:
    """UserError where a row has no method or changes more of the config BASE than it may."""
    for row in rows.ROWS.values():
        if row.method not in METHODS:
            raise UserError(
                f"There is no method {row.method!r} of {row.title!r}; there are {', '.join(METHODS)}."
            )
    used = {name for row in rows.ROWS.values() for name in (row.config, row.trained)}
    for name in used - {rows.START}:
        _check_config(rows.CONFIGS / f"{name}.py", base)


def identity(study: Study) -> dict[str, Any]:
    """What all scores of a study have in common, as its folder notes it. UserError where a start is missing."""
    base = settings()
    for path in (base[field] for field in rows.STARTS):
        if not Path(path).is_file():
            raise UserError(
                f"There is no {path}, with which every training of the study begins; docs/drift.md says where it comes from."
            )
    contents = {f"contents of {base[field]}": data.fingerprint(base[field]) for field in rows.STARTS}
    return numbers(study) | contents


def numbers(study: Study) -> dict[str, Any]:
    """What all scores of a study have in common but for the files with which it begins."""
    return {name: getattr(study, name) for name in NUMBERS} | {"judge": drift.VERSION}


def noted(study: Study) -> dict[str, Any]:
    """The identity that the study's folder has noted; empty where nothing was begun."""
    note = study.workdir / keep.RUN
    return keep.read(note) if note.exists() else {}


def as_judged(study: Study) -> Study:
    """The study with the numbers that its folder was judged by; as it is where nothing was."""
    there = noted(study)
    return study._replace(**{name: there[name] for name in NUMBERS if name in there})


def _check_config(path: Path, base) -> None:
    """UserError unless this config is BASE but for the fields that a row may change, and distillation takes it."""
    found = config.load(path)
    ours, theirs = ({name: one[name] for name in one if name not in FREE} for one in (found, base))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"{path} has another {name} than {rows.BASE}.py, but a row of the study may change {', '.join(FREE)} alone"
                + ("; training seeds are given by --seeds." if name == "seed" else ".")
            )
    config.build(RolloutConfig, found, "rollout")
    distill.check_blocks(found)


def _check_finished(job: Job) -> None:
    """UserError where a finished job's weights or config are not those that it was done with."""
    if (done := finished(job)) is None:
        return
    for what, path in (("weights", job.weights / "dit.safetensors"), ("config", job.config)):
        if done[what] != _marks(job)[what]:
            raise UserError(
                f"{path} is not what {job.folder} was made with; put it back, or remove that folder and what was made with it."
            )


def _marks(job: Job) -> dict[str, str]:
    """What tells a job's weights and config from others."""
    fields = config.load(job.config).to_json_best_effort(sort_keys=True)
    return {
        "weights": data.fingerprint(job.weights / "dit.safetensors"),
        "config": hashlib.sha256(fields.encode()).hexdigest(),
    }


def finished(job: Job) -> dict[str, Any] | None:
    """What is noted of a job that is done, else None."""
    note = job.folder / "done.json"
    return keep.read(note) if note.exists() and (job.weights / "dit.safetensors").exists() else None


def seconds(study: Study, jobs: list[Job]) -> dict[str, float]:
    """{kind of job: how long one takes}: the mean of those done here from beginning to end, else as on 2 CPU cores."""
    steps = study.steps or settings().steps
    expected = {
        "train": rows.NOMINAL["step"] * steps,
        "judge": rows.NOMINAL["video"] * study.prompts * study.seconds,
    }
    for kind in expected:
        done = [finished(job) for job in jobs if job.kind == kind and "seed" in job.name]
        measured = [note["seconds"] for note in done if note and note["seconds"]]
        if measured:
            expected[kind] = sum(measured) / len(measured)
    return expected


def unfinished(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if finished(job) is None]


def outlook(study: Study, jobs: list[Job]) -> str:
    """How many are done, and how long the others will take."""
    todo, lasts = unfinished(jobs), seconds(study, jobs)
    hours = sum(lasts[job.kind] for job in todo) / 3600
    return (
        f"{len(jobs) - len(todo)} of {len(jobs)} trainings and judgings done, about {hours:.1f} hours to go"
    )


def run(study: Study, jobs: list[Job], after) -> bool:
    """Does what is not done; after() is called when a row was judged. Whether all came to its end, and no signal before."""
    todo, lasts = unfinished(jobs), seconds(study, jobs)
    whole = sum(lasts[job.kind] for job in todo)
    print(outlook(study, jobs), flush=True)
    with Commands(study.workdir / "log.txt") as command, tqdm(total=round(whole), unit=" s") as bar:
        for job in todo:
            bar.set_description(job.name)
            fresh, start = not job.folder.exists(), time.monotonic()
            if not all(
                command(words) and _whole(job, study, words) for words in job.commands
            ):  # none after a signal
                break
            took = round(time.monotonic() - start, 1) if fresh else None
            keep.write(job.folder / "done.json", _marks(job) | {"seconds": took})
            bar.update(round(lasts[job.kind]))
            if job.kind == "judge":
                after()
    return not command.stopped


def _whole(job: Job, study: Study, words: tuple[str, ...]) -> bool:
    """Whether a training made all its steps: one that a signal stops saves, and ends as if it had."""
    if "train.py" not in words:
        return True
    done, steps = int(checkpoint.newest(job.folder).name), study.steps or settings().steps
    if done < steps:
        raise UserError(
            f"{job.name} was stopped after step {done} of {steps}; run the same command to go on."
        )
    return True


class Commands:
    """Runs commands. A context: in it, Ctrl-C and its like reach the one that runs, and stop it as it stops, and none begins after.

    What a command prints goes to a log; its errors and bars stay where they are.
    """

    def __init__(self, log: Path):
        self.stopped, self._log, self._running = False, log, None

    def __enter__(self):
        heard = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]  # not under nohup
        self._before = {number: signal.signal(number, self._stop) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _stop(self, *_) -> None:
        self.stopped = True
        if self._running:
            self._running.terminate()  # not by SIGINT, which a job in the background may ignore

    def __call__(self, words: tuple[str, ...]) -> bool:
        """Whether the command came to its end; the exit code is its own where it did not, and has said why."""
        if self.stopped:
            return False
        with self._log.open("a") as log:
            print(f"\n$ {' '.join(words)}", file=log, flush=True)
            # A group of its own: else a terminal's Ctrl-C would reach it twice, and the second ends it at once.
            self._running = subprocess.Popen([sys.executable, *words[1:]], stdout=log, start_new_session=True)
            if self.stopped:  # between the first line and here
                self._stop()
            code = self._running.wait()
            self._running = None
        if code and not self.stopped:
            print(f"The command was: {' '.join(words)}", file=sys.stderr)
            sys.exit(code if code > 0 else 2)
        return not self.stopped
