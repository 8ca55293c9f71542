"""benchmarks/h200.sh without its GPU: every run of it is one that the benchmark takes, and a part ends within nine minutes."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from rfjax.bench import flags

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/h200.sh"
KILL = 5  # seconds from the end of a run's time until it is killed


def runs(folder, *parts, code=0):
    """The command line of each run, [timeout, -k, 5, SECONDS, python3, -m, rfjax.bench, …], of which none is run."""
    fake, log = folder / "timeout", folder / "log"
    fake.write_text(f'#!/bin/sh\nprintf "%s " "$0" "$@" >>{log}\necho >>{log}\nexit {code}\n')
    fake.chmod(0o755)
    here = {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(folder)}
    done = subprocess.run(["bash", SCRIPT, *parts], env=os.environ | here, capture_output=True, text=True)
    assert done.returncode == bool(code), done.stderr
    return [shlex.split(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("part", ["1", "2", "3"])
def test_a_part_ends_within_nine_minutes_and_its_flags_are_the_benchmark_s(part, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    planned = runs(tmp_path, part)
    assert sum(int(run[3]) + KILL for run in planned) <= 540
    for run in planned:
        assert run[1:3] == ["-k", str(KILL)] and run[4:7] == ["python3", "-m", "rfjax.bench"]
        flags.parse(run[7:], "")


def test_all_parts_are_run_one_after_another_though_one_fails(tmp_path):
    def planned(name, *parts, **how):
        folder = tmp_path / name
        folder.mkdir()
        return [" ".join(run).replace(str(folder), "") for run in runs(folder, *parts, **how)]

    apart = [run for part in ("1", "2", "3") for run in planned(part, part)]
    assert planned("all") == planned("failing", code=1) == apart


def test_a_part_that_is_not_there_is_told_before_any_run():
    done = subprocess.run(["bash", SCRIPT, "1", "4"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage:") and not done.stdout
