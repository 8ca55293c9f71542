"""rfjax: streaming video diffusion (Rolling Forcing, Self Forcing) in JAX and Flax."""

import time

__version__ = "0.1.0"
# Seconds, as time.perf_counter has them: when the program began, but for what Python imported before this.
STARTED = time.perf_counter()
