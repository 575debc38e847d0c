"""Inputs of the routed experts as leaves by path: "rows", "gate.base", …"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

FROZEN = r"base|codes|scales|offset"  # paths of frozen leaves


def paths(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, without the word "experts"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {name.removeprefix("experts."): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def trained(leaves: Mapping[str, Any], frozen: str) -> dict[str, Any]:
    """Return the floating-point leaves whose path does not match `frozen`."""
    return {
        path: leaf
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not (frozen and re.search(frozen, path))
    }
