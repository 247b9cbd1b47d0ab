"""Deep clustering and self-supervised features in JAX."""

__version__ = "0.1.0"
