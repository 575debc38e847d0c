"""Golden cases: outputs of the original PyTorch model, four beside this file and the larger ones in `../shared`."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dsmoe_jax.convert import load_hf
from dsmoe_jax.model import DeepSeekMoE

TESTS = Path(__file__).resolve().parent.parent
SHARED = TESTS.parent.parent / "shared"
COMMITTED = ("a_baseline", "b_norm_topk", "d_rope_linear", "k_bin_shards")
CASES = (*COMMITTED, "i_mid")

LOGITS = 1e-4  # absolute, against logits of rms 2; a right fp32 implementation sits near 1e-5


def folder(case: str) -> Path:
    """The folder of a case; the test skips where it lies in `../shared` and that is absent."""
    path = TESTS / "golden" / case if case in COMMITTED else SHARED / "golden" / case
    if not path.is_dir():
        pytest.skip(f"golden case {case} lies in ../shared, which is absent")
    return path


@functools.lru_cache(maxsize=2)
def tensors(case: str) -> dict[str, np.ndarray]:
    """What the original computed."""
    return load_file(folder(case) / "expected.safetensors")


def expected(case: str) -> dict[str, Any]:
    """The scalars, curves and generated ids."""
    return json.loads((folder(case) / "expected.json").read_text())


@functools.lru_cache(maxsize=4)
def model(case: str, dtype: str = "float32") -> DeepSeekMoE:
    """The case's model through the real import."""
    return load_hf(folder(case), dtype=dtype)
