"""Flax: ``msam_optax.flax.linen`` and ``msam_optax.flax.nnx``, each on its own.

Extra: ``pip install msam_optax[flax]``. Import the one you use,
``from msam_optax.flax import linen``.
"""

__all__ = ["linen", "nnx"]
