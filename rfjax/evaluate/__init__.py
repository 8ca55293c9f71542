"""Judges videos: do they show what their caption says, and do they stay as they began? `python -m rfjax.evaluate --help`."""
