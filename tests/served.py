"""The live server as a process of its own, for the tests that need one."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENDING = 60.0  # seconds that the process may take to end


@contextlib.contextmanager
def server(*flags: str, fake: bool) -> Iterator[tuple[str, subprocess.Popen]]:
    """`python -m rfjax.serve`, or the same with the fake batch, until it listens: (its address, the process). In the end what it
    wrote to stderr is written to this one's."""
    command = [str(ROOT / "tests/fake_live.py")] if fake else ["-m", "rfjax.serve"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, *command, *flags]
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # no pipe, which could fill up
        started = dict(
            cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        process = stack.enter_context(subprocess.Popen(words, **started))
        try:
            told = next((line for line in process.stdout if line.startswith("Listening on ")), None)
            if told is None:
                raise RuntimeError("the server did not start; what it says comes after this")
            yield re.search(r"http://[^\s,]+", told)[0], process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
            process.kill()
            errors.seek(0)
            sys.stderr.write(errors.read())


class Checks:
    """Prints each check as it comes, and counts those that fail."""

    def __init__(self):
        self.failed = 0

    def __call__(self, name: str, holds: bool, told="") -> None:
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {name}{f': {told}' if told != '' else ''}", flush=True)
