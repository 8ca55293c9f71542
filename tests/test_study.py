"""The study: its configs, its order, runs that are stopped and go on, its table against naive sums, and what it refuses.

Commands are stood in for: a training writes what its seed and config say, a model shows a picture of its weights, and the judge
reads its scores from that picture. Folders, batches and the evaluation's own loop are the real ones.
"""

import functools
import json
import os
import signal
import threading
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from rfjax import cache, config, data, drift, sampler, shapes
from rfjax.evaluate import __main__ as evaluate
from rfjax.evaluate import draw, generate, report
from rfjax.score import score
from rfjax.stages import distill
from rfjax.study import __main__ as command
from rfjax.study import clips, rows, table, work
from rfjax.study.rows import ROWS, Study

DRAW = table._draw
CONFIGS = Path(__file__).parents[1] / "configs" / "study"
RUN = ["--rows", "rolling_forcing,self_forcing,ode_initialisation", "--seeds", "0,1"]
RUN += ["--prompts", "3", "--seconds", "10", "--batch", "2"]
SMALL = Study(Path("runs/study"), tuple(RUN[1].split(",")), seeds=(0, 1), prompts=3, seconds=10, batch=2)


# ---------------------------------------------------------------------------------------------------------- configs


def flat(settings):
    return {
        f"{name}.{field}" if field else name: value
        for name, section in settings.to_dict().items()
        for field, value in (section.items() if isinstance(section, dict) else [("", section)])
    }


@pytest.mark.parametrize(
    "name, changes",
    {
        "rolling_forcing": {},
        "self_forcing": {"rolling_share": 0.0, "rollout.sink_blocks": 0},
        "no_sink": {"rollout.sink_blocks": 0},
        "no_rolling_training": {"rolling_share": 0.0},
        "no_self_forcing_training": {"rolling_share": 1.0},
        "sink_2": {"rollout.sink_blocks": 2},
        "window_3": {"rollout.steps": (1000, 600, 200)},
        "span_15": {"rollout.steps": (1000, 600, 200), "rollout.span_blocks": 5},
        "window_7": {"rollout.steps": (1000, 800, 600, 500, 400, 300, 200), "rollout.span_blocks": 9},
        "span_27": {"rollout.span_blocks": 9},
    }.items(),
)
def test_a_config_changes_what_its_row_is_about_and_distillation_takes_it(name, changes):
    found, base = config.load(CONFIGS / f"{name}.py"), config.load(CONFIGS.parent / "shapes_distill.py")
    distill.steps(found)
    found, base = flat(found), flat(base)
    differs = {field: value for field, value in found.items() if base.get(field, "none") != value}
    if "rollout.span_blocks" in changes:
        changes |= {"rollout.ring_blocks": changes["rollout.span_blocks"], "scored_blocks": 7}
    assert differs == changes and base.keys() <= found.keys()


def test_every_config_is_of_a_row():
    used = {name for row in ROWS.values() for name in (row.config, row.trained)} - {rows.START}
    assert {path.stem for path in CONFIGS.glob("*.py")} == used


def test_a_longer_span_changes_nothing_in_a_clip_of_the_span():
    """Why the span of 27 frames takes weights that were trained with 21: on clips of 21 every call sees the same keys."""

    windows = [(max(0, i - 4), min(i, 6)) for i in range(11)] + [(block, block) for block in range(7)]

    def seen(span):
        """Positions of the keys of every call of a clip of 7 blocks, by windows of 5 and by single blocks."""

        def reads():
            made = cache.init(cache.CacheConfig(1, 9, span), tiny.CONFIG, 1, 1)
            made = made.replace(
                block=jnp.arange(10, dtype=jnp.int32)
            )  # all that a call may look for is there
            pasts = [cache.read_denoise(made, jnp.int32(a), z - a + 1, 1, steady=False) for a, z in windows]
            pasts += [cache.read_clean(made, jnp.int32(block), 1, steady=False) for block in range(7)]
            return [(past.positions, past.valid) for past in pasts]

        return [np.asarray(positions)[np.asarray(valid)].tolist() for positions, valid in jax.jit(reads)()]

    assert seen(9) == seen(7) != seen(6)
    assert seen(7)[6] == [0, 1]  # window 2 … 6: the sink, just before block 1


