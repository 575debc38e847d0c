"""Quantization: published codebooks, single weights, models, and checkpoints quantized while loading.

Start at `test_codes_and_scales_equal_a_tilewise_reference`.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsmoe_jax.checkpoint.native import save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import import_hf
from dsmoe_jax.kernels.codebooks import DYNAMIC, NF4, nearest
from dsmoe_jax.kernels.operand import EXPERT_AXES, LowRank, Quantized, leaf_axes
from dsmoe_jax.loading import load, load_params
from dsmoe_jax.model import abstract, assemble, split
from dsmoe_jax.quantize import (
    SCHEMES,
    kind_of,
    quantize,
    quantize_matrix,
    quantize_params,
)
from dsmoe_jax.sharding import spec
from tests.helpers import reference
from tests.helpers.hf_folder import VARIANTS, edit, flip_bit, random_params, tiny, write_hf
from tests.helpers.meshes import MESHES
from tests.helpers.quantization import relative_error, usage
from tests.test_streaming import GROWTH, REPOSITORY, write_sparse

E, O, I = 2, 130, 128  # noqa: E741  # 260 tiles of 64 a matrix, so the scales have two tiles, the last one short
ODD = (3, 5, 26)  # tiles span rows, and the last one is short

ROUNDING = 1e-4  # of half a step: codes are chosen in fp32

every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def weights(*shape: int) -> np.ndarray:
    return (0.02 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


@jax.jit
@jax.vmap
def dequantize(quantized: Quantized) -> jax.Array:
    return quantized.dequantize()


def leaves(value: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(value)]


def assert_same(got: Any, want: Any):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(leaves(got), leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


# --- codebooks ---


def test_nf4_has_the_published_values():
    """arXiv 2305.14314, appendix E."""
    assert NF4 == (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip


def test_the_codebook_of_scales_has_the_published_values():
    """Dynamic tree quantization (arXiv 1511.04561, §2; arXiv 2110.02861, §2.1) with a sign, 7 exponents, 8 bits."""
    values = np.array(DYNAMIC)

    assert len(values) == len(set(DYNAMIC)) == 256
    assert (np.diff(values) > 0).all()
    assert values[127] == 0
    assert values[255] == 1
    np.testing.assert_array_equal(-values[:127][::-1], values[128:255])
    # The largest are 1/64 of [0.1, 1] apart and half of that below 1; the smallest is the middle of [0.1, 1] · 1e-6.
    np.testing.assert_allclose(values[:3], [-0.9929688, -0.9789063, -0.9648438], rtol=1e-6)
    np.testing.assert_allclose(values[128:131], [5.5e-7, 3.25e-6, 7.75e-6], rtol=1e-6)
    assert [((10.0**-n / 10 < values) & (values < 10.0**-n)).sum() for n in range(7)] == [64, 32, 16, 8, 4, 2, 1]


def test_codes_follow_the_published_thresholds():
    """Four thresholds of bitsandbytes' kernel, which compares with >."""
    on = np.array([-0.8480964004993439, -0.045525018125772476, 0.03979014977812767, 0.8614784181118011], np.float32)

    assert nearest(jnp.asarray(on), NF4).tolist() == [0, 6, 7, 14]
    assert nearest(jnp.asarray(np.nextafter(on, np.float32(2))), NF4).tolist() == [1, 7, 8, 15]


@pytest.mark.parametrize("codebook", [NF4, DYNAMIC], ids=["nf4", "dynamic"])
def test_codebook_values_map_to_their_codes(codebook: tuple[float, ...]):
    assert nearest(jnp.asarray(codebook), codebook).tolist() == list(range(len(codebook)))


# --- one weight ---


def test_bytes_equal_those_of_bitsandbytes():
    """By hand: 0.35 of 2 is nearest to 0.161 (code 9), -1 to -0.525 (2), 2 to 1 (15), -2 to -1 (0)."""
    quantized = quantize(np.array([[0.35, -1, 2, -2]], np.float32), "nf4", double=False)

    assert quantized.codes.tolist() == [[0x92, 0xF0]]
    assert quantized.scales.tolist() == [2]


@every_scheme
@pytest.mark.parametrize("shape", [(E, O, I), ODD], ids=["whole tiles", "short tile"])
def test_codes_and_scales_equal_a_tilewise_reference(scheme: str, shape: tuple[int, int, int]):
    codebook, largest, tile = SCHEMES[scheme]
    weight = weights(*shape)

    got = quantize(weight, scheme, double=False)

    for e, matrix in enumerate(weight):
        units, scales = reference.encode(
            matrix.ravel(), codebook or tuple(map(float, range(-127, 128))), tile or shape[2], largest
        )
        np.testing.assert_array_equal(reference.unscaled(got)[e].ravel(), units)
        np.testing.assert_array_equal(np.asarray(got.scales[e]).ravel(), scales)
    np.testing.assert_allclose(dequantize(got), reference.dequantize(got), rtol=1e-6)


