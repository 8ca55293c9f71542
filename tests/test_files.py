"""Places that a user names, and what several processes see of them."""

import threading

import jax
import pytest

from rfjax import checkpoint, distributed, files
from rfjax.errors import UserError
from rfjax.evaluate import keep


@pytest.mark.parametrize(
    "refused", [checkpoint.make, lambda name: files.check_writable(str(name)), keep.check]
)
def test_a_bucket_is_no_folder_of_this_machine(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="gs:/.* is no folder of this machine; mount the bucket"):
        refused("gs://bucket/run")
    assert not list(tmp_path.iterdir())


def test_a_file_that_a_network_shows_late_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "LOOK", 0.05)
    path = tmp_path / "config.json"
    threading.Timer(0.3, path.touch).start()
    assert distributed.seen(path)
    monkeypatch.setattr(distributed, "PATIENCE", 0.2)
    assert not distributed.seen(tmp_path / "never.json")


def test_processes_that_have_not_joined_are_told_to(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 8)
    with (
        pytest.raises(UserError, match="one of 8 processes that have not joined; give --distributed"),
        distributed.together(),
    ):
        raise AssertionError("never begun")
