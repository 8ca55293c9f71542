"""Rolling Forcing in full, the row that the others change: half of the rollouts rolling, a sink of one block.

    python -m rfjax.study --rows rolling_forcing

docs/drift.md says what is compared; `python -m rfjax.study` runs all rows.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

distill = runpy.run_path(str(Path(__file__).parents[1] / "shapes_distill.py"))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    return distill(variant)