@pytest.mark.parametrize("shape", [(E, O, I), ODD], ids=["two tiles of scales", "one"])
def test_double_quantization_of_scales(shape: tuple[int, int, int]):
    weight = weights(*shape)

    once, twice = quantize(weight, "nf4", double=False), quantize(weight, "nf4")

    np.testing.assert_array_equal(twice.codes, once.codes)
    for e, scales in enumerate(np.asarray(once.scales)):
        offset = np.asarray(twice.scales.offset[e])
        np.testing.assert_allclose(offset, scales.astype(np.float64).mean(), rtol=1e-6)
        units, of_scales = reference.encode(scales - offset, DYNAMIC, 256)
        np.testing.assert_array_equal(reference.unscaled(twice.scales)[e], units)
        np.testing.assert_array_equal(twice.scales.scales[e], of_scales)
    np.testing.assert_allclose(dequantize(twice), reference.dequantize(twice), rtol=1e-5, atol=1e-9)


# The largest quantization error: half the widest gap of the codebook, times the scale.
STEPS = {"int8": 0.5, "int4": 0.5, "nf4": (1 - 0.6961928009986877) / 2}


@every_scheme
def test_the_error_of_values_is_at_most_half_a_step(scheme: str):
    weight = weights(E, O, I)
    _, largest, tile = SCHEMES[scheme]

    change = np.abs(dequantize(quantize(weight, scheme, double=False)) - weight).reshape(-1, tile or I)

    absmax = np.abs(weight).reshape(-1, tile or I).max(axis=1, keepdims=True)
    assert (change <= (1 + ROUNDING) * STEPS[scheme] * absmax / largest).all()


@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_the_error_of_scales_is_at_most_half_a_step(scheme: str):
    weight = weights(E, O, I)

    once, twice = quantize(weight, scheme, double=False), quantize(weight, scheme)

    for e, scales in enumerate(np.asarray(once.scales)):
        change = np.abs(np.asarray(jax.tree.map(lambda leaf: leaf[e], twice.scales).dequantize()) - scales)  # noqa: B023
        largest = np.abs(scales - scales.mean()).max()
        assert change.max() <= (1 + ROUNDING) * 0.9 / 64 / 2 * largest


@pytest.mark.parametrize("double", [False, True])
@every_scheme
def test_zeros_stay_zeros(scheme: str, double: bool):
    weight = np.zeros((E, O, I), np.float32)
    weight[1, 1] = 1e-40  # a scale whose reciprocal is infinite
    weight[1, 70] = 1

    values = dequantize(quantize(weight, scheme, double=double))

    assert (values[0] == 0).all()
    assert (values[1, :70] == 0).all()
    assert (values[1, 71:] == 0).all()
    np.testing.assert_allclose(values[1, 70], 1, rtol=0.01)


@every_scheme
def test_a_matrix_is_quantized_as_in_a_stack(scheme: str):
    stack = weights(E, O, I)

    alone = quantize(stack[1], scheme)

    assert_same(alone, jax.tree.map(lambda leaf: leaf[1], quantize(stack, scheme)))


@every_scheme
def test_numpy_jax_and_mapped_weights_give_equal_codes(scheme: str):
    weight = weights(*ODD).astype(ml_dtypes.bfloat16)

    want = quantize(weight.astype(np.float32), scheme)

    for same in (weight, jnp.asarray(weight), list(weight)):
        assert_same(quantize(same, scheme), want)


