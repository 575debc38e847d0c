"""Text out of the model: `Generator` answers batches and streams, `Chat` keeps a conversation."""

from dsmoe_jax.generate.chat import Chat
from dsmoe_jax.generate.generator import Completion, Generator
from dsmoe_jax.generate.sampling import SamplingParams

__all__ = ["Chat", "Completion", "Generator", "SamplingParams"]
