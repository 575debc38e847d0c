"""Pretraining and fine-tuning. Imported as `dsmoe_jax.train`."""

from .loss import balance_loss, cross_entropy

__all__ = ["balance_loss", "cross_entropy"]
