"""The latency of every block of a stream, drawn."""

from pathlib import Path
from typing import Any

import numpy as np

from rfjax.errors import UserError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise UserError("--plot draws with matplotlib: pip install -e '.[plot]'.") from error


def draw(told: dict[str, Any], path: Path, kind: str) -> None:
    """Writes a picture of `told["stream"]`, of the kind "png", "svg" or "pdf"."""
    found, run = told["stream"], told["run"]
    taken = 1e3 * np.asarray(found["intervals_s"])
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(taken, ".", markersize=3, color="tab:blue")
    for name, colour in (("p50", "tab:green"), ("p99", "tab:red")):
        value = 1e3 * found["block_latency"][f"{name}_s"]
        axes.axhline(value, color=colour, linewidth=1, label=f"{name} {value:.4g} ms")
    axes.set(
        xlabel="block",
        ylabel="ms since the block before",
        title=f"{run['size']}, {run['method']}, {run['dtype']}, decoder {run['decoder']}: {told['hardware']['device']}",
    )
    axes.set_ylim(0, 1.05 * taken.max())
    axes.legend(loc="lower right")
    figure.savefig(path, format=kind, dpi=150)
