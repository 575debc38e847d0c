"""Text generation: `Generator` for batches and streams, `Chat` for conversations."""

from dsmoe_jax.generate.chat import Chat
from dsmoe_jax.generate.engine import Engine
from dsmoe_jax.generate.generator import Generator
from dsmoe_jax.generate.request import Completion, Stats, TokenLogprob
from dsmoe_jax.generate.sampling_params import SamplingParams
from dsmoe_jax.generate.scoring import Perplexity, Score

__all__ = [
    "Chat",
    "Completion",
    "Engine",
    "Generator",
    "Perplexity",
    "SamplingParams",
    "Score",
    "Stats",
    "TokenLogprob",
]
