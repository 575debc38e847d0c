"""Inputs of the routed experts as leaves by path: "rows", "gate.base", …"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

FROZEN = r"base|codes|scales|offset"  # paths of what fine-tuning leaves alone


def paths(tree: Any) -> dict[str, Any]:
    """The leaves by their paths; those of experts without that word."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {name.removeprefix("experts."): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def trained(leaves: Mapping[str, Any], frozen: str) -> dict[str, Any]:
    """All floats but those whose path has a match of `frozen`."""
    return {
        path: leaf
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not (frozen and re.search(frozen, path))
    }
