"""What --devices may say; and `tests/streams.py`, which needs 8 devices and so a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rfjax import placement
from rfjax.dit import DiTConfig
from rfjax.errors import UserError

ROOT = Path(__file__).parents[1]
NETWORK = DiTConfig(dim=24, ffn_dim=32, num_heads=6, num_layers=1, text_dim=6, text_len=5)


def test_streams_on_eight_devices_are_those_of_one():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    part = "decoder and context and rolling or prompts or benchmark or preflight"  # on all axes at once
    command = [sys.executable, "tests/streams.py", "-k", part]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_words_become_numbers():
    assert placement.parse("4") == placement.Devices(context=4)
    assert placement.parse("decoder=1,data=2") == placement.Devices(data=2, decoder=1)


@pytest.mark.parametrize(
    "words", ["", "0", "-1", "context=0", "pods=2", "data=2,data=2", "2x2", "data=2,", "data=two"]
)
def test_other_words_are_told(words):
    with pytest.raises(UserError, match="must be like 4 or data=2,context=2,decoder=1"):
        placement.parse(words)


@pytest.mark.parametrize(
    ("words", "there", "told"),
    [
        ("data=2", 4, "data=2, which does not divide the 3 clips"),
        ("decoder=2", 4, "decoder=2, which does not divide the 3 clips"),
        ("4", 4, "context=4, which does not divide the 6 heads of the network"),
        ("3", 4, "context=3, which does not divide the 16 tokens of a frame"),
        ("context=2,data=3", 4, "asks for 6 devices and there are 4"),
        ("4", None, "asks for 4 devices and there are 1"),  # before the heads, which 4 does not divide
    ],
)
def test_what_cannot_be_split_is_told(words, there, told):
    with pytest.raises(UserError, match=told):
        placement.check(placement.parse(words), 3, NETWORK, 16, there and [None] * there)
