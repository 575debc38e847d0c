"""Rotary position embeddings in the half-split (GPT-NeoX, Llama) layout: plain, linear and dynamic NTK."""

from typing import NamedTuple

import jax.numpy as jnp

from dsmoe_jax.axes import Array, Float, Int
from dsmoe_jax.config import ModelConfig


class Rotation(NamedTuple):
    """The cos and sin of every token's angles, shared by all heads."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotation(config: ModelConfig, position_ids: Int[Array, "B T"], length: int | Int[Array, ""], dtype) -> Rotation:
    """Compute the angles position · θ^(-2j/H) in fp32; linear scaling divides positions by the factor.

    Dynamic NTK multiplies θ by (factor · length / max_position_embeddings − factor + 1)^(H / (H − 2)) if `length`
    (cached and new keys, padding included) is above `max_position_embeddings`.
    """
    H = config.head_dim
    theta = jnp.float32(config.rope_theta)
    position = position_ids.astype(jnp.float32)
    scaling = config.rope_scaling
    if scaling is not None and scaling.type == "linear":
        position = position / scaling.factor
    if scaling is not None and scaling.type == "dynamic":
        longest = config.max_position_embeddings
        stretch = scaling.factor * jnp.asarray(length, jnp.float32) / longest - (scaling.factor - 1)
        theta = theta * jnp.where(jnp.asarray(length) > longest, jnp.maximum(stretch, 1) ** (H / (H - 2)), 1)
    frequency = 1.0 / theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    angle = position[:, :, None] * frequency[None, None, :]
    return Rotation(jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype))


def rotate(x: Float[Array, "B T heads H"], rotation: Rotation) -> Float[Array, "B T heads H"]:
    """Rotate the pairs (x_j, x_{j + H/2}) by their token's angles."""
    cos, sin = rotation.cos[:, :, None], rotation.sin[:, :, None]
    x1, x2 = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
