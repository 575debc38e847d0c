"""Import of Hugging Face checkpoints: names, weights bit for bit, and errors.

Start at `test_golden_checkpoint_is_imported_bit_for_bit`.
"""

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import dsmoe_jax
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import import_hf
from dsmoe_jax.convert.param_mapping import hf_names, hf_shapes
from dsmoe_jax.convert.reader import CheckpointReader
from dsmoe_jax.loading import load
from dsmoe_jax.model import abstract, split
from tests.helpers import golden
from tests.helpers.hf_folder import (
    INDEX,
    VARIANTS,
    edit,
    hf_tensors,
    random_params,
    same_bits,
    snapshot,
    tiny,
    write_hf,
    write_tensors,
)

every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


# Names


def original_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the parameters of the original PyTorch classes, from their constructors."""
    D, kv = c.hidden_size, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, D), "model.norm.weight": (D,)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, D)

    def swiglu(path: str, width: int) -> None:
        shapes[f"{path}.gate_proj.weight"] = shapes[f"{path}.up_proj.weight"] = (width, D)
        shapes[f"{path}.down_proj.weight"] = (D, width)

    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (D,)
        for projection, rows in (("q", D), ("k", kv), ("v", kv), ("o", D)):
            shapes[f"{layer}.self_attn.{projection}_proj.weight"] = (rows, D)
            if c.attention_bias:
                shapes[f"{layer}.self_attn.{projection}_proj.bias"] = (rows,)
        if c.n_routed_experts is None or i < c.first_k_dense_replace or i % c.moe_layer_freq:
            swiglu(f"{layer}.mlp", c.intermediate_size)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (c.n_routed_experts, D)
        for e in range(c.n_routed_experts):
            swiglu(f"{layer}.mlp.experts.{e}", c.moe_intermediate_size)
        if c.n_shared_experts is not None:
            swiglu(f"{layer}.mlp.shared_experts", c.n_shared_experts * c.moe_intermediate_size)
    return shapes


@every_variant
def test_hf_names_are_unique_and_complete(changes: dict):
    config = tiny(**changes)

    names = hf_names(config)

    assert names.keys() == abstract(config)[1].keys()
    flat = [part for parts in names.values() for part in parts]
    assert len(flat) == len(set(flat))
    assert hf_shapes(config) == original_shapes(config)


def test_16b_has_the_published_names_and_shapes():
    config = ModelConfig.preset("deepseek_moe_16b")

    shapes = hf_shapes(config)

    assert shapes == original_shapes(config)
    assert len(shapes) == 5_466
    assert sum(math.prod(shape) for shape in shapes.values()) == 16_375_728_128
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (2048, 10944)
    assert shapes["model.layers.27.mlp.experts.63.gate_proj.weight"] == (1408, 2048)
    assert shapes["model.layers.1.mlp.shared_experts.down_proj.weight"] == (2048, 2816)
    assert shapes["model.layers.1.mlp.gate.weight"] == (64, 2048)


# Values


def independent_tensors(case: str) -> dict[str, np.ndarray]:
    folder = golden.folder(case)
    if case == "k_bin_shards":  # no other reader of .bin files without torch
        with CheckpointReader(folder) as reader:
            return {name: np.array(reader.read(name)) for name in reader.tensors}
    tensors = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("case", golden.COMMITTED)
def test_golden_checkpoint_is_imported_bit_for_bit(case: str):
    want = independent_tensors(case)

    model = load(golden.folder(case))

    got = hf_tensors(model.config, {name: np.asarray(array) for name, array in split(model)[1].items()})
    assert got.keys() == want.keys()
    assert [name for name in want if not same_bits(got[name], want[name])] == []


def test_experts_are_stacked_by_index():
    want = independent_tensors("a_baseline")

    params = split(load(golden.folder("a_baseline")))[1]

    for ours, theirs in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        for e in range(8):
            expert = want[f"model.layers.2.mlp.experts.{e}.{theirs}.weight"]
            assert same_bits(params[f"layers.2.moe.experts.{ours}"][e], expert)


@every_variant
@pytest.mark.parametrize("shards", [1, 3])
def test_every_variant_loads_from_one_file_and_shards(tmp_path: Path, changes: dict, shards: int):
    config = tiny(**changes)
    params = random_params(config)

    model = load(write_hf(tmp_path, config, params, shards=shards))

    got = split(model)[1]
    assert got.keys() == params.keys()
    assert [name for name in params if not same_bits(got[name], params[name])] == []


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_default_keeps_the_stored_dtype(tmp_path: Path, stored: str):
    params = random_params(tiny())

    got = split(load(write_hf(tmp_path, tiny(), params, stored)))[1]

    assert [name for name in params if not same_bits(got[name], params[name].astype(jnp.dtype(stored)))] == []


@pytest.mark.parametrize("dtype", ["float32", jnp.float32, np.dtype("float32")], ids=["name", "type", "dtype"])
def test_float32_widens_bfloat16_exactly(tmp_path: Path, dtype: Any):
    params = random_params(tiny())

    got = split(load(write_hf(tmp_path, tiny(), params, "bfloat16"), dtype=dtype))[1]

    for name, want in params.items():
        assert same_bits(got[name], want.astype(ml_dtypes.bfloat16).astype(np.float32)), name


def test_bfloat16_rounds_float32_to_nearest(tmp_path: Path):
    params = random_params(tiny())

    got = split(load(write_hf(tmp_path, tiny(), params), dtype="bfloat16"))[1]

    assert [name for name in params if not same_bits(got[name], params[name].astype(ml_dtypes.bfloat16))] == []


@pytest.mark.parametrize("dtype", ["int8", "fp32", "", "float64"])
def test_unknown_dtype_is_an_error(tmp_path: Path, dtype: str):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match=r"dtype must be one of float32, bfloat16, float16, got '.*'"):
        import_hf(source, tmp_path / "out", dtype=dtype)

    assert snapshot(tmp_path) == before


# Tied embeddings


def test_tied_checkpoint_may_store_the_head_too(tmp_path: Path):
    config = tiny(tie_word_embeddings=True)
    params = random_params(config)
    write_hf(tmp_path, config, params)
    write_tensors(tmp_path, hf_tensors(config, params) | {"lm_head.weight": params["embed"].copy()})

    model = load(tmp_path)

    assert model.head is None
    assert same_bits(split(model)[1]["embed"], params["embed"])


@pytest.mark.parametrize("wrong", ["values", "shape", "dtype"])
def test_tied_checkpoint_with_another_head_is_an_error(tmp_path: Path, wrong: str):
    config = tiny(tie_word_embeddings=True)
    params = random_params(config)
    head = {
        "values": params["embed"] + np.eye(64, 32, dtype=np.float32),
        "shape": params["embed"][:-1].copy(),
        "dtype": params["embed"].astype(np.float16),
    }[wrong]
    write_hf(tmp_path, config, params)
    write_tensors(tmp_path, hf_tensors(config, params) | {"lm_head.weight": head})

    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load(tmp_path)


# Folders of other libraries

Renaming = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def prefixed(prefix: str) -> Renaming:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


# changed tensors | log message
FOREIGN: dict[str, tuple[Renaming, str]] = {
    **{
        prefix: (prefixed(prefix), f"the prefix '{prefix}' of all tensors")
        for prefix in ("module.", "_forward_module.", "base_model.model.", "model.", "module.model.", "student.")
    },
    "torch.compile": (prefixed("_orig_mod."), "wrappers in names such as '_orig_mod."),
    "a wrapper of each layer": (
        lambda t: {re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module._orig_mod.", name): x for name, x in t.items()},
        "wrappers in names such as 'model.layers.0._fsdp_wrapped_module._orig_mod.",
    ),
    "buffers": (
        lambda t: t | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
        "Ignoring in .*'model.layers.1.self_attn.rotary_emb.inv_freq'",
    ),
    "a value head of TRL": (
        lambda t: t | {"v_head.summary.weight": np.ones((1, 32), np.float32)},
        "Ignoring in .*'v_head.summary.weight'",
    ),
    "buffers with a prefix": (
        lambda t: prefixed("module.")(t | {"model.rotary_emb.inv_freq": np.ones(4, np.float32)}),
        "'module.model.rotary_emb.inv_freq'",
    ),
}


@pytest.mark.parametrize(("rename", "message"), FOREIGN.values(), ids=FOREIGN)
def test_wrapper_prefixes_are_dropped_and_logged(
    tmp_path: Path, rename: Renaming, message: str, caplog: pytest.LogCaptureFixture
):
    source = write_hf(tmp_path, tiny(), random_params(tiny()))
    write_tensors(source, rename(hf_tensors(tiny(), random_params(tiny()))))

    with caplog.at_level("INFO"):
        params = split(load(source))[1]

    assert re.search(message, caplog.text)
    assert all(same_bits(params[name], want) for name, want in random_params(tiny()).items())


@pytest.mark.parametrize("form", ["without the head's module", "head alone"])
def test_tied_model_may_lack_the_model_prefix(tmp_path: Path, form: str):
    config = tiny(tie_word_embeddings=True)
    params = random_params(config)
    source, tensors = write_hf(tmp_path, config, params), hf_tensors(config, params)
    if form == "head alone":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    else:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write_tensors(source, tensors)

    loaded = split(load(source))[1]

    assert all(same_bits(loaded[name], want) for name, want in params.items())


def test_empty_shared_experts_are_none(tmp_path: Path):
    config = tiny(n_shared_experts=None)
    source = write_hf(tmp_path, config, random_params(config))
    edit("config.json", lambda fields: fields.update(n_shared_experts=0))(source)
    empty = {
        f"model.layers.1.mlp.shared_experts.{name}_proj.weight": np.zeros((0, 32), np.float32)
        for name in ("gate", "up")
    }
    write_tensors(source, hf_tensors(config, random_params(config)) | empty)

    assert load(source).config == config


# import_hf


def test_imported_checkpoint_is_the_same_model(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()), shards=2)
    copied = {
        "generation_config.json": b'{"eos_token_id":   1}\n',
        "tokenizer.json": b"{ }",
        "tokenizer_config.json": b"{}\r\n",
        "special_tokens_map.json": b"{}",
        "chat_template.jinja": "｜é".encode(),
    }
    for name, data in copied.items():
        (source / name).write_bytes(data)
    (source / "modeling_evil.py").write_text("raise SystemExit")
    before = snapshot(tmp_path)
    out = tmp_path / "out"
    ids = np.arange(8).reshape(2, 4)

    import_hf(source, out)
    loaded = dsmoe_jax.load(out)

    assert {name: data for name, data in snapshot(tmp_path).items() if name.split("/")[0] != "out"} == before
    assert {path.name for path in out.iterdir()} == {*copied, "config.json", "dsmoe_jax.json", "parameters"}
    assert {name: (out / name).read_bytes() for name in copied} == copied
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert loaded.config == load(source).config == tiny()
    want = split(load(source))[1]
    for name, array in split(loaded)[1].items():
        assert same_bits(array, np.asarray(want[name])), name
    np.testing.assert_array_equal(loaded(ids).logits, load(source)(ids).logits)


# Bad input


def remove_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def change_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Rewrite the checkpoint as one file with changed tensors."""

    def damage(folder: Path) -> None:
        remove_weights(folder)
        tensors = hf_tensors(tiny(), random_params(tiny()))
        change(tensors)
        write_tensors(folder, tensors)

    return damage


