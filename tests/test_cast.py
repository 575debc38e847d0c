"""Casting weights and counting the changes.

Start at `test_cast_stats_equal_a_slow_count`; its twin looks at one number at a time.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsmoe_jax.cli import main
from dsmoe_jax.convert import ConversionReport, export_hf, import_hf
from dsmoe_jax.convert.cast import Cast, CastStats
from tests.helpers.hf_folder import hf_tensors, random_params, stop_after, stored, tiny, write_hf

FP32, BF16, FP16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)

LOSSY = pytest.mark.parametrize(
    ("from_dtype", "to_dtype"), [(FP32, BF16), (FP32, FP16), (BF16, FP16), (FP16, BF16)], ids=str
)
EDGES = (
    0.0, -0.0, 1.0, 1 + 2**-7, 1 + 2**-8, 1 + 3 * 2**-9, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 65503.0, 65504.0,
    65519.0, 65520.0, 1e5, -1e5, 3.38e38, 3.4e38, -3.4028234e38, 2**-14, 2**-24, 2**-25, 2**-26, 1e-40, -1e-45,
    math.inf, -math.inf, math.nan,
)  # fmt: skip


def numbers(dtype: np.dtype) -> np.ndarray:
    """Return all 16-bit values, or edge cases and random values of float32."""
    if dtype.itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype)
    random = np.frombuffer(np.random.default_rng(0).bytes(80_000), FP32)
    return np.concatenate([np.array(EDGES, FP32), random, random.view(np.int32).clip(-(1 << 30), 1 << 30).view(FP32)])


def is_nan(array: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # by signaling NaNs
        return np.isnan(array)


def slow_loss(before: np.ndarray, to_dtype: np.dtype) -> CastStats:
    """Count value by value with Python floats, which represent all three dtypes."""
    changed, overflowed, largest = 0, 0, 0.0
    for number in before:
        with np.errstate(all="ignore"):
            old, new = float(number), float(number.astype(to_dtype))
        if old == new or (math.isnan(old) and math.isnan(new)):
            continue
        changed += 1
        if math.isinf(new):
            overflowed += 1
        else:
            largest = max(largest, abs(old - new))
    return CastStats(len(before), changed, overflowed, largest)


def nearest_even(number: float, to_dtype: np.dtype) -> float:
    """Round to float16 by struct.pack and to bfloat16 by bits."""
    if to_dtype == FP16:
        try:
            return struct.unpack("<e", struct.pack("<e", number))[0]
        except OverflowError:
            return math.copysign(math.inf, number)
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    half_below_odd = 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits + half_below_odd >> 16 << 16))[0]


@LOSSY
def test_cast_stats_equal_a_slow_count(from_dtype: np.dtype, to_dtype: np.dtype):
    before = numbers(from_dtype)
    cast = Cast(to_dtype)

    cast(before)

    assert cast.stats == slow_loss(before, to_dtype)
    assert 0 < cast.stats.changed < cast.stats.values
    assert (cast.stats.overflowed > 0) == (from_dtype != FP16)


@LOSSY
def test_cast_rounds_to_nearest_even(from_dtype: np.dtype, to_dtype: np.dtype):
    before = numbers(from_dtype)

    after = Cast(to_dtype)(before)

    assert after.dtype == to_dtype
    want = [math.nan if math.isnan(number) else nearest_even(number, to_dtype) for number in before.tolist()]
    np.testing.assert_array_equal(after.astype(np.float64), np.array(want))
    np.testing.assert_array_equal(np.signbit(after)[~is_nan(after)], np.signbit(before)[~is_nan(before)])


@pytest.mark.parametrize("from_dtype", [BF16, FP16], ids=str)
def test_float32_represents_all_16_bit_values(from_dtype: np.dtype):
    before = numbers(from_dtype)
    cast = Cast(FP32)

    after = cast(before)

    with np.errstate(invalid="ignore"):
        back = after.astype(from_dtype)
    finite = ~is_nan(before)
    assert after.dtype == FP32
    assert back[finite].tobytes() == before[finite].tobytes()
    assert np.isnan(after[~finite]).all()
    assert cast.stats.changed == 0


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_same_dtype_is_not_cast(dtype: np.dtype):
    before = numbers(dtype)
    same, none = Cast(dtype), Cast(None)

    assert same(before) is before
    assert none(before) is before
    assert same.stats == none.stats == CastStats()


def test_nan_and_overflow_are_not_in_the_max_error():
    cast = Cast(FP16)

    after = cast(np.array([math.nan, -math.nan, math.inf, 70_000, -1e30, 1 + 2**-12, 2.0], FP32))

    assert cast.stats == CastStats(values=7, changed=3, overflowed=2, max_error=2**-12)
    assert after[3:5].tolist() == [math.inf, -math.inf]


def test_cast_stats_of_chunks_add_up():
    at_once, pieces = Cast(BF16), Cast(BF16)

    at_once(numbers(FP32))
    for piece in np.array_split(numbers(FP32), 7):
        pieces(piece)

    assert pieces.stats == at_once.stats
    assert sum([at_once.stats, pieces.stats], CastStats()).changed == 2 * at_once.stats.changed


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (CastStats(2_000, 1_234, 0, 0.00195), "1,234 of 2,000 values changed, by 0.00195 at most"),
        (CastStats(9, 2, 2, 0.0), "2 of 9 values changed, by 0 at most; 2 overflowed to infinity"),
    ],
)
def test_cast_stats_are_one_line(loss: CastStats, line: str):
    assert str(loss) == line


# Conversions


def config_loss(dtype: np.dtype) -> CastStats:
    tensors = hf_tensors(tiny(), random_params(tiny()))
    return sum((slow_loss(array.reshape(-1), dtype) for array in tensors.values()), CastStats())


@pytest.mark.parametrize(
    ("source", "option", "is_printed"),
    [
        ("float32", "bfloat16", True),
        pytest.param("float32", "float16", True, marks=pytest.mark.slow),
        ("float32", "keep", False),
        pytest.param("float32", "float32", False, marks=pytest.mark.slow),
        ("bfloat16", "float32", False),
        pytest.param("float16", "float32", False, marks=pytest.mark.slow),
    ],
)
def test_commands_print_cast_stats(
    tmp_path: Path, capsys: pytest.CaptureFixture, source: str, option: str, is_printed: bool
):
    hf = str(write_hf(tmp_path / "hf", tiny(), random_params(tiny()), source))
    native, unchanged, back = (str(tmp_path / name) for name in ("native", "unchanged", "back"))

    codes = [
        main(["convert", hf, native, "--dtype", option]),
        main(["convert", hf, unchanged]),
        main(["export", unchanged, back, "--dtype", option]),
    ]

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  cast:")]
    assert codes == [0, 0, 0]
    assert lines == ([f"  cast: {config_loss(np.dtype(option))}"] * 2 if is_printed else [])
    if option != "keep":
        assert {tensor.dtype for tensor in stored(tmp_path / "back").values()} == {
            {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[option]
        }


@pytest.mark.parametrize("done_before", [10_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (30_000, 59_000))])
def test_cast_stats_of_a_resumed_conversion_are_complete(tmp_path: Path, done_before: int):
    hf = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    import_hf(hf, tmp_path / "unchanged")
    ways: list[tuple[Callable[..., ConversionReport], Path, dict[str, int]]] = [
        (import_hf, hf, {}),
        (export_hf, tmp_path / "unchanged", {"max_shard_size": 1_000}),
    ]

    for convert, source, options in ways:
        out = tmp_path / convert.__name__
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, dtype="bfloat16", **options, progress=stop_after(done_before))

        done = convert(source, out, dtype="bfloat16", **options)

        assert done.reused_bytes > 0
        assert done.cast_stats == config_loss(BF16)
