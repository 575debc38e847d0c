"""Time and memory of JAX functions. Start at `timed`; `noise` creates operands on the device."""

import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from dsmoe_jax.generate.memory_plan import device_bytes
from dsmoe_jax.kernels import attention
from dsmoe_jax.train.metrics import peak_flops
from tests.benchmarks.gpu.cases import UnableError, turns


def timed(function: Callable[..., Any], *operands: Any, seconds: float, **known: Any) -> dict[str, Any]:
    """Time a pure function of arrays; `known` figures (flops, bytes, tokens) are added to the row.

    By default `bytes` counts every operand and result once.
    """
    program, figures = compiled(jax.jit(function), *operands)
    own = {"bytes": nbytes(operands) + nbytes(jax.eval_shape(function, *operands))}
    taken = turns(lambda: jax.block_until_ready(program(*operands)), seconds)
    return {"seconds": taken, **figures, **own, **known}


def compiled(function: Any, *operands: Any) -> tuple[Any, dict[str, Any]]:
    """Compile a jitted function; return the program, the seconds to compile and the planned memory.

    Static operands are passed here, not to the program.
    """
    start = time.perf_counter()
    program = function.lower(*operands).compile()
    figures: dict[str, Any] = {"compile_seconds": time.perf_counter() - start}
    if (memory := program.memory_analysis()) is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        figures["memory"] = held + memory.temp_size_in_bytes
    return program, figures


def by_attention(backend: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call `run` with a backend of attention; raise `UnableError` without a GPU."""
    if jax.default_backend() != "gpu":
        raise UnableError(f"attention by {backend} needs a GPU")
    jax.clear_caches()  # else the cached trace of an equal block would be used
    try:
        with mock.patch.dict(os.environ, {attention.VARIABLE: backend}):
            return run()
    finally:
        jax.clear_caches()


def nbytes(tree: Any) -> int:
    """Return the bytes of all leaves, shapes or arrays."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def need(what: str, size: float) -> None:
    """Raise `UnableError` if the device reports less free memory."""
    free = device_bytes()
    if free is not None and size > free:
        raise UnableError(f"{what} takes about {size / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


def noise(shapes: Any, *, scale: float = 1.0, seed: int = 0) -> Any:
    """Draw arrays on the device for a tree of shapes: N(0, `scale`²), random bits for integers."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        _draw(key, tuple(leaf.shape), jnp.dtype(leaf.dtype).name, scale) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Any, shape: tuple[int, ...], dtype: str, scale: float) -> Any:
    kind = jnp.dtype(dtype)
    if jnp.issubdtype(kind, jnp.integer):
        return jax.random.bits(key, shape, jnp.uint8).astype(kind)
    return (scale * jax.random.normal(key, shape, jnp.bfloat16 if kind == jnp.bfloat16 else jnp.float32)).astype(kind)


def shape(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
    """Shorthand for `jax.ShapeDtypeStruct`."""
    return jax.ShapeDtypeStruct(dims, dtype)


def facts() -> dict[str, Any]:
    """Return the device, the memory available to JAX, and the dense bf16 rate of its data sheet, if known."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory": limit,
        "data_sheet": peak_flops([device]),
    }


def ids(config: Any, rows: int, tokens: int) -> Any:
    """Draw random token ids on the device."""
    return jax.random.randint(jax.random.key(0), (rows, tokens), 0, config.vocab_size, jnp.int32)


def sizes_of(params: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of each parameter, dense or quantized."""
    return {name: nbytes(value) for name, value in params.items()}
