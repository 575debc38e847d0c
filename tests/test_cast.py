"""Weights in another dtype: what the cast gives, and what it says that it lost.

Start at `test_the_loss_is_that_of_a_slow_count`; its twin looks at one number at a time.
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
from dsmoe_jax.convert.cast import Cast, Loss
from tests.helpers.hf_folder import hf_tensors, random_params, stop_after, stored, tiny, write_hf

FP32, BF16, FP16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)

LOSSY = pytest.mark.parametrize(
    ("with_dtype", "wanted"), [(FP32, BF16), (FP32, FP16), (BF16, FP16), (FP16, BF16)], ids=str
)
EDGES = (
    0.0, -0.0, 1.0, 1 + 2**-7, 1 + 2**-8, 1 + 3 * 2**-9, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 65503.0, 65504.0,
    65519.0, 65520.0, 1e5, -1e5, 3.38e38, 3.4e38, -3.4028234e38, 2**-14, 2**-24, 2**-25, 2**-26, 1e-40, -1e-45,
    math.inf, -math.inf, math.nan,
)  # fmt: skip


def numbers(dtype: np.dtype) -> np.ndarray:
    """Every number that 16 bits can be; of float32 the edges and some at random, NaN payloads among them."""
    if dtype.itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype)
    random = np.frombuffer(np.random.default_rng(0).bytes(80_000), FP32)
    return np.concatenate([np.array(EDGES, FP32), random, random.view(np.int32).clip(-(1 << 30), 1 << 30).view(FP32)])


def is_nan(array: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling ones say so
        return np.isnan(array)


def slow_loss(before: np.ndarray, wanted: np.dtype) -> Loss:
    """One number after another in Python's floats, which hold every value of the three dtypes."""
    changed, overflowed, largest = 0, 0, 0.0
    for number in before:
        with np.errstate(all="ignore"):
            old, new = float(number), float(number.astype(wanted))
        if old == new or (math.isnan(old) and math.isnan(new)):
            continue
        changed += 1
        if math.isinf(new):
            overflowed += 1
        else:
            largest = max(largest, abs(old - new))
    return Loss(len(before), changed, overflowed, largest)


def nearest_even(number: float, wanted: np.dtype) -> float:
    """The number rounded by the rule itself, with Python's own pack for float16 and on the bits for bfloat16."""
    if wanted == FP16:
        try:
            return struct.unpack("<e", struct.pack("<e", number))[0]
        except OverflowError:
            return math.copysign(math.inf, number)
    bits = struct.unpack("<I", struct.pack("<f", number))[0]
    half_below_odd = 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits + half_below_odd >> 16 << 16))[0]


@LOSSY
def test_the_loss_is_that_of_a_slow_count(with_dtype: np.dtype, wanted: np.dtype):
    before = numbers(with_dtype)
    cast = Cast(wanted)

    cast(before)

    assert cast.loss == slow_loss(before, wanted)
    assert 0 < cast.loss.changed < cast.loss.values
    assert (cast.loss.overflowed > 0) == (with_dtype != FP16)


@LOSSY
def test_every_number_becomes_the_nearest_and_of_two_the_even_one(with_dtype: np.dtype, wanted: np.dtype):
    before = numbers(with_dtype)

    after = Cast(wanted)(before)

    assert after.dtype == wanted
    want = [math.nan if math.isnan(number) else nearest_even(number, wanted) for number in before.tolist()]
    np.testing.assert_array_equal(after.astype(np.float64), np.array(want))
    np.testing.assert_array_equal(np.signbit(after)[~is_nan(after)], np.signbit(before)[~is_nan(before)])


