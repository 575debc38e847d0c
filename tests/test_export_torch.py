"""Exports loaded strictly by PyTorch give equal outputs.

Start at `check_export`. Only PyTorch, safetensors and the tests' model read the exported folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from dsmoe_jax.convert import export_hf, import_hf
from dsmoe_jax.loading import load
from tests.helpers import golden
from tests.helpers.hf_folder import INDEX, VARIANTS, random_params, round_trip, tiny, write_hf

pytest.importorskip("torch", reason="the independent reader is PyTorch: pip install -e '.[bench]'")
import torch  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch import Tensor  # pyright: ignore[reportMissingImports]

from tests.helpers.torch_model import TorchModel

# Configs with other tensors, and configs with other computations.
FORWARD: dict[str, dict[str, Any]] = VARIANTS | {
    "two dense layers first": {"first_k_dense_replace": 2, "num_hidden_layers": 3},
    "one key-value head": {"num_key_value_heads": 1},
    "top-1": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "norm_topk_prob": {"norm_topk_prob": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.5}, "max_position_embeddings": 8},
    "other numbers": {"rope_theta": 100.0, "rms_norm_eps": 1e-2},
}
every_variant = pytest.mark.parametrize("changes", FORWARD.values(), ids=FORWARD)
every_case = pytest.mark.parametrize("case", golden.COMMITTED)

IDS = np.random.default_rng(1).integers(0, 64, (3, 20))
SPLIT = "20KB"


def check_export(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of an exported folder after checking index and shards."""
    index = json.loads((folder / INDEX).read_text())
    files = sorted(folder.glob("*.safetensors"))
    shards = {file.name: load_file(file) for file in files}
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}

    assert list(shards) == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert not list(folder.glob("*.bin"))
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    assert sum(len(shard) for shard in shards.values()) == len(tensors)  # each in one shard
    assert index["metadata"]["total_size"] == sum(size(tensor) for tensor in tensors.values())
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    return tensors


def stored(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a folder, read by PyTorch."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    for file in folder.glob("pytorch_model*.bin"):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def torch_logits(folder: Path, tensors: Mapping[str, Tensor], ids: np.ndarray) -> np.ndarray:
    """Return PyTorch's float32 logits with the folder's config and exactly these tensors."""
    model = TorchModel(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(tensors, strict=True)
    return model.eval()(torch.from_numpy(ids.astype(np.int64))).numpy()


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def assert_same_bits(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8)), name


def lively(tmp_path: Path, changes: Mapping[str, Any], dtype: str = "float32") -> Path:
    """Write a tiny checkpoint in which every weight affects the logits."""
    config = tiny(**changes)
    params = random_params(config)
    for name, value in params.items():
        params[name] = 1 + value if name.endswith("norm.weight") else 3 * value
    return write_hf(tmp_path / "hf", config, params, dtype)


# The reader


@every_case
def test_torch_reference_has_the_original_logits(case: str):
    want = golden.tensors(case)

    logits = torch_logits(golden.folder(case), stored(golden.folder(case)), want["in.input_ids"])

    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=golden.LOGITS)


def test_tensors_cannot_be_swapped_unnoticed(tmp_path: Path):
    source = lively(tmp_path, {"attention_bias": True})
    tensors = stored(source)
    want = torch_logits(source, tensors, IDS)

    changes = {
        name: np.abs(torch_logits(source, tensors | {name: tensor.roll(1, 0)}, IDS) - want).max()
        for name, tensor in tensors.items()
    }

    assert {name: change for name, change in changes.items() if change < 10 * golden.LOGITS} == {}


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_missing_or_unexpected_tensor_is_an_error(tmp_path: Path, tied: bool):
    source = lively(tmp_path, {"tie_word_embeddings": tied})
    tensors = stored(source)
    embedding = tensors["model.embed_tokens.weight"]

    with pytest.raises(RuntimeError, match=r"Missing key.*model\.norm\.weight"):
        torch_logits(source, {name: t for name, t in tensors.items() if name != "model.norm.weight"}, IDS)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lm_head" if tied else r"Unexpected key.*again"):
        torch_logits(source, tensors | {"lm_head.weight" if tied else "again": embedding}, IDS)


# The export


@every_case
def test_exported_golden_checkpoint_has_the_original_logits(tmp_path: Path, case: str):
    source, want = golden.folder(case), golden.tensors(case)

    exported = round_trip(source, tmp_path)

    tensors = check_export(exported)
    assert_same_bits(tensors, stored(source))
    logits = torch_logits(exported, tensors, want["in.input_ids"])
    np.testing.assert_allclose(logits, want["logits"], rtol=0, atol=golden.LOGITS)


@every_variant
def test_exported_variants_have_equal_logits_and_bits(tmp_path: Path, changes: dict[str, Any]):
    source = lively(tmp_path, changes)
    ours = np.asarray(load(source)(IDS).logits)

    exported = round_trip(source, tmp_path)

    tensors = check_export(exported)
    assert_same_bits(tensors, stored(source))
    assert ("lm_head.weight" in tensors) is not changes.get("tie_word_embeddings", False)
    np.testing.assert_allclose(torch_logits(exported, tensors, IDS), ours, rtol=0, atol=golden.LOGITS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_export_keeps_bits_and_logits(tmp_path: Path, dtype: str):
    source = lively(tmp_path, {}, dtype)
    ours = np.asarray(load(source, dtype="float32")(IDS).logits)

    exported = round_trip(source, tmp_path)

    tensors = check_export(exported)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert_same_bits(tensors, stored(source))
    np.testing.assert_allclose(torch_logits(exported, tensors, IDS), ours, rtol=0, atol=golden.LOGITS)


def test_cast_rounds_like_pytorch(tmp_path: Path):
    source = lively(tmp_path, {})
    import_hf(source, tmp_path / "native")

    export_hf(tmp_path / "native", tmp_path / "exported", dtype="bfloat16")

    tensors = check_export(tmp_path / "exported")
    assert_same_bits(tensors, {name: tensor.to(torch.bfloat16) for name, tensor in stored(source).items()})


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_export_in_several_shards_is_the_same_model(tmp_path: Path, tied: bool):
    source = lively(tmp_path, {"tie_word_embeddings": tied})
    ours = np.asarray(load(source)(IDS).logits)

    exported = round_trip(source, tmp_path, max_shard_size=SPLIT)

    tensors = check_export(exported)
    sizes = [sum(map(size, load_file(shard).values())) for shard in exported.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) <= 20_000
    assert_same_bits(tensors, stored(source))
    np.testing.assert_allclose(torch_logits(exported, tensors, IDS), ours, rtol=0, atol=golden.LOGITS)
