"""The rows of the study, and the commands that train and judge each.

A row is the weights of one training, rolled out by one method. A training is a file of `configs/study`, which changes
`configs/shapes_distill.py` in what the row is about and in nothing else; every one begins with the same weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CONFIGS = Path("configs/study")
BASE = "rolling_forcing"  # the config that the others change
STARTS = ("init_from", "teacher", "critic_init", "vae_weights")  # its fields that name what is there before
START = "start"  # in place of a training: the student that every training begins with
NOMINAL = {
    "step": 4.5,
    "video": 0.1,
}  # seconds on 2 CPU cores: of a step of training, and of a second of judged video


class Row(NamedTuple):
    """One line of the table."""

    title: str
    trained: str  # the config whose training gives the weights, or START
    config: str  # the config by which they are rolled out
    method: str = "rolling"
    paper: float | None = None  # its drift in arXiv 2509.25161, on a scale of the paper's own
    core: bool = True  # with every training seed; else with the first of them


ROWS = {  # in the order of work
    "rolling_forcing": Row("Rolling Forcing", BASE, BASE, paper=0.49),
    "self_forcing": Row(
        "Self Forcing as published", "self_forcing", "self_forcing", "self_forcing", paper=14.4
    ),
    "no_rolling_inference": Row("no rolling inference", BASE, BASE, "self_forcing", paper=5.53),
    "no_sink": Row("no sink", "no_sink", "no_sink", paper=4.63),
    "no_rolling_training": Row(
        "no rolling training", "no_rolling_training", "no_rolling_training", paper=0.89
    ),
    "no_self_forcing_training": Row(
        "no Self-Forcing training", "no_self_forcing_training", "no_self_forcing_training", paper=1.62
    ),
    "self_forcing_with_sink": Row(
        "Self Forcing with a sink", "no_rolling_training", "no_rolling_training", "self_forcing"
    ),
    "ode_initialisation": Row("ODE initialisation only", START, BASE, core=False),
    "window_3": Row("window of 3", "window_3", "window_3", core=False),
    "window_7": Row("window of 7, span of 27", "window_7", "window_7", core=False),
    "sink_2": Row("sink of 2", "sink_2", "sink_2", core=False),
    "span_15": Row("span of 15, window of 3", "span_15", "span_15", core=False),
    "span_27": Row("span of 27", BASE, "span_27", core=False),
}
REFERENCE = "self_forcing"  # the row that the others are compared with
SEEDS = (0, 1, 2)


class Study(NamedTuple):
    """What is run, and where."""

    workdir: Path
    rows: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = SEEDS  # training seeds of a core row
    prompts: int = 64
    seconds: float = 120
    batch: int = 16
    steps: int | None = None  # of a training; None: those of its config


class Job(NamedTuple):
    """Commands that make a folder: a training and its weights, or the scores of a row."""

    name: str
    kind: str  # "train" or "judge"
    folder: Path
    weights: Path  # the folder of weights that it makes, or judges
    config: Path
    commands: tuple[tuple[str, ...], ...]


def pairs(study: Study) -> Iterator[tuple[str, int]]:
    """(row, training seed) in the order of work: a seed of all core rows after another, then the rows of one seed.

    What is rolled out as every training begins is 0, whatever seeds are asked for: it is the same weights for all.
    """
    core = [name for name in study.rows if ROWS[name].core]
    yield from ((name, seed) for seed in study.seeds for name in core)
    further = [name for name in study.rows if not ROWS[name].core]
    yield from ((name, 0 if ROWS[name].trained == START else study.seeds[0]) for name in further)


def judge(study: Study, name: str, seed: int) -> Job:
    """The rollouts of a row's weights, and their scores."""
    row, folder = ROWS[name], study.workdir / "judged" / f"{name}_{seed}"
    weights, config = weights_of(study, row.trained, seed), CONFIGS / f"{row.config}.py"
    command = ["python", "-m", "rfjax.evaluate", "--config", str(config), "--weights", str(weights)]
    command += ["--methods", row.method, "--prompts", str(study.prompts), "--seconds", f"{study.seconds:g}"]
    command += ["--batch", str(study.batch), "--out", str(folder)]
    return Job(f"judge {name}, seed {seed}", "judge", folder, weights, config, (tuple(command),))


def train(study: Study, name: str, seed: int, settings) -> Job:
    """A training by a config, and its weights as they would be shipped; of START only the latter. settings: those of BASE."""
    weights, config = weights_of(study, name, seed), CONFIGS / f"{BASE if name == START else name}.py"
    if name == START:
        folder, result, commands = weights, settings.init_from, []
    else:
        folder = study.workdir / "trained" / f"{name}_{seed}"
        result = folder / "dit.safetensors"
        command = ["python", "train.py", "--config", str(config), "--workdir", str(folder)]
        command += [f"--config.seed={seed}", "--config.keep=1"]
        commands = [(*command, *([f"--config.steps={study.steps}"] if study.steps else []))]
    commands.append(("python", "-m", "rfjax.release", settings.vae_weights, str(result), str(weights)))
    told = "the start's weights" if name == START else f"train {name}, seed {seed}"
    return Job(told, "train", folder, weights, config, tuple(commands))


def weights_of(study: Study, name: str, seed: int) -> Path:
    """The folder of weights of a training, or of START."""
    return study.workdir / "weights" / (START if name == START else f"{name}_{seed}")


def jobs(study: Study, settings) -> list[Job]:
    """All that is to be done, in order: what a row needs comes before it, and once."""
    order = {}
    for name, seed in pairs(study):
        for job in (train(study, ROWS[name].trained, seed, settings), judge(study, name, seed)):
            order.setdefault(job.folder, job)
    return list(order.values())
