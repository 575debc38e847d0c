"""Blocks applied one by one (`apply`), or all in one loop (`scan`), with their remat policy and compute dtype."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.xla_metadata import set_xla_metadata

from dsmoe_jax.axes import Array, Float, PRNGKeyArray
from dsmoe_jax.kernels.attention import CausalMask
from dsmoe_jax.kv_cache import LayerCache
from dsmoe_jax.layers.rope import Rotation
from dsmoe_jax.layers.router import Routing
from dsmoe_jax.layers.weights import cast
from dsmoe_jax.sharding import constrain

STATES: Final = ("batch", None, None)  # the logical axes of hidden states
# Rematerialization policies: the activations of a block that are saved for the backward pass.
REMAT: Final[dict[str, Any]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
Path = tuple[Any, ...]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def apply(
    graph: Any, remat: str, dtype: Any, params: Any, *operands: Any
) -> tuple[Array, LayerCache | None, Routing | None]:
    """Apply a block; jitted, so that equal layers are traced and lowered once.

    Args:
        graph: The block without its parameters.
        remat: A key of `REMAT`.
        dtype: Dtype of the weights but the router's, which computes in fp32; None: as they are.
        params: The parameters, as variables or values.
        operands: The arguments of `Block`.
    """

    def run(params: Any, *operands: Any) -> Any:
        params = params if dtype is None else nnx.from_flat_state(_cast(leaves(params), dtype).items())
        return nnx.merge(graph, params)(*operands)

    # Calls within a block stay inlineable under the compiler option that keeps XLA from inlining blocks.
    with set_xla_metadata(inlineable=None):
        return (run if remat == "none" else jax.checkpoint(run, policy=REMAT[remat]))(params, *operands)


def leaves(params: Any) -> dict[Path, Any]:
    """Return the values of a state of variables or values, by path."""
    flat = nnx.to_flat_state(params)
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in flat}


def _cast(params: Mapping[Path, Any], dtype: Any) -> dict[Path, Any]:
    if dtype is None:
        return dict(params)
    return {path: leaf if "router" in path else cast(leaf, dtype) for path, leaf in params.items()}


def scan(
    graph: Any,
    remat: str,
    dtype: Any,
    params: Sequence[Mapping[Path, Any]],
    x: Float[Array, "B T D"],
    rotation: Rotation,
    mask: CausalMask,
    dropout_keys: Sequence[PRNGKeyArray] | None,
    router_biases: Sequence[Array] | None,
    assigned: Sequence[Array] | None,
) -> tuple[Float[Array, "B T D"], list[Routing]]:
    """Apply MoE blocks of one graph in a loop, without caches; return the states and the routing of each.

    One block is compiled instead of all. The price is a copy of their weights, which the loop reads, and of their
    gradients, which it writes: stacked, in `dtype`.
    """
    stack = lambda each: jax.tree.map(lambda *values: jnp.stack(values), *each)  # noqa: E731
    by_name = [{"/".join(map(str, path)): leaf for path, leaf in _cast(one, dtype).items()} for one in params]
    paths = {"/".join(map(str, path)): path for path in params[0]}

    def one(x: Array, layer: Any) -> tuple[Array, Routing | None]:
        weights, key, bias, ids = layer
        own = nnx.from_flat_state([(paths[name], leaf) for name, leaf in weights.items()])
        x, _, routing = apply(graph, remat, None, own, x, rotation, mask, None, None, key, bias, None, ids)
        return constrain(x, STATES), routing

    by_layer = [None if each is None else stack(each) for each in (dropout_keys, router_biases, assigned)]
    x, routing = jax.lax.scan(one, x, (stack(by_name), *by_layer))
    return x, [jax.tree.map(lambda each, i=i: each[i], routing) for i in range(len(params))]