@every_scheme
def test_quantize_matrix_is_traceable(scheme: str):
    weight = weights(*ODD)

    got = jax.jit(jax.vmap(lambda matrix: quantize_matrix(matrix, SCHEMES[scheme], double=True)))(weight)

    assert jax.tree.structure(got) == jax.tree.structure(quantize(weight, scheme))
    np.testing.assert_allclose(dequantize(got), dequantize(quantize(weight, scheme)), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("double", [False, True])
@every_scheme
def test_non_finite_values_are_rejected_by_name(scheme: str, double: bool, value: float):
    weight = weights(*ODD)
    weight[2, 4, 25] = value

    with pytest.raises(ValueError, match=r"^gate\[2\] has values that are not finite$"):
        quantize(weight, scheme, double=double, name="gate")


def test_bad_weights_and_schemes_are_rejected():
    with pytest.raises(ValueError, match=r"^scheme must be one of int8, int4, nf4, got 'int3'$"):
        quantize(weights(4, 4), "int3")
    for scheme in ("int4", "nf4"):
        with pytest.raises(ValueError, match=f"^gate must have rows of even length for {scheme}, got 7$"):
            quantize(weights(2, 4, 7), scheme, name="gate")
    assert quantize(weights(2, 4, 7), "int8").codes.shape == (2, 4, 7)


# Of the 16B's [1408, 2048]. int8: a scale for each output. 4-bit: one for each 64 values, 4 bytes, or 1 byte, 4 more
# for 256 of those, and 4 for the mean.
BITS = {
    ("int8", True): 8 + 32 / 2048,
    ("int4", False): 4 + 32 / 64,
    ("int4", True): 4 + 8 / 64 + 32 / 64 / 256 + 32 / (1408 * 2048),
    ("nf4", False): 4 + 32 / 64,
    ("nf4", True): 4 + 8 / 64 + 32 / 64 / 256 + 32 / (1408 * 2048),
}


@pytest.mark.parametrize(("scheme", "double"), BITS)
def test_bits_per_weight_of_the_16b(scheme: str, double: bool):
    name, weight = "layers.1.moe.experts.gate", np.broadcast_to(np.float32(1), (1, 1408, 2048))

    used = usage({name: quantize(weight, scheme, double=double)})

    assert used["routed"].weights == 1408 * 2048
    assert used["routed"].bits == BITS[scheme, double] <= {"int8": 8.02, "int4": 4.5, "nf4": 4.5}[scheme]


# --- models ---


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_only_projections_are_quantized(changes: dict[str, Any]):
    for name in abstract(tiny(**changes))[1]:
        left = name in ("embed", "head.weight", "norm.weight") or name.endswith((".bias", "_norm.weight"))
        assert (kind_of(name) is None) == (left or name.endswith("router.weight")), name
    assert kind_of("layers.12.attention.q.weight") == "attention"
    assert kind_of("layers.0.mlp.down.weight") == "dense"
    assert kind_of("layers.1.moe.shared.up.weight") == "shared"
    assert kind_of("layers.1.moe.experts.gate") == "routed"


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_quantize_params_quantizes_each_parameter(scheme: str):
    params = {name: jnp.asarray(value) for name, value in random_params(tiny()).items()}

    quantized = quantize_params(params, scheme)

    assert quantized.keys() == params.keys()
    for name, value in quantized.items():
        if kind_of(name):
            assert_same(value, quantize(params[name], scheme))
        else:
            assert value is params[name]
    error, used = relative_error(params, quantized), usage(quantized)
    assert error.keys() == {"attention", "dense", "shared", "routed"} == used.keys() - {"other"}
    assert max(error.values()) < {"int8": 0.01, "nf4": 0.11}[scheme]
    assert sum(kind.weights for kind in used.values()) == sum(value.size for value in params.values())
    assert sum(kind.bytes for kind in used.values()) == sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))


def test_the_error_is_relative_to_the_weights():
    name = "layers.0.mlp.up.weight"
    quantized = quantize(np.array([[3.0, 4.0]], np.float32), "int8")

    assert relative_error({name: np.array([[0.0, 4.0]])}, {name: quantized})["dense"] == pytest.approx(3 / 4, rel=1e-2)


@pytest.mark.parametrize("of", ["quantized", "adapted"])
def test_parameters_that_are_not_dense_are_rejected(of: str):
    dense = jnp.ones((4, 4))
    value = quantize(dense, "int8") if of == "quantized" else LowRank(dense, dense, dense)

    with pytest.raises(ValueError, match=r"^layers\.0\.mlp\.up\.weight must be dense"):
        quantize_params({"layers.0.mlp.up.weight": value}, "nf4")


# --- checkpoints ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "saved"
    save(assemble(tiny(), {name: jnp.asarray(value) for name, value in random_params(tiny()).items()}), path)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_quantizing_while_loading_equals_load_then_quantize(saved: Path):
    config, params = load_params(saved, quantize="nf4")

    assert config == tiny()
    want = quantize_params(split(load(saved))[1], "nf4")
    assert params.keys() == want.keys()
    for name, value in params.items():
        assert_same(value, want[name])


def test_a_hugging_face_folder_quantizes_as_a_native_one(tmp_path: Path, saved: Path):
    write_hf(tmp_path, tiny(), random_params(tiny()), shards=3)

    config, params = load_params(tmp_path, quantize="nf4", mesh=MESHES["expert=8"], dtype="bfloat16")

    want = load_params(saved, quantize="nf4", dtype="bfloat16")[1]
    assert (config.to_dict(), params.keys()) == (tiny().to_dict(), want.keys())
    for name, value in params.items():
        assert_same(value, want[name])
    stack: Any = params["layers.1.moe.experts.down"]
    assert stack.codes.addressable_shards[0].data.shape == (1, 32, 8)


def test_dtype_casts_only_dense_parameters(saved: Path):
    _, params = load_params(saved, quantize="nf4", dtype="bfloat16")

    assert_same(params["embed"], random_params(tiny(), ml_dtypes.bfloat16)["embed"])
    name = "layers.1.moe.experts.gate"
    assert_same(params[name], quantize(random_params(tiny())[name], "nf4"))


