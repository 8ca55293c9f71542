"""The figures of compiled programs as a table, the verdict, and what to change."""

from typing import Any

from ml_collections import ConfigDict

from rfjax.preflight.chips import Chip
from rfjax.preflight.estimate import gib

ROWS = {
    "arguments": "arguments",
    "outputs": "outputs, new",
    "temporaries": "temporaries",
    "elsewhere": "other programs' arguments",
}

MOVED = {"accessed": "read and written, loops once", "moved": "read and written"}


def show(figures: dict[str, dict[str, Any]], memory: int, chip: Chip | None, settings: ConfigDict) -> bool:
    """Prints all of it; whether every program fits in the memory of a chip."""
    for name, found in figures.items():
        print(f"\n{name}, a chip (compiled in {found['compile']:.0f} s)")
        for part, words in ROWS.items():
            print(f"  {words:28}{gib(found[part]):>12}")
        print(f"  {'total of the chip':28}{gib(found['total']):>12} of {gib(memory)}")
        _work(found, chip)
        for size, kind, source in found["buffers"]:
            print(f"    {gib(size):>9}  {kind}  {source}")
        if "refused" in found:
            print(f"  the compiler refuses: {found['refused']}")
    worst = max(figures, key=lambda name: figures[name]["total"])
    fits = all("refused" not in found and found["total"] <= memory for found in figures.values())
    if fits:
        print(f"\nFITS: {gib(figures[worst]['total'])} of {gib(memory)} on a chip ({worst}).")
    else:
        refused = next((name for name in figures if "refused" in figures[name]), worst)
        print(f"\nDOES NOT FIT ({refused}): {advice(figures[refused], settings)}.")
    return fits


def _work(found: dict[str, Any], chip: Chip | None) -> None:
    """Operations and traffic, and on known chips how long they take at the published peaks."""
    sent = found.get("collectives", {})
    compute = f"  {'operations':28}{found['flops'] / 1e12:>9.4g} TFLOP"
    print(compute + (f"  {found['flops'] / chip.flops:.3g} s at peak" if chip else ""))
    for name, words in MOVED.items():
        if found.get(name):
            moved = f"  {words:28}{gib(int(found[name])):>12}"
            print(moved + (f"  {found[name] / chip.hbm:.3g} s at peak" if chip else ""))
    if found.get("collectives") == {}:
        print("  nothing is sent between chips")
    for kind, size in sorted(sent.items(), key=lambda item: -item[1]):
        print(f"  {kind:28}{gib(int(size)):>12}")
    if chip and sent:
        print(
            f"  {'between chips':28}{gib(int(sum(sent.values()))):>12}  {sum(sent.values()) / (chip.ici / 2):.3g} s at peak"
        )


def advice(found: dict[str, Any], settings: ConfigDict) -> str:
    """What to change, by what takes most."""
    if "stage" not in settings:
        return "fewer --clips, a smaller config.video, or a chip with more memory"
    lying, busy = found["arguments"] + found["elsewhere"], found["temporaries"] + found["outputs"]
    fewer = "more devices along config.mesh.fsdp"
    less = [f"a larger config.accumulate (now {settings.get('accumulate', 1)})"]
    if settings.stage != "vae":
        less += ["config.dit.remat = True"] * (not settings.dit.get("remat", False))
        less += ["config.dit.dtype = 'bfloat16'"] * (settings.dit.get("dtype", "float32") == "float32")
        less += ["more devices along config.mesh.context"]
    said = f"parameters and optimisers take {gib(lying)} of a chip, the step {gib(busy)}"
    return f"{said}; {', '.join([fewer, *less] if lying > busy else [*less, fewer])}"
