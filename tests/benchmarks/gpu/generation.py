"""Generation at the 16B's sizes with random weights: the programs of `dsmoe_jax.generate.programs`, without the engine.

Start at `decode_row`. Routing is random too; the activated experts of a step are counted, not assumed.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.generate.programs import Batch, empty, prefill, step
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import abstract, merge
from tests.benchmarks import plan
from tests.benchmarks.gpu import timing, training, work
from tests.benchmarks.gpu.cases import Case, one_line, turns
from tests.benchmarks.gpu.sizes import Sizes


class Hits(NamedTuple):
    """The activated experts of each MoE layer by batch size; the expected number, with a reason, if not counted."""

    by_rows: Mapping[int, list[float]]
    why_not: str = ""


def decode(sizes: Sizes) -> Iterator[Case]:
    """In bf16, in order of priority."""
    params = _params(sizes, None)
    hits = hit_experts(sizes, params)
    yield from (_decode_case(sizes, params, hits, rows, "bf16") for rows in sizes.batches)


def prefill_bf16(sizes: Sizes) -> Iterator[Case]:
    """In bf16."""
    params = _params(sizes, None)
    yield Case("prefill.bf16", f"prefill 1 x {sizes.prompt}, bf16", functools.partial(prefill_row, sizes, params))


def int8(sizes: Sizes) -> Iterator[Case]:
    """Weights in int8, embeddings too; the cache in bf16."""
    params = _params(sizes, "int8")
    hits = hit_experts(sizes, params)
    yield from (_decode_case(sizes, params, hits, rows, "int8") for rows in sizes.batches[:-1])
    yield Case("prefill.int8", f"prefill 1 x {sizes.prompt}, int8", functools.partial(prefill_row, sizes, params))
    yield _decode_case(sizes, params, hits, sizes.batches[-1], "int8")


def _params(sizes: Sizes, scheme: str | None) -> dict[str, Any]:
    width = 1 if scheme else jnp.dtype(sizes.dtype).itemsize
    dense = sum(np.prod(spec.shape) for spec in abstract(sizes.model)[1].values())
    timing.need(f"the model in {scheme or sizes.dtype}", float(dense) * width)
    return training.noise_params(sizes.model, scheme, jnp.dtype(sizes.dtype), embedding=scheme)


def _decode_case(sizes: Sizes, params: Mapping[str, Any], hits: Hits, rows: int, name: str) -> Case:
    run = functools.partial(decode_row, sizes, params, hits, rows)
    return Case(f"decode.{name}.{rows}", f"decode b={rows}, {name}, {sizes.context} tokens cached", run)


def decode_row(sizes: Sizes, params: Mapping[str, Any], hits: Hits, rows: int) -> dict[str, Any]:
    """Time `steps` decode steps, each dispatched before the tokens of the previous one are read, as in `Generator`."""
    config, dtype = sizes.model, jnp.dtype(sizes.dtype)
    slots = sizes.context + sizes.steps
    width = work.cache_bytes_per_token(config, dtype.itemsize)
    timing.need(f"a cache of {rows} x {slots} tokens and its update", 2.0 * rows * slots * width)
    graph = abstract(config)[0]
    active, drawn = jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32)
    held: list[Any] = [timing.ids(config, rows, 1)[:, 0], Batch(_noise_cache(sizes, rows, slots), None)]
    program, figures = timing.compiled(step, graph, None, params, held[1], held[0], active, None, drawn)
    begin = jax.jit(lambda lengths: jnp.full_like(lengths, sizes.context), donate_argnums=0)

    def run() -> None:
        token, batch = held
        held.clear()
        batch = batch._replace(cache=batch.cache._replace(lengths=begin(batch.cache.lengths)))
        for _ in range(sizes.steps):
            ready = token
            (token, *_), batch = program(params, batch, token, active, None, drawn)
            np.asarray(ready)
        held[:] = jax.block_until_ready((token, batch))

    seconds = [taken / sizes.steps for taken in turns(run, sizes.turn_seconds)]
    held_tokens = sizes.context + (sizes.steps + 1) // 2  # the mean over the steps, including the new token
    read, chance = hits.by_rows[rows], work.hit_by_chance(config, rows)
    note = f"{np.mean(read):.1f} of {config.n_routed_experts} experts hit a layer ({chance:.1f} by chance)"
    return {
        "seconds": seconds,
        **figures,
        "tokens": rows,
        "flops": work.decode_flops(config, rows, held_tokens),
        "bytes": work.decode_bytes(config, timing.sizes_of(params), rows, held_tokens, read, dtype.itemsize),
        "note": f"{chance:.1f} experts a layer by chance, not counted: {hits.why_not}" if hits.why_not else note,
    }


def prefill_row(sizes: Sizes, params: Mapping[str, Any]) -> dict[str, Any]:
    """Prefill one prompt and compute the logits of its last token."""
    config, dtype, T = sizes.model, jnp.dtype(sizes.dtype), sizes.prompt
    ids, counts = timing.ids(config, 1, T), jnp.full(1, T, jnp.int32)
    program, figures = timing.compiled(prefill, abstract(config)[0], T, dtype, params, ids, counts)
    return {
        "seconds": turns(lambda: jax.block_until_ready(program(params, ids, counts)), sizes.turn_seconds),
        **figures,
        "tokens": T,
        "flops": plan.flops(config, 1, T, head_tokens=1),
        "bytes": timing.nbytes(params),
    }


def hit_experts(sizes: Sizes, params: Mapping[str, Any]) -> Hits:
    """Count the activated experts; if that fails, use the expected number."""
    try:
        return Hits(_counted(sizes, params))
    except Exception as error:
        layers = sum(sizes.model.is_moe_layer(layer) for layer in range(sizes.model.num_hidden_layers))
        return Hits({rows: [work.hit_by_chance(sizes.model, rows)] * layers for rows in sizes.batches}, one_line(error))


def _counted(sizes: Sizes, params: Mapping[str, Any]) -> dict[int, list[float]]:
    """Count the activated experts of each MoE layer for each batch size, with random tokens.

    One program for all sizes, without a cache: each token is a sequence of its own.
    """
    config, most = sizes.model, max(sizes.batches)
    graph = abstract(config)[0]

    @jax.jit
    def routed(params: Any, ids: Any) -> Any:
        return [routing.ids for routing in merge(graph, params).hidden(ids).routing.values()]

    layers = [np.asarray(ids)[:, 0] for ids in routed(params, timing.ids(config, most, 1))]
    return {rows: [float(len(np.unique(layer[:rows]))) for layer in layers] for rows in sizes.batches}


def _noise_cache(sizes: Sizes, rows: int, slots: int) -> KVCache:
    """Create a cache with `context` random tokens per sequence."""
    cache = empty(sizes.model, rows, slots, jnp.dtype(sizes.dtype))

    @functools.partial(jax.jit, donate_argnums=0)
    def fill(array: Any, key: Any) -> Any:
        return jax.random.normal(key, array.shape, array.dtype)

    leaves, tree = jax.tree.flatten(cache.layers)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    layers = jax.tree.unflatten(tree, [fill(leaf, key) for leaf, key in zip(leaves, keys, strict=True)])
    return KVCache(layers, jnp.full(rows, sizes.context, jnp.int32))