@pytest.mark.parametrize("with_dtype", [BF16, FP16], ids=str)
def test_float32_holds_every_number_of_16_bits(with_dtype: np.dtype):
    before = numbers(with_dtype)
    cast = Cast(FP32)

    after = cast(before)

    with np.errstate(invalid="ignore"):
        back = after.astype(with_dtype)
    finite = ~is_nan(before)
    assert after.dtype == FP32
    assert back[finite].tobytes() == before[finite].tobytes()
    assert np.isnan(after[~finite]).all()
    assert cast.loss.changed == 0


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_what_has_the_dtype_already_is_not_touched(dtype: np.dtype):
    before = numbers(dtype)
    same, none = Cast(dtype), Cast(None)

    assert same(before) is before
    assert none(before) is before
    assert same.loss == none.loss == Loss()


def test_a_nan_is_not_counted_and_an_overflow_is_not_the_largest_error():
    cast = Cast(FP16)

    after = cast(np.array([math.nan, -math.nan, math.inf, 70_000, -1e30, 1 + 2**-12, 2.0], FP32))

    assert cast.loss == Loss(values=7, changed=3, overflowed=2, max_error=2**-12)
    assert after[3:5].tolist() == [math.inf, -math.inf]


def test_the_loss_of_pieces_is_the_loss_of_the_whole():
    whole, pieces = Cast(BF16), Cast(BF16)

    whole(numbers(FP32))
    for piece in np.array_split(numbers(FP32), 7):
        pieces(piece)

    assert pieces.loss == whole.loss
    assert sum([whole.loss, pieces.loss], Loss()).changed == 2 * whole.loss.changed


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (Loss(2_000, 1_234, 0, 0.00195), "1,234 of 2,000 values changed, by 0.00195 at most"),
        (Loss(9, 2, 2, 0.0), "2 of 9 values changed, by 0 at most; 2 overflowed to infinity"),
    ],
)
def test_the_loss_is_told_in_one_line(loss: Loss, line: str):
    assert str(loss) == line


# Through a conversion


def config_loss(dtype: np.dtype) -> Loss:
    tensors = hf_tensors(tiny(), random_params(tiny()))
    return sum((slow_loss(array.reshape(-1), dtype) for array in tensors.values()), Loss())


@pytest.mark.parametrize(
    ("source", "option", "told"),
    [
        ("float32", "bfloat16", True),
        ("float32", "float16", True),
        ("float32", "keep", False),
        ("float32", "float32", False),
        ("bfloat16", "float32", False),
        ("float16", "float32", False),
    ],
)
def test_convert_and_export_tell_the_loss_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture, source: str, option: str, told: bool
):
    hf = str(write_hf(tmp_path / "hf", tiny(), random_params(tiny()), source))
    native, kept, back = (str(tmp_path / name) for name in ("native", "kept", "back"))

    codes = [
        main(["convert", hf, native, "--dtype", option]),
        main(["convert", hf, kept]),
        main(["export", kept, back, "--dtype", option]),
    ]

    lines = [line for line in capsys.readouterr().out.splitlines() if "the cast loses" in line]
    assert codes == [0, 0, 0]
    assert lines == ([f"  the cast loses: {config_loss(np.dtype(option))}"] * 2 if told else [])
    if option != "keep":
        assert {tensor.dtype for tensor in stored(tmp_path / "back").values()} == {
            {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[option]
        }


@pytest.mark.parametrize("done_before", [10_000, 30_000, 59_000])
def test_the_loss_of_an_interrupted_conversion_is_that_of_a_whole_one(tmp_path: Path, done_before: int):
    hf = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    import_hf(hf, tmp_path / "kept")
    ways: list[tuple[Callable[..., ConversionReport], Path, dict[str, int]]] = [
        (import_hf, hf, {}),
        (export_hf, tmp_path / "kept", {"max_shard_size": 1_000}),
    ]

    for convert, source, options in ways:
        out = tmp_path / convert.__name__
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, dtype="bfloat16", **options, progress=stop_after(done_before))

        done = convert(source, out, dtype="bfloat16", **options)

        assert done.reused > 0
        assert done.loss == config_loss(BF16)
