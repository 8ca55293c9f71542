"""Does Rolling Forcing hold where Self Forcing drifts? Trains and judges every row of the study: `python -m rfjax.study --help`."""