# ------------------------------------------------------------------------------------------------------------ order


def test_seeds_come_one_after_another_and_rows_of_one_seed_last():
    core = [name for name, row in ROWS.items() if row.core]
    further = [name for name, row in ROWS.items() if not row.core]
    assert core[:2] == ["rolling_forcing", "self_forcing"]
    wanted = [(name, seed) for seed in range(3) for name in core] + [(name, 0) for name in further]
    assert list(rows.pairs(Study(Path("runs/study")))) == wanted
    own = Study(Path("runs/study"), ("sink_2", "no_sink"), (7, 11))
    assert list(rows.pairs(own)) == [("no_sink", 7), ("no_sink", 11), ("sink_2", 7)]
    start = Study(Path("runs/study"), ("ode_initialisation",), (7,))  # the same weights, whatever the seed
    assert list(rows.pairs(start)) == [("ode_initialisation", 0)]


def test_what_a_row_needs_comes_before_it_and_once():
    jobs = rows.jobs(Study(Path("runs/study")), config.load(CONFIGS / "rolling_forcing.py"))
    made = set()
    for job in jobs:
        assert job.folder not in made
        assert job.kind == "train" or job.weights in made
        made |= {job.folder, job.weights} if job.kind == "train" else {job.folder}
    core, further = ([row for row in ROWS.values() if row.core is core] for core in (True, False))
    assert sum(job.kind == "judge" for job in jobs) == 3 * len(core) + len(further)
    trained = {row.trained for row in core}
    alone = {row.trained for row in further} - trained - {rows.START}
    assert sum(job.commands[0][1] == "train.py" for job in jobs) == 3 * len(trained) + len(alone)


# ------------------------------------------------------------------------------------------------- commands, stood in


class Model:
    """A sampler's stand-in: every frame has the one grey level that its weights and method give it."""

    video = sampler.VideoConfig(64, 64, 16)

    def __init__(self, weights: bytes, stop_at=None):
        self.params, self.stop_at, self.asked = {"dit": np.frombuffer(weights, np.uint8)}, stop_at, 0

    def encode(self, frames):
        return list(frames)

    def latent_frames(self, frames):
        return frames

    def latents(self, captions, seed, count, method, past):
        self.asked += 1
        if self.asked == self.stop_at:
            raise KeyboardInterrupt
        level = zlib.crc32(self.params["dit"].tobytes() + method.encode()) % 256
        yield np.full((len(captions), count, 64, 64, 3), level, np.uint8)

    def decode(self, blocks):
        yield from blocks


class Commands(work.Commands):
    """Runs the commands in this process; the one of number `stop_at` is stopped half-way, as a signal would stop it."""

    steps = 100  # that a training makes

    def __init__(self, stop_at=None):
        self.asked, self.stop_at, self.stopped = [], stop_at, False

    def __call__(self, words):
        if self.stopped:
            return False
        self.asked.append(words)
        self.stopped = len(self.asked) == self.stop_at
        what = words[1] if words[1] != "-m" else words[2]
        {"train.py": self.train, "rfjax.release": self.release, "rfjax.evaluate": self.judge}[what](words)
        return not self.stopped

    def train(self, words):
        flags = dict(zip(words[2::2], words[3::2], strict=False))
        folder = Path(flags["--workdir"])
        folder.mkdir(parents=True, exist_ok=True)
        if not self.stopped:
            told = f"{Path(flags['--config']).stem} {[word for word in words if 'seed' in word]}"
            (folder / "dit.safetensors").write_text(told)
            (folder / "checkpoints" / str(self.steps)).mkdir(parents=True, exist_ok=True)

    def release(self, words):
        vae, dit, folder = map(Path, words[3:])
        folder.mkdir(parents=True, exist_ok=True)
        for path in [vae] if self.stopped else [vae, dit]:
            (folder / path.name).write_bytes(path.read_bytes())

    def judge(self, words):
        weights = Path(words[words.index("--weights") + 1])
        model = Model((weights / "dit.safetensors").read_bytes(), 2 if self.stopped else None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "load", lambda *_, **__: model)
            patch.setattr(generate, "score", scored)
            patch.setattr(draw, "curves", lambda *_: None)
            try:
                evaluate.main.__wrapped__(list(words[3:]))
            except KeyboardInterrupt:
                assert self.stopped


