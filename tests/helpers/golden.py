"""Golden cases: outputs of the original PyTorch model, in `tests/golden` and, if large, in `../shared`."""

import functools
import json
import unittest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from dsmoe_jax.loading import load
from dsmoe_jax.model import DeepSeekMoE

TESTS = Path(__file__).resolve().parent.parent
SHARED = TESTS.parent.parent / "shared"
COMMITTED = ("a_baseline", "b_norm_topk", "d_rope_linear", "k_bin_shards")
CASES = (*COMMITTED, "i_mid")

LOGITS = 1e-4  # absolute, for logits of rms 2; a correct fp32 implementation is within 1e-5


def folder(case: str) -> Path:
    """Return the folder of a case; skips the test if it is in an absent `../shared`."""
    path = TESTS / "golden" / case if case in COMMITTED else SHARED / "golden" / case
    if not path.is_dir():
        raise unittest.SkipTest(f"golden case {case} is in ../shared, which is absent")
    return path


@functools.lru_cache(maxsize=2)
def tensors(case: str) -> dict[str, np.ndarray]:
    """Return the outputs of the original."""
    return load_file(folder(case) / "expected.safetensors")


def expected(case: str) -> dict[str, Any]:
    """Return the scalars, curves and generated ids."""
    return json.loads((folder(case) / "expected.json").read_text())


@functools.lru_cache(maxsize=4)
def model(case: str, dtype: str = "float32") -> DeepSeekMoE:
    """Import the model of a case."""
    return load(folder(case), dtype=dtype)
