"""rfjax: streaming video diffusion (Rolling Forcing, Self Forcing) in JAX and Flax."""

import time

__version__ = "0.1.0"
STARTED = time.perf_counter()  # before anything heavy is imported
