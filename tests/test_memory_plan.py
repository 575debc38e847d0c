"""The memory plan, computed from the config, against compiled programs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import import_hf
from dsmoe_jax.generate.loading import upcast_for_cpu
from dsmoe_jax.generate.memory_plan import MemoryPlan, cache_bytes, weight_dtypes
from dsmoe_jax.generate.programs import Batch, extend, prefill, step
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import DeepSeekMoE, abstract, split
from dsmoe_jax.quantize import quantize_embedding, quantize_params
from dsmoe_jax.sharding import MeshConfig
from tests.helpers.hf_folder import edit, random_params, tiny, write_hf
from tests.helpers.small import SMALL

pytestmark = pytest.mark.heavy

S = jax.ShapeDtypeStruct


def compiled_bytes(program, *arguments) -> int:
    """Return the memory of a program that is compiled but not run."""
    memory = program.lower(*arguments).compile().memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def abstract_params(config: ModelConfig, dtype, outside) -> dict:
    specs = abstract(config)[1].items()
    return {name: S(spec.shape, dtype if ".experts." in name else outside) for name, spec in specs}


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("bench", jnp.float32), pytest.param("deepseek_moe_16b", jnp.bfloat16, marks=pytest.mark.slow)],
)
def test_plan_matches_the_compiler_within_5_percent(preset: str, dtype):
    config, slots, chunk = ModelConfig.preset(preset), 4096, 512
    graph = abstract(config)[0]
    params = abstract_params(config, dtype, jnp.float32)  # as after `upcast_for_cpu`
    cache = jax.eval_shape(lambda: KVCache.empty(config, 1, slots, jnp.float32))
    row, ids = S((1,), jnp.int32), S((1, chunk), jnp.int32)

    plan = MemoryPlan.of(config, batch_size=1, max_length=slots, dtype=dtype, prefill_chunk=chunk, upcast=True)
    read = compiled_bytes(extend, graph, params, cache, ids, row)
    stepped = compiled_bytes(step, graph, None, params, Batch(cache, None), row, S((1,), bool), None, row)

    np.testing.assert_allclose(plan.weights + plan.prompt_cache + plan.activations, read, rtol=0.05)
    np.testing.assert_allclose(plan.weights + plan.cache, stepped, rtol=0.05)


@pytest.mark.slow
def test_first_chunk_fits_the_plan():
    config = ModelConfig.preset("bench")
    params = abstract_params(config, jnp.float32, jnp.float32)

    plan = MemoryPlan.of(config, batch_size=1, max_length=512, dtype=jnp.float32)
    arguments = (abstract(config)[0], 512, jnp.float32, params, S((1, 512), jnp.int32), S((1,), jnp.int32))

    assert compiled_bytes(prefill, *arguments) <= 1.05 * (plan.weights + plan.prompt_cache + plan.activations)


def test_16b_in_bf16_with_4096_tokens_fits_40_gb():
    plan = MemoryPlan.of(ModelConfig.preset("deepseek_moe_16b"), batch_size=1, max_length=4096)

    assert plan.total < 40e9
    assert plan.weights == 32_751_456_256


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_quantized_weights_match_the_plan(scheme: str):
    params = quantize_embedding(quantize_params(split(DeepSeekMoE.init(SMALL))[1], scheme))

    for on_cpu, stored in ((False, params), (True, upcast_for_cpu(params))):
        plan = MemoryPlan.of(SMALL, batch_size=1, max_length=16, dtype=jnp.float32, quantize=scheme, upcast=on_cpu)

        assert plan.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(stored))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_cache_matches_the_plan(dtype):
    cache = KVCache.empty(SMALL, 3, 48, dtype)

    assert cache_bytes(SMALL, 3, 48, dtype=dtype) == sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))


def test_plan_of_a_mesh_is_per_device():
    config = ModelConfig.preset("deepseek_moe_16b")

    one = MemoryPlan.of(config, batch_size=8, max_length=4096)
    each = MemoryPlan.of(config, batch_size=8, max_length=4096, mesh=MeshConfig(fsdp=2, expert=4))

    assert each.cache * 8 == one.cache
    assert one.weights / 8 < each.weights < one.weights / 6


@pytest.mark.parametrize("declared", ["float32", None, "bfloat16"])
def test_plan_uses_the_dtypes_of_the_tensors(tmp_path: Path, declared: str | None):
    write_hf(tmp_path / "hf", tiny(torch_dtype=declared), random_params(tiny()), "bfloat16")
    import_hf(tmp_path / "hf", tmp_path / "native")
    edit("config.json", lambda fields: fields.update(torch_dtype=declared))(tmp_path / "native")

    stored = sum(array.size for array in random_params(tiny()).values()) * 2
    for folder in (tmp_path / "hf", tmp_path / "native"):
        plan = MemoryPlan.of(tiny(), batch_size=1, max_length=16, dtype=weight_dtypes(folder, tiny()))
        assert plan.weights == stored


def test_plan_prints_one_line():
    assert str(MemoryPlan(32_800_000_000, 940_000_000, 940_000_000, 0)) == (
        "34.7 GB (weights 32.8 GB, cache 940 MB, prompt cache 940 MB)"
    )
