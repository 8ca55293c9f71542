"""Strict JAX: no silent promotion of ranks or dtypes, and products as exact as their dtype.

Compiled programs are kept: a second run is quick.
"""

import signal

import jax

from rfjax import compilation

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")  # a GPU's own is TF32; on CPU not a bit changes
compilation.keep_programs()
# A shell lets what it starts in the background ignore Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
