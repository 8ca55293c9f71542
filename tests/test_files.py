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


def test_a_text_has_no_byte_order_mark_and_its_mistakes_one_sentence_each(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf a caf\xc3\xa9 \r\n\n#b\n")
    assert files.lines(path) == ["a café", "", "#b"] and files.prompts(path) == ["a café", "#b"]
    for content, says in (
        (b" \n", "prompts.txt holds no prompt; write one a line."),
        (b"\xff\xfe", "prompts.txt: it is not UTF-8 text; give a text file in UTF-8."),
        (None, "prompts.txt: No such file or directory; give a text file in UTF-8."),
    ):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=says):
            files.prompts(path)


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
