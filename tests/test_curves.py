"""Curves of runs: what is read of a log, running means against naive ones, pictures, mistakes."""

import json

import numpy as np
import pytest
from PIL import Image

from rfjax import curves


def write(run, rows, rest=""):
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)
    return run


@pytest.fixture
def run(tmp_path):
    """A run that was killed while it wrote its fourth line, and judged after the second."""
    rows = [{"step": step, "loss": 1 / step, "skipped": 0, "steps_per_second": 2.0} for step in (20, 40, 60)]
    rows.insert(2, {"step": 40, "right_shape": 0.5})
    return write(tmp_path / "run", rows, '{"step": 80, "lo')


def test_a_log_is_read_to_the_line_that_was_cut(run, tmp_path):
    found = curves.read(run)
    assert list(found) == ["loss", "right_shape"]
    np.testing.assert_allclose(found["loss"], [[20, 40, 60], [1 / 20, 1 / 40, 1 / 60]])
    np.testing.assert_allclose(found["right_shape"], [[40], [0.5]])
    broken = write(tmp_path / "broken", [{"step": 1, "skipped": 0.0}, {"step": 2, "skipped": 3.0}])
    np.testing.assert_allclose(curves.read(broken)["skipped"], [[1, 2], [0, 3]])


def test_running_means_are_those_of_neighbours():
    values = np.random.default_rng(0).normal(size=100)
    naive = [np.mean(values[max(0, i - 2) : i + 3]) for i in range(100)]
    np.testing.assert_allclose(curves.running_mean(values), naive)
    np.testing.assert_array_equal(curves.running_mean(values[:9]), values[:9])


def test_the_command_draws_what_is_asked_for(run, tmp_path, capsys):
    many = write(tmp_path / "many", [{"step": step, "loss": step % 7} for step in range(80)])
    sizes = []
    for metrics in (["--metrics", "loss"], []):
        curves.main([str(run), str(many), *metrics, "--out", str(tmp_path / "curves.png")])
        with Image.open(tmp_path / "curves.png") as picture:
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
            sizes.append(picture.width)
        assert {(31, 119, 180), (255, 127, 14)} <= colours  # a line each
    assert sizes[1] > 1.8 * sizes[0]
    told = capsys.readouterr().out
    assert str(run) in told and str(many) in told


@pytest.mark.parametrize(
    "flags, said",
    [
        (["{}/none", "--out", "{}/a.png"], "There is no {}/none/metrics.jsonl; give the folder of a run"),
        (["{}/run", "--metrics", "los", "--out", "{}/a.png"], "No run has logged 'los'; did you mean loss?"),
        (["{}/run", "--out", "{}/none/a.png"], "{}/none/a.png cannot be written"),
        (["{}/run"], "--out"),
        (["{}/empty", "--out", "{}/a.png"], "{}/empty/metrics.jsonl holds nothing to draw yet"),
    ],
)
def test_a_mistake_is_one_sentence(flags, said, run, tmp_path, capsys):
    write(tmp_path / "empty", [])
    with pytest.raises(SystemExit) as left:
        curves.main([flag.format(tmp_path) for flag in flags])
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1
    assert said.format(tmp_path) in told