@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=2,tensor=2,fsdp=2"])
def test_experts_are_sharded_and_the_rest_is_replicated(saved: Path, mesh: str):
    alone = load_params(saved, quantize="nf4")[1]

    _, params = load_params(saved, quantize="nf4", mesh=MESHES[mesh])
    later = quantize_params(split(load(saved, mesh=MESHES[mesh]))[1], "nf4")

    for name, value in params.items():
        assert_same(value, alone[name])
        assert_same(later[name], alone[name])
        for leaf, other in zip(jax.tree.leaves(value), jax.tree.leaves(later[name]), strict=True):
            assert leaf.sharding == other.sharding, name
            assert len(leaf.addressable_shards) == 8
    stack: Any = params["layers.1.moe.experts.gate"]
    wanted = [spec(axes) for axes in leaf_axes(stack, EXPERT_AXES[0])]
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(stack)] == wanted
    assert stack.codes.addressable_shards[0].data.shape == (8 // MESHES[mesh].expert, 16, 16)


def test_a_damaged_checkpoint_is_rejected(copy: Path):
    flip_bit(copy / "parameters/state/embed/c/0/0", at=100)

    with pytest.raises(ValueError, match=r"damaged: .*SHA-256 \(tensor embed\)"):
        load_params(copy, quantize="nf4")

    assert load_params(copy, quantize="nf4", verify=False)[0] == tiny()


BAD = {
    "not native": (lambda folder: (folder / "dsmoe_jax.json").unlink(), "not a native checkpoint"),
    "a layer more": (edit("config.json", lambda c: c.update(num_hidden_layers=3)), r"layers\.2\.\S+ is missing"),
    "a layer less": (edit("config.json", lambda c: c.update(num_hidden_layers=1)), r"layers\.1\.\S+ is unexpected"),
    "no array": (lambda folder: shutil.rmtree(folder / "parameters/state/embed"), "state/embed"),
    "another array": (
        lambda folder: shutil.copytree(
            folder / "parameters/state/layers.0.attention.q.weight",
            folder / "parameters/state/embed",
            dirs_exist_ok=True,
        ),
        r"tensor embed has shape \[32, 32\], the config asks for \[64, 32\]",
    ),
}


@pytest.mark.parametrize(("spoil", "named"), BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_rejected(copy: Path, spoil: Any, named: str):
    spoil(copy)

    with pytest.raises(ValueError, match=named) as refused:
        load_params(copy, quantize="nf4", verify=False)

    assert "\n" not in str(refused.value)
    assert str(copy) in str(refused.value)


def test_non_finite_weights_are_rejected_while_reading(tmp_path: Path):
    name = "layers.1.moe.experts.up"
    params = random_params(tiny())
    params[name][5, 0, 0] = np.nan
    save(assemble(tiny(), {name: jnp.asarray(value) for name, value in params.items()}), tmp_path / "out")

    with pytest.raises(ValueError, match=r"^layers\.1\.moe\.experts\.up\[5\] has values that are not finite$"):
        load_params(tmp_path / "out", quantize="nf4")


# --- memory ---

# Prints the peak growth of anonymous memory during a warm load, and the bytes of its result.
MEASURE = """
import json, sys, threading
import jax
from dsmoe_jax.loading import load_params

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

def growth(path):
    start, peak, over = anonymous(), 0, threading.Event()
    def watch():
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous())
    watching = threading.Thread(target=watch)
    watching.start()
    params = load_params(path, quantize="nf4")[1]
    over.set()
    watching.join()
    return peak - start, sum(leaf.nbytes for leaf in jax.tree.leaves(params))

for size in ("small", "large"):
    grown = growth(f"{sys.argv[1]}/{size}")
print(json.dumps(grown))
"""


def large() -> ModelConfig:
    """320 MB of experts in bf16."""
    return tiny(hidden_size=1024, intermediate_size=1024, moe_intermediate_size=1408, n_routed_experts=36)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is what Linux tells of a process")
def test_the_dense_model_is_never_in_memory(tmp_path: Path):
    size = write_sparse(tmp_path / "large-hf", large())
    write_sparse(tmp_path / "small-hf", tiny())
    for name in ("small", "large"):
        import_hf(tmp_path / f"{name}-hf", tmp_path / name)

    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    finally:
        for folder in tmp_path.iterdir():  # hundreds of megabytes
            shutil.rmtree(folder)

    grown, kept = json.loads(done.stdout)
    print(f"{size / 2**20:.0f} MiB in bf16, {kept / 2**20:.0f} MiB quantized: {grown / 2**20:.0f} MiB at most")
    assert size > 3.5 * kept
    assert size >= 5 * GROWTH
    assert grown <= kept + 2 * GROWTH