@functools.cache
def template():
    """The score of a rendered clip of 10 s, whose numbers are replaced by others."""
    scene = shapes.sample_scene(0, split="held_out")
    return score(shapes.render(scene, 0, 160), shapes.caption(scene))


def scored(video, caption, fps):
    """Scores that the picture's level and the caption give."""
    one, rng = template(), np.random.default_rng([video[0, 0, 0, 0], zlib.crc32(caption.encode())])
    parts = {name: rng.uniform() for name in one["change"]["parts"]}
    change = {"score": rng.uniform(0.1, 1), "parts": parts, "moving": rng.uniform()}
    right = {part: {name: bool(rng.integers(2)) for name in one["first"]} for part in ("first", "last")}
    return (
        one | right | {"change": change, "level": one["level"] | {"dynamic degree": rng.uniform(10, 90, 10)}}
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in with all that the study begins with. Nothing is drawn, which takes longer than all the rest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "_draw", lambda *_: None)
    monkeypatch.setattr(rows, "CONFIGS", CONFIGS)
    base = config.load(CONFIGS / "rolling_forcing.py")
    for field in rows.STARTS:
        Path(base[field]).parent.mkdir(parents=True, exist_ok=True)
        Path(base[field]).write_text(base[field])
    return tmp_path


def run(monkeypatch, *more, stop_at=None, flags=RUN):
    """The command with commands that are stood in for; what it asked of them."""
    commands = Commands(stop_at)
    with monkeypatch.context() as patch:
        patch.setattr(work, "Commands", lambda log: commands)
        command.main([*flags, *more])
    return commands.asked


