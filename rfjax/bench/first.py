"""The time to the first frame, measured in processes of their own: with nothing compiled before, and with all of it kept.

    python -m rfjax.bench.first STARTED FLAGS…

is such a process; STARTED is when it was started, in seconds since 1970. It prints its figures as JSON.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import jax

from rfjax import compilation, config, sampler
from rfjax.bench import flags, stream
from rfjax.errors import UserError, exit_cleanly


def apart(argv: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """The names cold and cached, with `figures` of a process that finds no compiled program and of one that finds all of them kept.

    Neither may run while this process holds the device. UserError where they fail, in their own words.
    """
    with tempfile.TemporaryDirectory() as kept:
        for name in ("cold", "cached"):
            yield name, _start([*argv, "--compile_cache", kept])


def _start(argv: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "rfjax.bench.first", repr(time.time()), *argv]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        raise UserError(said[0].removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[-1])


def warm(model: sampler.Sampler, captions: list[str], method: str, decoded: bool) -> dict[str, float]:
    """prompt_s: from a prompt to its first frame, in a process that has made such a frame before, and has nothing else to do.

    "compiled": programs meanwhile.
    """
    prompt(model, captions, method, decoded)
    programs = compilation.counter()
    return {"prompt_s": prompt(model, captions, method, decoded), "compiled": programs()}


def prompt(model: sampler.Sampler, captions: list[str], method: str, decoded: bool) -> float:
    """Seconds from a prompt to its first frame."""
    started = time.perf_counter()
    stream.first(model, captions, method, decoded)
    return time.perf_counter() - started


def figures(started: float, argv: list[str]) -> dict[str, float]:
    """Seconds of a fresh process: imports_s, weights_s, prompt_s (from the prompt to its first frame) and total_s, their sum.

    compile_s, in which programs were compiled or loaded where they were kept, is part of the others; "compiled" and "loaded" are
    how many.
    """
    args, settings = flags.parse(argv, __doc__)
    with config.read_by("bench", settings):
        captions = [settings.prompt] * args.samples
    compile_seconds, programs, loaded_programs = (
        compilation.stopwatch(),
        compilation.counter(),
        compilation.loads(),
    )
    compilation.keep_programs(args.compile_cache)
    imported = time.time()
    model = flags.load(args, settings)
    jax.block_until_ready(model.params)
    loaded = time.time()
    shown = prompt(model, captions, args.method, args.decoder != "none")
    return {
        "total_s": time.time() - started,
        "imports_s": imported - started,
        "weights_s": loaded - imported,
        "prompt_s": shown,
        "compile_s": compile_seconds(),
        "compiled": programs() - loaded_programs(),
        "loaded": loaded_programs(),
    }


@exit_cleanly
def main(argv: list[str]) -> None:
    print(json.dumps(figures(float(argv[0]), argv[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
