"""The figures as a table."""

from typing import Any

from rfjax.preflight.estimate import gib

FIRST = {
    "cold": "nothing compiled",
    "cached": "programs kept",
    "warm": "same process",
}
COLUMNS = {"median": 12, "min": 12, "max": 12, "calls": 7, "TFLOP": 11, "TFLOP/s": 11, "frames/s": 10}


def show(told: dict[str, Any]) -> None:
    """Prints what `__main__.measure` found."""
    run, hardware, versions = told["run"], told["hardware"], told["versions"]
    print(
        f"\n{run['size']}, {run['samples']} at a time, {run['method']}, network {run['dtype']}, decoder {run['decoder']}, "
        f"weights {run['weights']}, quantised {run['quantize'] or 'nowhere'}, attention {run['attention']}, "
        f"devices {', '.join(f'{name} {count}' for name, count in run['devices'].items() if count)}"
    )
    print(
        f"{hardware['devices']} × {hardware['device']} ({hardware['platform']}), {hardware['cpu']}, {hardware['cores']} cores; "
        f"jax {versions['jax']}; commit {told['commit'][:12]}{'+' * told['commit'].endswith('+')}"
    )
    if "first_frame" in told:
        first_frame(told["first_frame"])
    if told["parts"]:
        parts(told["parts"], hardware["peak_flops"])
    if told["sent"]:
        kinds = ", ".join(f"{kind} {mib(size)}" for kind, size in told["sent"].items())
        print(f"\nsent for a block by each device: {mib(sum(told['sent'].values()))} ({kinds})")
    if "stream" in told:
        stream(told["stream"], run["blocks"])
        memory(told["stream"]["memory"], told["peak"], hardware["memory_bytes"])


def first_frame(found: dict[str, dict[str, float]]) -> None:
    print(f"\n{'first frame':24}{'imports':>9}{'weights':>9}{'prompt':>9}{'total':>9}   of which programs")
    for name, words in FIRST.items():
        if name in found:
            seconds = (found[name].get(f"{part}_s") for part in ("imports", "weights", "prompt", "total"))
            row = "".join(f"{'' if taken is None else f'{taken:.2f} s':>9}" for taken in seconds)
            told = "   {compile_s:.2f} s: {compiled} compiled, {loaded} loaded" if name != "warm" else ""
            print(f"  {words:22}{row}{told.format(**found[name])}")


def parts(found: dict[str, dict[str, float]], peak: float | None) -> None:
    columns = "".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    print(f"\n{'part':12}{columns}{'MFU' if peak else '':>8}")
    for name, figures in found.items():
        cells = [milliseconds(figures[f"{which}_s"]) for which in ("median", "min", "max")]
        cells.append(f"{figures['calls']}")
        cells += [f"{figures[key] / 1e12:.4g}" if key in figures else "" for key in ("flops", "flops_per_s")]
        cells.append(f"{figures['frames_per_s']:.4g}" if "frames_per_s" in figures else "")
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))
        print(f"  {name:10}{row}" + (f"{figures['mfu']:>8.1%}" if "mfu" in figures else ""))


def stream(found: dict[str, Any], wanted: int) -> None:
    drift, compiled = found["drift"], found["compilations"]
    early = "" if found["blocks"] == wanted else f" (of {wanted}: --seconds ended it)"
    print(
        f"\nstream of {found['blocks']} blocks{early}, {found['frames']} frames: "
        f"{found['frames_per_s']:.2f} frames/s"
    )
    for name in ("block", "frame"):
        latency = found[f"{name}_latency"]
        row = ", ".join(
            f"{which} {milliseconds(latency[f'{which}_s'])}" for which in ("p50", "p95", "p99", "max")
        )
        print(f"  a {name:12}{row}")
    if drift:
        print(
            f"  drift         {drift['change']:+.1%} (median of the first {drift['over']} {milliseconds(drift['first_s'])}, "
            f"of the last {milliseconds(drift['last_s'])})"
        )
    print(
        f"  compiled      {compiled['warm_up']} programs before, {compiled['measured']} while it was measured"
    )
    if "flops_per_s" in found:
        share = f", {found['mfu']:.1%} of the peak" if "mfu" in found else ""
        print(f"  achieved      {found['flops_per_s'] / 1e12:.4g} TFLOP/s{share}")


def memory(samples: list[dict[str, int]], peak: dict[str, int], capacity: int | None) -> None:
    of = "" if capacity is None else f" (there are {gib(capacity)})"
    print(f"\n{'memory':14}{'first':>12}{'last':>12}{'peak':>12}{of}")
    for name in ("live", "process", "device"):
        if name in samples[0]:
            most = gib(peak[name]) if name in peak else gib(max(sample[name] for sample in samples))
            print(f"  {name:12}{gib(samples[0][name]):>12}{gib(samples[-1][name]):>12}{most:>12}")


def mib(size: float) -> str:
    return f"{size / 2**20:.4g} MiB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms" if seconds < 10 else f"{seconds:.1f} s"
