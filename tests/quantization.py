"""`python -m tests.quantization` prints the README's tables: error and memory of quantization.

First the weights, then the KL divergence on the golden cases with quantized weights, or a quantized cache.
"""

import unittest

import jax
import jax.numpy as jnp
import numpy as np

from dsmoe_jax.axes import Array
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import DeepSeekMoE, abstract, assemble, split
from dsmoe_jax.quantize import KINDS, SCHEMES, kind_of, quantize_embedding, quantize_params
from tests.helpers import golden
from tests.helpers.quantization import relative_error, usage

CASE = "a_baseline"
PRESET = "deepseek_moe_16b"
EXPERTS = 2  # of a stack: tiles are independent


def random_params(config: ModelConfig) -> dict[str, Array]:
    """The weights of the first two layers, N(0, 0.02²)."""
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(0.02 * rng.standard_normal(((EXPERTS,) if len(spec.shape) == 3 else ()) + spec.shape[-2:]))
        for name, spec in abstract(config)[1].items()
        if kind_of(name) and name.startswith(("layers.0.", "layers.1."))
    }


def row(source: str, params: dict[str, Array], scheme: str, double: bool) -> str:
    """One line of the table."""
    quantized = quantize_params(params, scheme, double=double)
    error, used = relative_error(params, quantized), usage(quantized)
    bits = 8 * sum(used[kind].bytes for kind in error) / sum(used[kind].weights for kind in error)
    errors = " | ".join(f"{error[kind]:.4f}" for kind in KINDS)
    return f"| {source} | {scheme}{' twice' if double else ''} | {bits:.3f} | {errors} |"


def logits(model: DeepSeekMoE, ids: np.ndarray, cache_dtype) -> np.ndarray:
    """Decode token by token with a cache; return the logits [B, T, V]."""
    empty = KVCache.empty(model.config, len(ids), ids.shape[1], cache_dtype)

    def read(cache: KVCache, token: Array) -> tuple[KVCache, Array]:
        hidden = model.hidden(token[:, None], cache=cache)
        assert hidden.cache is not None
        return hidden.cache, model.logits(hidden.last_hidden_state[:, 0])

    return np.asarray(jax.jit(lambda ids: jax.lax.scan(read, empty, ids.T)[1])(jnp.asarray(ids))).swapaxes(0, 1)


def accuracy(case: str) -> list[str]:
    """Rows of the second table: KL(fp32 || quantized) in nats per token, mean and worst, and the top-1 agreement."""
    ids, model = golden.tensors(case)["in.input_ids"], golden.model(case)
    params = split(model)[1]
    kinds = {
        "bfloat16": (golden.model(case, "bfloat16"), jnp.bfloat16),
        **{
            scheme: (assemble(model.config, quantize_embedding(quantize_params(params, scheme))), jnp.float32)
            for scheme in SCHEMES
        },
        "int8 cache": (model, jnp.int8),
    }
    exact = jax.nn.log_softmax(logits(model, ids, jnp.float32))
    lines = []
    for kind, (other, cache_dtype) in kinds.items():
        found = jax.nn.log_softmax(logits(other, ids, cache_dtype))
        kl = np.asarray((jnp.exp(exact) * (exact - found)).sum(-1))
        same = float((exact.argmax(-1) == found.argmax(-1)).mean())
        lines.append(f"| `{case}` | {kind} | {kl.mean():.1e} | {kl.max():.1e} | {same:.3f} |")
    return lines


def main() -> None:
    """Print both tables."""
    columns = ("weights", "scheme", "bits", *KINDS)
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    sources = {
        f"`{CASE}`": split(golden.model(CASE))[1],
        f"N(0, 0.02²), `{PRESET}`": random_params(ModelConfig.preset(PRESET)),
    }
    for source, params in sources.items():
        for scheme in SCHEMES:
            for double in (False, True)[: 1 if scheme == "int8" else 2]:
                print(row(source, params, scheme, double))
    print("\n| case | weights | KL, mean | KL, worst | top-1 agreement |\n| --- | --- | --- | --- | --- |")
    for case in golden.CASES:
        try:
            print("\n".join(accuracy(case)))
        except unittest.SkipTest as absent:
            print(f"| `{case}` | {absent} |")


if __name__ == "__main__":
    main()
