"""What XLA makes of the programs on an H100, without one: what is launched, what is read, what is held.

Skipped where jax's CUDA plugin is not installed (`pip install -e '.[test,gpu]'`); no GPU and no driver are needed.
Kernels are compiled and not run, so nothing here says that a number is right or how fast it is: `tests/gpu` and the
benchmark do.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.generate.memory_plan import MemoryPlan
from dsmoe_jax.generate.programs import Batch, empty, extend, step
from dsmoe_jax.kernels import attention, grouped_matmul, plain
from dsmoe_jax.kernels.expert_ffn import expert_ffn
from dsmoe_jax.kernels.tuning import Legs
from dsmoe_jax.model import abstract
from dsmoe_jax.plan import absent_gpu
from dsmoe_jax.plan.compiled import lower_step
from dsmoe_jax.quantize import kind_of, quantized_spec
from dsmoe_jax.sharding import MeshConfig, make_mesh
from dsmoe_jax.train.recipes import RECIPES

pytestmark = pytest.mark.heavy

CONFIG = dataclasses.replace(ModelConfig.preset("deepseek_moe_16b"), num_hidden_layers=2)  # the first is dense
EXPERTS = 3 * (CONFIG.n_routed_experts or 0) * CONFIG.hidden_size * CONFIG.moe_intermediate_size  # weights of a layer
SLOTS = 1024


@pytest.fixture(scope="module")
def place() -> Iterator[Any]:
    """Where the arrays of a program would lie, while everything is chosen as on a GPU."""
    try:
        device = absent_gpu.devices("h100")[0]
    except ValueError as error:
        pytest.skip(str(error))
    with absent_gpu.chosen_as_on_gpu():
        yield jax.sharding.SingleDeviceSharding(device)


def there(place: Any, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


def compiled(program: Any, *arguments: Any) -> Any:
    return program.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


def params(scheme: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, spec in abstract(CONFIG)[1].items():
        found[name] = jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16)
        if scheme is not None and (kind_of(name) or name == "embed"):
            found[name] = quantized_spec(spec.shape, scheme, double=False)
    return found


@functools.cache
def decode_step(place: Any, rows: int, scheme: str | None = None) -> Any:
    cache = jax.eval_shape(lambda: empty(CONFIG, rows, SLOTS, jnp.bfloat16))
    row = [jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.bool_, jnp.int32)]
    token, active, drawn = there(place, row)
    return compiled(
        step,
        abstract(CONFIG)[0],
        None,
        there(place, params(scheme)),
        there(place, Batch(cache, None)),
        token,
        active,
        None,
        drawn,
    )


def launches(program: Any) -> list[str]:
    """The operations of the program that are kernels or loops, by kind."""
    main = program.as_text().partition("\nENTRY ")[2]
    return re.findall(r"^\s+\S+ = .*? (fusion|while|custom-call|sort|copy|conditional)\(", main, re.MULTILINE)


@pytest.mark.parametrize(("rows", "most"), [(1, 50), (8, 60), (32, 55)])
def test_a_decode_step_has_no_loop_and_few_launches(rows: int, most: int, place: Any):
    found = launches(decode_step(place, rows))

    assert "while" not in found
    assert 20 < len(found) <= most


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_decode_step_reads_the_experts_where_they_lie(scheme: str | None, rows: int, place: Any):
    """A copy of a third of them, in bf16, would be more than all temporaries together."""
    memory = decode_step(place, rows, scheme).memory_analysis()

    assert memory.temp_size_in_bytes < 2 * EXPERTS / 3 / 2


def test_the_cache_is_written_in_place(place: Any):
    memory = decode_step(place, 8).memory_analysis()

    cache = 2 * CONFIG.num_hidden_layers * 8 * SLOTS * CONFIG.hidden_size * 2
    assert memory.alias_size_in_bytes >= cache


def test_the_plan_is_what_the_compiler_says_within_5_percent(place: Any):
    plan = MemoryPlan.of(CONFIG, batch_size=1, max_length=SLOTS, dtype=jnp.bfloat16, prefill_chunk=512)
    cache = there(place, jax.eval_shape(lambda: empty(CONFIG, 1, SLOTS, jnp.bfloat16)))
    ids, count = there(place, [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 512), (1,))])

    read = compiled(extend, abstract(CONFIG)[0], there(place, params(None)), cache, ids, count)

    for program, want in (
        (read, plan.weights + plan.prompt_cache + plan.activations),
        (decode_step(place, 1), plan.weights + plan.cache),
    ):
        memory = program.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        np.testing.assert_allclose(held + memory.temp_size_in_bytes, want, rtol=0.05)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # since jax 0.11
@pytest.mark.parametrize(("backend", "rows"), [("batched", 4096), ("grouped", 4096)])
def test_every_backend_compiles_with_its_gradients(
    backend: str, rows: int, place: Any, monkeypatch: pytest.MonkeyPatch
):
    """`grouped` by our own kernels: tokamax asks the device."""
    monkeypatch.setattr(grouped_matmul, "available", lambda name: None if name == "pallas" else "not requested")
    monkeypatch.setattr(plain, "_GROUPED", Legs("pallas", "pallas", "pallas"))
    E, D, F = CONFIG.n_routed_experts or 0, CONFIG.hidden_size, CONFIG.moe_intermediate_size
    shapes = [(rows, D), (E, F, D), (E, F, D), (E, D, F)]
    operands = there(place, [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes])
    sizes = there(place, jax.ShapeDtypeStruct((E,), jnp.int32))

    @jax.jit
    def both(operands: Any, sizes: Any) -> Any:
        y, pull = jax.vjp(lambda r, g, u, d: expert_ffn(r, g, u, d, sizes, backend=backend), *operands)
        return y, pull(y)

    try:
        text = compiled(both, operands, sizes).as_text()
    except RuntimeError as error:
        pytest.skip(f"jax {jax.__version__} asks the device about Pallas kernels: {str(error).splitlines()[0]}")

    assert ("pallas_call" in text) == (backend == "grouped")


# Narrow, so that sequences are longer than anything else.
NARROW = dataclasses.replace(
    CONFIG,
    **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128},
    **{
        "num_hidden_layers": 1,
        "first_k_dense_replace": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    },
)
TOKENS = 4096  # XLA merges the scores of chunks up to 32 MB


def largest_array(text: str) -> int:
    """The most elements of an array of a program, also within fusions."""
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))


def training_step(place: Any) -> str:
    run = RECIPES["deepseek_moe_16b"]()
    run = dataclasses.replace(run, step=dataclasses.replace(run.step, gradient_accumulation_steps=1))
    return lower_step(run, NARROW, make_mesh(MeshConfig(), list(place.device_set)), (1, TOKENS)).compile().as_text()


def prefill(place: Any) -> str:
    weights = {name: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16) for name, spec in abstract(NARROW)[1].items()}
    cache = jax.eval_shape(lambda: empty(NARROW, 1, TOKENS, jnp.bfloat16))
    ids, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, TOKENS), (1,)))
    with jax.set_mesh(make_mesh(MeshConfig(), list(place.device_set))):  # from which Pallas knows the GPU
        return compiled(extend, abstract(NARROW)[0], *there(place, (weights, cache, ids, count))).as_text()


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # since jax 0.11
@pytest.mark.parametrize("backend", ["", "pallas"])
@pytest.mark.parametrize("program", [training_step, prefill])
def test_no_program_has_an_array_of_all_scores(program: Any, backend: str, place: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(attention.VARIABLE, backend)
    jax.clear_caches()  # of blocks traced with another backend

    text = program(place)

    assert largest_array(text) < TOKENS**2
    assert ("flash_attention" in text) == (backend == "pallas")