def results(folder):
    """{file: bytes} of a study, without the times that it took."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if not name.endswith("done.json")}


# ------------------------------------------------------------------------------------------------------ runs that go on


def test_a_stopped_study_goes_on_and_ends_as_one_that_was_not_stopped(place, monkeypatch, capsys):
    """Stopped in a training, in the release of its weights, and in the second batch of an evaluation."""
    whole = run(monkeypatch, "--workdir", "whole")
    assert len(whole) == 4 * 3 + 2  # two trainings of two seeds, each released and judged, and the start
    asked = [run(monkeypatch, "--workdir", "stopped", stop_at=number) for number in (1, 5, 3)]
    assert capsys.readouterr().out.count("Stopped; run the same command to go on.") == 3
    kept = sorted(path.name for path in (place / "stopped/judged/self_forcing_0/batches").glob("*.json"))
    assert kept == ["self_forcing_00000.json"]
    asked.append(run(monkeypatch, "--workdir", "stopped"))
    named = [[" ".join(words).replace("stopped/", "whole/") for words in some] for some in asked]
    wanted = [" ".join(words) for words in whole]
    assert named == [wanted[:1], wanted[:5], wanted[3:6], wanted[5:]]
    assert results(place / "stopped") == results(place / "whole")
    assert run(monkeypatch, "--workdir", "stopped") == []


def test_the_table_has_the_numbers_that_the_folder_was_judged_by(place, monkeypatch, capsys):
    run(monkeypatch, "--workdir", "study")
    table, was = place / "study/study.md", capsys.readouterr().out
    judged = table.read_text()
    assert "3 held-out captions × 10 s" in judged
    assert (
        run(monkeypatch, "--table", "--workdir", "study", flags=RUN[:4]) == []
    )  # without --prompts, --seconds, --batch
    assert table.read_text() == judged and judged.strip() in was


def test_a_training_that_alone_was_stopped_is_not_taken_for_done(place, monkeypatch, capsys):
    """It saves, and ends with exit code 0."""
    with monkeypatch.context() as patch:
        patch.setattr(Commands, "steps", 50)
        with pytest.raises(SystemExit):
            run(monkeypatch, "--workdir", "study")
    assert "was stopped after step 50 of 100; run the same command to go on" in capsys.readouterr().err
    assert not list((place / "study").glob("weights/*_0/*.safetensors")) and not list(
        (place / "study/trained").rglob("done.json")
    )
    whole = run(monkeypatch, "--workdir", "study")
    assert "train.py" in whole[0] and "rfjax.release" in whole[1]


def test_a_signal_reaches_the_command_and_nothing_begins_after_it(tmp_path):
    waits = "import pathlib, signal, sys, time\n"
    waits += "def stop(*_): pathlib.Path('stopped').touch(); sys.exit(0)\n"
    waits += "signal.signal(signal.SIGTERM, stop); pathlib.Path('ready').touch(); time.sleep(60)"
    place, before = str(tmp_path), signal.getsignal(signal.SIGTERM)

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    said = f"import os; os.chdir({place!r}); print('said')"
    with work.Commands(tmp_path / "log.txt") as commands:
        assert commands(("python", "-c", said)) is True
        threading.Thread(target=interrupt).start()
        assert commands(("python", "-c", f"import os; os.chdir({place!r})\n{waits}")) is False
        assert commands(("python", "-c", "raise SystemExit(3)")) is False  # not begun
    assert (tmp_path / "stopped").exists() and commands.stopped
    assert "\nsaid\n" in (tmp_path / "log.txt").read_text()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_that_fails_ends_the_study_with_its_code(tmp_path, capsys):
    with work.Commands(tmp_path / "log.txt") as commands, pytest.raises(SystemExit) as left:
        commands(("python", "-c", "raise SystemExit(3)"))
    assert left.value.code == 3 and "The command was: python -c" in capsys.readouterr().err


def test_time_to_go_is_by_what_was_measured_here(place, monkeypatch):
    run(monkeypatch)
    jobs = rows.jobs(SMALL, work.settings())
    for number, job in enumerate(jobs, 1):
        note = job.folder / "done.json"
        note.write_text(json.dumps(json.loads(note.read_text()) | {"seconds": 10.0 * number}))
    judged = [10.0 * number for number, job in enumerate(jobs, 1) if job.kind == "judge"]
    trained = [10.0 * number for number, job in enumerate(jobs, 1) if job.name.startswith("train ")]
    assert work.seconds(SMALL, jobs) == {"train": np.mean(trained), "judge": np.mean(judged)}
    other = rows.jobs(SMALL._replace(workdir=Path("none")), work.settings())
    assert work.seconds(SMALL, other) == pytest.approx({"train": 100 * 4.5, "judge": 3 * 10 * 0.1})


def test_the_list_tells_commands_and_what_is_done(place, monkeypatch, capsys):
    run(monkeypatch, stop_at=6)
    capsys.readouterr()
    command.main([*RUN, "--list"])
    *lines, outlook = capsys.readouterr().out.splitlines()
    assert outlook.startswith(
        f"3 of {len(rows.jobs(SMALL, work.settings()))} trainings and judgings done, about "
    )
    states = {line.split(" (")[0]: line.split(": ")[1] for line in lines if not line.startswith(" ")}
    assert states == {
        "rolling_forcing, seed 0": "judged",
        "self_forcing, seed 0": "trained",
        "rolling_forcing, seed 1": "not begun",
        "self_forcing, seed 1": "not begun",
        "ode_initialisation, seed 0": "not begun",
    }
    told = [line.strip() for line in lines if line.startswith(" ")]
    assert told == [" ".join(words) for job in rows.jobs(SMALL, work.settings()) for words in job.commands]
    train = (
        "train.py --config {} --workdir runs/study/trained/rolling_forcing_1 --config.seed=1 --config.keep=1"
    )
    assert f"python {train.format(CONFIGS / 'rolling_forcing.py')}" in told


# ------------------------------------------------------------------------------------------------------------ table


def test_the_table_is_what_naive_sums_give(place, monkeypatch, capsys):
    run(monkeypatch, "--seeds", "0")
    run(monkeypatch, "--rows", "rolling_forcing")  # its second seed: the reference has one
    numbers = json.loads(Path("runs/study/study.json").read_text())
    assert list(numbers) == ["rolling_forcing", "self_forcing"]  # which is judged, though not asked for
    capsys.readouterr()
    command.main([*RUN, "--table"])
    text, numbers = capsys.readouterr().out, json.loads(Path("runs/study/study.json").read_text())
    assert Path("runs/study/study.md").read_text() == text.removesuffix("\n")

    clips = {}
    for name, seed in (("rolling_forcing", 0), ("rolling_forcing", 1), ("self_forcing", 0)):
        kept = json.loads(Path(f"runs/study/judged/{name}_{seed}/report.json").read_text())
        clips[name, seed] = kept[ROWS[name].method]["clips"]
    drifts = {key: [clip["change"]["score"] for clip in some] for key, some in clips.items()}
    ours, theirs = drifts["rolling_forcing", 0], drifts["self_forcing", 0]
    both = np.array([ours, drifts["rolling_forcing", 1]])
    error = np.sqrt(both.mean(1).var(ddof=1) / 2 + both.mean(0).var(ddof=1) / 3)
    row = numbers["rolling_forcing"]
    assert row["seeds"] == [0, 1] and row["paper's drift"] == 0.49
    told = row["measures"]["drift score"]
    np.testing.assert_allclose(
        [told["mean"], told["error"], *told["by seed"]], [both.mean(), error, *both.mean(1)]
    )
    assert row["ratios"]["drift score"]["value"] == pytest.approx(sum(ours) / sum(theirs))
    assert row["ratios"]["drift score"]["seeds"] == 1
    right = np.mean([np.mean(list(clip["first"].values())) for clip in clips["self_forcing", 0]])
    assert numbers["self_forcing"]["measures"]["right, first 5 s"]["mean"] == pytest.approx(right)
    assert numbers["self_forcing"]["ratios"] == {}
    shares = [
        np.mean([clip[when]["shape"] for clip in clips["self_forcing", 0]]) for when in ("first", "last")
    ]
    named = numbers["self_forcing"]["named"]
    assert [named["shape right, first 5 s"], named["shape right, last 5 s"]] == pytest.approx(shares)
    assert f"| Self Forcing as published | {100 * shares[0]:.0f} → {100 * shares[1]:.0f} |" in text
    assert f"| Rolling Forcing ¹ | {both.mean():.3f} ± {error:.3f} | {sum(ours) / sum(theirs):.2f} (" in text
    assert "| ODE initialisation only | " in text and "4 of 5 judged" in text


def test_the_table_has_seeds_that_are_judged_and_not_asked_for(place, monkeypatch, capsys):
    run(monkeypatch, "--rows", "self_forcing", "--seeds", "11,0")
    run(monkeypatch, "--rows", "rolling_forcing", "--seeds", "11")
    lines = Path("runs/study/clips.csv").read_text().splitlines()[1:]
    judged = {tuple(line.split(",")[:2]) for line in lines}
    assert judged == {("self_forcing", "0"), ("self_forcing", "11"), ("rolling_forcing", "11")}
    capsys.readouterr()
    command.main([*RUN, "--table"])
    assert "3 of 7 judged" in capsys.readouterr().out  # five that are asked for, and seed 11 of two rows
    numbers = json.loads(Path("runs/study/study.json").read_text())
    assert {name: row["seeds"] for name, row in numbers.items()} == {
        "rolling_forcing": [11],
        "self_forcing": [0, 11],
    }
    assert numbers["rolling_forcing"]["ratios"]["drift score"]["seeds"] == 1


def test_ratios_to_another_row(place, monkeypatch, capsys):
    run(monkeypatch)
    first = json.loads(Path("runs/study/study.json").read_text())
    capsys.readouterr()
    command.main([*RUN, "--table", "--against", "rolling_forcing"])
    said, numbers = capsys.readouterr().out, json.loads(Path("runs/study/study.json").read_text())
    assert "| ratio to Rolling Forcing (95 %) |" in said and "The hypothesis" not in said
    there, back = (
        one["ratios"]["drift score"]["value"] for one in (first["rolling_forcing"], numbers["self_forcing"])
    )
    assert there * back == pytest.approx(1) and numbers["rolling_forcing"]["ratios"] == {}
    assert "There is no row 'rolling'" in fails(capsys, "--table", "--against", "rolling")
    for asked, against in (("rolling_forcing,no_sink", "self_forcing"), ("rolling_forcing", "window_3")):
        command.main([*RUN, "--rows", asked, "--table", "--against", against])
        said = capsys.readouterr().out
        assert (
            ("| Self Forcing as published |" in said)
            == ("No ratios" not in said)
            == (against == "self_forcing")
        )
    assert "No ratios: window of 3 is not judged; judge it too (--rows window_3)" in said


def test_what_a_caption_does_not_name_counts_in_no_share():
    clips = [json.loads(json.dumps(evaluate.keep.plain(template()))) for _ in range(3)]
    for clip, right in zip(clips, (True, False, None), strict=True):
        for part in ("first", "last"):
            clip[part] = {"shape": True} | ({} if right is None else {"size": right})
    found = table.figures(table.values({"no_sink": {0: clips}}))
    assert found["no_sink"]["named"]["size right, last 5 s"] == 0.5
    assert "| no sink | 100 → 100 | – | 50 → 50 | – | – |" in table.text(Study(Path("none")), found)


@pytest.mark.parametrize(
    "ours, drift, quality", [(0.1, "met", "met"), (0.2, "not met", "met"), (0.1, "met", "not met")]
)
def test_the_hypothesis_is_met_by_whole_intervals(ours, drift, quality):
    """Rolling Forcing has the share `ours` of the reference's drift in every clip, give or take."""
    clips = [json.loads(json.dumps(evaluate.keep.plain(template()))) for _ in range(8)]
    found = {}
    for name, share in (("rolling_forcing", ours), ("self_forcing", 1)):
        for number, clip in enumerate(clips):
            clip["change"]["score"] = 0.5 * share * (1 + 0.5 * (-1) ** number * (name == "rolling_forcing"))
            worse = quality == "not met" and name == "rolling_forcing"
            clip["first"] = dict.fromkeys(clip["first"], not worse or number == 0)
        found[name] = {0: json.loads(json.dumps(clips))}
    text = table.text(Study(Path("none")), table.figures(table.values(found)))
    lines = [line.split(" | ") for line in text.split("The hypothesis")[1].splitlines() if "met" in line]
    assert [line[3] for line in lines] == [drift, quality, "met"]


