"""The exported PyTorch code in transformers: `export` a checkpoint, `load` it; a fixture to assign in a test module."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.convert import export_hf, import_hf


@pytest.fixture(autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy remote code to a temporary folder instead of the user's cache."""
    folder = str(tmp_path_factory.mktemp("modules"))
    for module in ("transformers.utils.hub", "transformers.dynamic_module_utils"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)


def export(source: Path, work: Path, **options: Any) -> Path:
    """Return the export, with PyTorch code, of a Hugging Face folder."""
    import_hf(source, work / "native")
    return export_hf(work / "native", work / "exported", with_modeling=True, **options).path


def load(folder: Path, **options: Any) -> Any:
    """Return the exported model for evaluation."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    options = {"trust_remote_code": True, "dtype": torch.float32} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: Any, **inputs: Any) -> np.ndarray:
    import torch  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        return model(**inputs).logits.float().numpy()
