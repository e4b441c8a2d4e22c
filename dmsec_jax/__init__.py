"""Diffusion security and causal discovery in JAX.

Subpackages are imported by name, `from dmsec_jax.methods import finextract`; importing `dmsec_jax` alone loads nothing.
"""

__version__ = "0.1.0"