def test_a_row_stands_beside_those_of_a_study_elsewhere(place, monkeypatch, capsys):
    """Its clips.csv and run.json are enough; a row that is judged here is taken from here."""
    run(monkeypatch, "--workdir", "whole")
    run(monkeypatch, "--workdir", "elsewhere", "--rows", "self_forcing,ode_initialisation")
    for path in Path("elsewhere").rglob("*"):
        if path.is_file() and path.name not in ("clips.csv", "run.json"):
            path.unlink()
    lines = Path("elsewhere/clips.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 + 3 and lines[0].startswith("row,seed,clip,drift score,colour,")
    capsys.readouterr()
    run(
        monkeypatch,
        "--workdir",
        "here",
        "--rows",
        "ode_initialisation,rolling_forcing",
        "--beside",
        "elsewhere",
    )
    said = capsys.readouterr().out
    assert "| Self Forcing as published \\* |" in said and "| ODE initialisation only ¹ |" in said
    assert "3 of 3 judged" in said and r"\* judged elsewhere" in said
    here, whole = (json.loads(Path(folder, "study.json").read_text()) for folder in ("here", "whole"))
    assert list(here) == list(whole)
    for name, row in whole.items():
        for measure, told in row["measures"].items():
            assert here[name]["measures"][measure]["by seed"] == pytest.approx(told["by seed"], rel=1e-5)
        for measure, told in row["ratios"].items():
            assert here[name]["ratios"][measure] == pytest.approx(told, rel=1e-5)
    assert "self_forcing" not in Path("here/clips.csv").read_text()


def test_the_published_study_can_stand_beside_one_from_the_files_in_the_repository():
    root = CONFIGS.parents[1]
    base = config.load(CONFIGS / "rolling_forcing.py")
    shipped = {
        base.init_from: "weights/shapes_ode.safetensors",
        base.teacher: "weights/shapes_teacher.safetensors",
        base.critic_init: "weights/shapes_teacher.safetensors",
        base.vae_weights: "rfjax/assets/shapes/vae.safetensors",
    }
    run = {name: getattr(Study(Path("none")), name) for name in work.NUMBERS} | {"judge": drift.VERSION}
    run |= {f"contents of {path}": data.fingerprint(root / file) for path, file in shipped.items()}
    published = clips.beside(root / "docs/logs/study", run)
    told = table.figures(published)
    assert list(told) == list(json.loads((root / "docs/logs/study/study.json").read_text()))
    text = (root / "docs/logs/study/study.md").read_text()
    for name, row in told.items():
        title = row["title"] + " ¹" * (len(row["seeds"]) < 3)
        assert f"| {title} | {row['measures']['drift score']['mean']:.3f} ± " in text
        assert (name in table._fewer(told)) == (len(row["seeds"]) < 3)


def test_a_study_elsewhere_that_does_not_fit_is_refused(place, monkeypatch, capsys):
    run(monkeypatch, "--workdir", "elsewhere", "--rows", "self_forcing")
    capsys.readouterr()
    beside = ["--workdir", "here", "--beside", "elsewhere"]
    assert "it has not the same seconds" in fails(capsys, *beside, "--seconds", "12")
    path, note = Path("elsewhere/clips.csv"), Path("elsewhere/run.json")
    whole, noted = path.read_text(), note.read_text()
    note.write_text(json.dumps(json.loads(noted) | {"camera": "soft"}))
    assert "it has not the same camera" in fails(capsys, *beside)
    note.write_text(noted)
    assert "it has not the same prompts, seconds" in fails(
        capsys, "--table", *beside[:2], "--beside", "elsewhere", "--prompts", "64", "--seconds", "120"
    )
    for damaged in (whole[:-20], whole.replace("0.", "O."), "", whole.rsplit("\n", 2)[0] + "\n"):
        path.write_text(damaged)
        assert "elsewhere/clips.csv is damaged" in fails(capsys, "--table", *beside)
    path.write_text(whole.replace("self_forcing", "mine"))
    assert "rows that are not in rfjax/study/rows.py: mine" in fails(capsys, "--table", *beside)
    path.unlink()
    assert "There is no elsewhere/clips.csv" in fails(capsys, "--table", *beside)
    Path("elsewhere/run.json").unlink()
    assert "There is no elsewhere/run.json" in fails(capsys, "--table", *beside)
    assert not Path("here/judged").exists()


def test_a_table_of_what_is_judged_elsewhere_needs_no_starts(place, monkeypatch, capsys):
    run(monkeypatch, "--workdir", "elsewhere", "--rows", "self_forcing")
    Path("runs/ode/dit.safetensors").unlink()
    capsys.readouterr()
    command.main([*RUN, "--table", "--workdir", "here", "--beside", "elsewhere"])
    assert "| Self Forcing as published \\* |" in capsys.readouterr().out and not Path("here").exists()
    assert "it has not the same seconds" in fails(
        capsys, "--table", "--workdir", "here", "--beside", "elsewhere", "--seconds", "12"
    )


def test_nothing_judged_is_told(place, capsys):
    command.main([*RUN, "--table"])
    assert capsys.readouterr().out.strip() == "Nothing is judged yet."


def test_pictures_show_what_is_judged(place, monkeypatch):
    run(monkeypatch)
    found = table.collect(SMALL)
    DRAW(SMALL, found, table.figures(table.values(found)))
    names = {path.name for path in Path("runs/study").glob("*.png")}
    assert names == {"drift.png", "by_second.png", "by_second_further.png"} | {
        f"sheet_{i}.png" for i in range(3)
    }
    with Image.open("runs/study/sheet_2.png") as sheet:  # three rows, twelve columns
        assert sheet.width > 12 * 64 and 3 * 64 < sheet.height < 4 * 64 + 60

    def blue(value):
        draw.bars({"one": (value, 0.1, [value]), "two": (1.0, np.nan, [0.9, 1.1])}, "x", Path("bars.png"))
        with Image.open("bars.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        return (np.abs(pixels - [0x8F, 0xB3, 0xD9]).max(-1) < 8).sum()

    assert blue(1.0) > 1.5 * blue(0.1)


def test_what_is_drawn_over_time_is_measured():
    assert set(table.OVER_TIME) <= report.curves([template()]).keys()


# --------------------------------------------------------------------------------------------------------- mistakes


def fails(capsys, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main([*RUN, *flags])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--rows", "no_sinc"], "There is no row 'no_sinc'; did you mean no_sink?"),
        (["--seconds", "9"], "--seconds of 10 or more"),
        (["--seeds", "-1"], "--seeds takes whole numbers from 0 by commas"),
        (["--seeds", "0,,1"], "--seeds takes whole numbers from 0 by commas"),
        (["--steps", "0"], "one or more of --prompts, --batch and --steps"),
        (["--workdir", "study.md"], "--workdir takes a folder, and study.md is a file's name"),
    ],
)
def test_a_mistake_is_one_sentence(flags, said, place, capsys):
    assert said in fails(capsys, *flags)
    assert not (place / "runs" / "study").exists()


def test_what_the_study_begins_with_must_be_there(place, capsys, monkeypatch):
    Path("runs/teacher_long/dit.safetensors").unlink()
    assert "There is no runs/teacher_long/dit.safetensors, with which every training" in fails(capsys)
    monkeypatch.setattr(rows, "CONFIGS", Path("configs/study"))
    assert "run the study in the root of the repository" in fails(capsys)


def test_what_changes_under_a_study_that_has_begun_is_refused(place, monkeypatch, capsys):
    run(monkeypatch, stop_at=4)
    assert "not the same prompts" in fails(capsys, "--prompts", "4")
    start = Path("runs/ode/dit.safetensors")
    start.write_text("another student")
    assert "not the same contents of runs/ode/dit.safetensors" in fails(capsys)
    start.write_text(str(start))
    weights = Path("runs/study/weights/rolling_forcing_0/dit.safetensors")
    before = weights.read_text()
    weights.write_text("others")
    assert f"{weights} is not what runs/study/trained/rolling_forcing_0 was made with" in fails(capsys)
    weights.write_text(before)
    assert len(run(monkeypatch)) == 14 - 3


@pytest.mark.parametrize(
    "changed, said",
    [
        ("config.optimizer.learning_rate = 1.0", "no_sink.py has another optimizer than rolling_forcing.py"),
        ("config.init_from = 'another'", "no_sink.py has another init_from than rolling_forcing.py"),
        ("config.rollout.sink_blocks = 3", "config.rollout is not valid: 5 steps and 3 sink blocks exceed"),
        (
            "config.rollout.update(span_blocks=9, ring_blocks=9)",
            "or config.scored_blocks to what the teacher",
        ),
        ("config.seed = 7", "no_sink.py has another seed than rolling_forcing.py, but"),
    ],
)
def test_a_config_may_change_no_more_than_its_row_is_about(changed, said, place, monkeypatch, capsys):
    for path in CONFIGS.glob("*.py"):
        folder = place / "configs" / "study"
        folder.mkdir(parents=True, exist_ok=True)
        text = path.read_text().replace("Path(__file__).parents[1]", f"Path({str(CONFIGS.parent)!r})")
        if path.stem == "no_sink":
            text = text.replace("    return config", f"    {changed}\n    return config")
        (folder / path.name).write_text(text)
    monkeypatch.setattr(rows, "CONFIGS", place / "configs" / "study")
    assert said in fails(capsys) and said in fails(capsys, "--list")
    monkeypatch.setattr(rows, "ROWS", ROWS | {"no_sink": ROWS["no_sink"]._replace(config="rolling_forcing")})
    assert said in fails(capsys)  # a config that only trains


def test_a_method_that_is_none_is_told_before_anything_is_trained(place, monkeypatch, capsys):
    monkeypatch.setitem(ROWS, "no_sink", ROWS["no_sink"]._replace(method="roling"))
    assert "There is no method 'roling' of 'no sink'; there are rolling, self_forcing." in fails(capsys)