def place_in(shard: str) -> Callable[[Path], None]:
    """Place a tensor in `shard`, a valid file outside the folder."""

    def damage(folder: Path) -> None:
        (folder / SHARD).rename(folder.parent / "elsewhere.safetensors")
        file = shard.format(outside=folder.parent / "elsewhere.safetensors")
        edit(INDEX, lambda index: index["weight_map"].update({NORM: file}))(folder)

    return damage


def link_out(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "elsewhere.safetensors")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere.safetensors")


class Touch:
    """Write a pickle that would create a marker file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


def evil_pickle(zipped: bool) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        remove_weights(folder)
        data = pickle.dumps({"model.norm.weight": Touch(folder / "marker")}, protocol=2)
        if not zipped:
            (folder / "pytorch_model.bin").write_bytes(data)
            return
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as file:
            file.writestr("archive/data.pkl", data)

    return damage


SHARD = "model-00002-of-00002.safetensors"
NORM, EXPERT = "model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
POSIX_SYSTEM = rf"{os.system.__module__}.system"  # what pickle calls os.system

# change of the folder | text of the error
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.parent / "away"), "hf"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": (remove_weights, "no weights"),
    "missing shard": (lambda folder: (folder / SHARD).unlink(), SHARD),
    "truncated shard": (lambda folder: os.truncate(folder / SHARD, 5000), SHARD),
    "shard one byte short": (lambda f: os.truncate(f / SHARD, (f / SHARD).stat().st_size - 1), SHARD),
    "missing tensor": (change_tensors(lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "missing expert": (change_tensors(lambda t: t.pop(EXPERT)), f"{EXPERT} is missing"),
    "surplus tensor": (change_tensors(lambda t: t.update(more=t[NORM].copy())), "more is unexpected"),
    "wrong shape": (change_tensors(lambda t: t.update({NORM: t[NORM][:-1].copy()})), rf"{NORM} .*\[31\].*\[32\]"),
    "transposed": (change_tensors(lambda t: t.update({EXPERT: t[EXPERT].T.copy()})), rf"{EXPERT} .*\[32, 16\]"),
    "mixed stack": (change_tensors(lambda t: t.update({EXPERT: t[EXPERT].astype(np.float16)})), f"{EXPERT} is float16"),
    "int8": (change_tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})), f"{NORM}.*I8"),
    "index names an absent tensor": (edit(INDEX, lambda i: i["weight_map"].update(absent=SHARD)), "absent"),
    "an adapter inside": (
        change_tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": t[NORM].copy()})),
        "belongs to an unmerged LoRA adapter",
    ),
    "an adapter in the folder": (
        lambda folder: [(folder / f"adapter_{name}").write_text("{}") for name in ("config.json", "model.bin")],
        r"holds both a model and an adapter \(adapter_config.json\)",
    ),
    "some have a prefix": (
        change_tensors(lambda t: t.update({f"module.{n}": t.pop(n) for n in list(t) if n != NORM})),
        f"tensor '{NORM}' lacks the prefix 'module.' of the others",
    ),
    "two of one name": (
        change_tensors(lambda t: t.update({f"_orig_mod.{NORM}": t[NORM].copy()})),
        "have the same normalized name",
    ),
    "index lacks a tensor": (edit(INDEX, lambda i: i["weight_map"].pop(NORM)), NORM),
    "absolute shard": (place_in("{outside}"), NORM),
    "shard above": (place_in("../elsewhere.safetensors"), NORM),
    "linked shard": (link_out, SHARD),
    "NaN": (edit("config.json", lambda c: c.update(rms_norm_eps=math.nan)), "rms_norm_eps"),
    "rope type": (edit("config.json", lambda c: c.update(rope_scaling={"type": "yarn", "factor": 2.0})), "yarn"),
    "scoring_func": (edit("config.json", lambda c: c.update(scoring_func="sigmoid")), "scoring_func"),
    "pickle that runs a command": (evil_pickle(zipped=True), POSIX_SYSTEM),
    "the same, bare": (evil_pickle(zipped=False), POSIX_SYSTEM),
}


@pytest.mark.parametrize(("damage", "named"), BAD.values(), ids=BAD)
def test_invalid_folder_is_a_one_line_error(tmp_path: Path, damage: Callable, named: str):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()), shards=2)
    damage(source)
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match=named) as error:
        import_hf(source, tmp_path / "out")

    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_output_dir_is_an_error(tmp_path: Path, kind: str):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    else:
        out.write_text("mine")
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match=r"out exists; nothing is overwritten"):
        import_hf(source, out)

    assert snapshot(tmp_path) == before


def test_native_checkpoint_cannot_be_imported(tmp_path: Path):
    import_hf(write_hf(tmp_path / "hf", tiny(), random_params(tiny())), tmp_path / "native")
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match="native is already a native checkpoint"):
        import_hf(tmp_path / "native", tmp_path / "out")

    assert snapshot(tmp_path) == before
