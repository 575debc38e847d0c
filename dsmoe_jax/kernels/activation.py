"""The gate activations of SwiGLU, by Hugging Face's names."""

import functools
from collections.abc import Callable
from typing import Final

import jax

from dsmoe_jax.axes import Array

ACTIVATION_FUNCTIONS: Final[dict[str, Callable[[Array], Array]]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
