"""rfjax: streaming video diffusion (Rolling Forcing, Self Forcing) in JAX and Flax."""

__version__ = "0.1.0"
