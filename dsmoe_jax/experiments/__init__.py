"""The paper's experiments: ablations and routing of any checkpoint, and the comparison of architectures."""

from dsmoe_jax.experiments.ablations import ablate
from dsmoe_jax.experiments.reproduce import reproduce
from dsmoe_jax.experiments.routing import routes

__all__ = ["ablate", "reproduce", "routes"]
