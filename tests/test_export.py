"""Export: tensors, config and files round-trip bit for bit.

Start at `test_golden_checkpoint_round_trips_bit_for_bit`. What comes back is read by the safetensors library, or
from the bytes by hand; `test_export_torch.py` has PyTorch load and run it.
"""

import ast
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dsmoe_jax.checkpoint.manifest import read_manifest
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import export_hf, import_hf
from dsmoe_jax.convert.cast import Cast
from dsmoe_jax.convert.exporter import parse_size
from dsmoe_jax.convert.reader import CheckpointReader
from dsmoe_jax.text.tokenizer import TOKENIZER_FILES
from tests.helpers import golden, hostile
from tests.helpers.hf_folder import (
    INDEX,
    VARIANTS,
    Stored,
    flip_bit,
    hf_tensors,
    random_params,
    rehashed,
    round_trip,
    snapshot,
    stop_after,
    stored,
    tiny,
    write_hf,
    write_tensors,
)

pytestmark = pytest.mark.heavy

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CODES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16"}
HEAD = "lm_head.weight"
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def as_stored(tensors: dict[str, np.ndarray]) -> dict[str, Stored]:
    return {name: Stored(CODES[array.dtype], array.shape, array.tobytes()) for name, array in tensors.items()}


def differing(got: dict[str, Stored], want: dict[str, Stored]) -> list[str]:
    """Return the names of missing or unequal tensors."""
    return sorted(name for name in got.keys() | want.keys() if got.get(name) != want.get(name))


def fields_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a read-only native checkpoint with its source `hf`."""
    work = tmp_path_factory.mktemp("export")
    import_hf(write_hf(work / "hf", tiny(torch_dtype="float32"), random_params(tiny())), work / "native")
    return work / "native"


# Tensors


@pytest.mark.parametrize("case", golden.CASES)
def test_golden_checkpoint_round_trips_bit_for_bit(tmp_path: Path, case: str):
    source = golden.folder(case)
    want = stored(source)
    if not want:  # no other reader of .bin files without torch
        with CheckpointReader(source) as reader:
            want = as_stored({name: reader.read(name) for name in reader.tensors})

    back = round_trip(source, tmp_path)

    assert differing(stored(back), want) == []
    assert (back / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert missing_fields(back, fields_of(source)) == {}


@pytest.mark.parametrize("dtype", [pytest.param(one, marks=[pytest.mark.slow] * (one == "float16")) for one in DTYPES])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_round_trips_bit_for_bit(tmp_path: Path, changes: dict, dtype: str):
    source = write_hf(tmp_path / "hf", tiny(**changes), random_params(tiny(**changes)), dtype, shards=2)

    back = round_trip(source, tmp_path, max_shard_size="30KB")

    assert differing(stored(back), stored(source)) == []
    assert (HEAD in stored(back)) == (not changes.get("tie_word_embeddings"))


@every_dtype
def test_special_values_keep_their_bits(tmp_path: Path, dtype: str):
    config = tiny(vocab_size=2048)  # its embedding has all 2**16 values of 16 bits
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {
        name: np.frombuffer(rng.bytes(array.size * 4), DTYPES[dtype])[: array.size].reshape(array.shape)
        for name, array in hf_tensors(config, random_params(config)).items()
    }
    if dtype != "float32":
        tensors["model.embed_tokens.weight"] = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype]).reshape(2048, 32)
    write_hf(tmp_path / "hf", config, random_params(config))
    write_tensors(tmp_path / "hf", tensors)

    back = round_trip(tmp_path / "hf", tmp_path)

    assert differing(stored(back), as_stored(tensors)) == []
    kinds = np.concatenate([array.astype(np.float32).reshape(-1) for array in tensors.values()])
    assert np.isnan(kinds).any()


def norms_wide(config: Any) -> dict[str, np.ndarray]:
    """Return tensors with norms in float32, the router in float16 and the rest in bfloat16."""

    def dtype(name: str) -> Any:
        return np.float32 if "norm" in name else np.float16 if name.endswith("mlp.gate.weight") else ml_dtypes.bfloat16

    return {name: array.astype(dtype(name)) for name, array in hf_tensors(config, random_params(config)).items()}


def test_mixed_dtypes_are_preserved(tmp_path: Path):
    write_hf(tmp_path / "hf", tiny(torch_dtype="bfloat16"), random_params(tiny()))
    write_tensors(tmp_path / "hf", norms_wide(tiny()))

    back = round_trip(tmp_path / "hf", tmp_path)

    assert differing(stored(back), as_stored(norms_wide(tiny()))) == []
    assert {tensor.dtype for tensor in stored(back).values()} == {"F32", "BF16", "F16"}
    assert fields_of(back)["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_duplicate_tied_head_is_exported_once(tmp_path: Path, form: str):
    config = tiny(tie_word_embeddings=True)
    tensors = hf_tensors(config, random_params(config))
    twice = tensors | {HEAD: tensors["model.embed_tokens.weight"].copy()}
    source = write_hf(tmp_path / "hf", config, random_params(config))
    if form == "safetensors":
        write_tensors(source, twice)
    else:
        (source / "model.safetensors").unlink()
        (source / "pytorch_model.bin").write_bytes(bin_file(twice, {HEAD: "model.embed_tokens.weight"}))

    back = round_trip(source, tmp_path)

    assert differing(stored(back), as_stored(tensors)) == []


def bin_file(tensors: dict[str, np.ndarray], shared: dict[str, str]) -> bytes:
    """Write tensors as `torch.save` does; those in `shared` are views of another's storage."""
    keys = {name: str(i) for i, name in enumerate(tensors)}
    rows = {
        name: hostile.row_by_row(keys[shared.get(name, name)], array.shape, array.size)
        for name, array in tensors.items()
    }
    content = hostile.state(*((name, hostile.tensor(**row)) for name, row in rows.items()))
    return hostile.zip_file(content, {keys[name]: tensors[name].tobytes() for name in tensors if name not in shared})


def test_import_of_an_export_is_the_same_checkpoint(tmp_path: Path, native: Path):
    export_hf(native, tmp_path / "back", max_shard_size="20KB")

    import_hf(tmp_path / "back", tmp_path / "again")

    assert read_manifest(tmp_path / "again").tensors == read_manifest(native).tensors
    assert fields_of(tmp_path / "again") == fields_of(native)


# Other files

ODD_FIELDS: dict[str, Any] = {
    "rope_theta": 10000,
    "attention_dropout": 0,
    "aux_loss_alpha": 1,
    "rms_norm_eps": 1e-06,
    "initializer_range": 0.006,
    "pad_token_id": -1,
    "rope_scaling": {"type": "linear", "factor": 4.0},
    "num_key_value_heads": None,
    "use_cache": False,
    "torch_dtype": "float32",
    "dtype": "float32",
    "transformers_version": "5.0.0.dev0",
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "ep_size": 1,
    "extra": {"kept": True},
    "id2label": {"0": "é｜", "1": [1, 1.0, None, {"deep": -0.0}]},
    "large": 2**63,
}


def missing_fields(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are missing or differ, also in type."""
    found = fields_of(folder)
    text = functools.partial(json.dumps, sort_keys=True)
    return {
        name: value
        for name, value in expected.items()
        if name != "auto_map" and text(value) != text(found.get(name, "absent"))
    }


def test_export_has_only_our_config_class(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    evil = {"AutoConfig": "configuration_deepseek.Evil", "AutoModel": "modeling_deepseek.Evil"}
    (source / "config.json").write_text(json.dumps(fields_of(source) | {"auto_map": evil}))
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (source / name).write_text("raise SystemExit")

    back = round_trip(source, tmp_path)

    assert fields_of(back)["auto_map"] == {"AutoConfig": "configuration_deepseek.DeepseekConfig"}
    (code,) = back.glob("*.py")
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"torch_dtype", "extra"}
    assert code.name == "configuration_deepseek.py"
    assert known - {"architectures", "transformers_version"} == defaults_of(code)


def defaults_of(code: Path) -> set[str]:
    """Return the fields that the class sets."""
    tree = ast.parse(code.read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign))
    (init,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    assert table is not None
    return {*ast.literal_eval(table)} | {arg.arg for arg in init.args.args[1:]}


def test_config_fields_round_trip(tmp_path: Path):
    config = tiny(num_key_value_heads=None)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    fields = fields_of(source) | ODD_FIELDS
    (source / "config.json").write_text(json.dumps(fields))

    back = round_trip(source, tmp_path)

    assert missing_fields(back, fields) == {}


@pytest.mark.parametrize("field", ["model_type", "architectures", "torch_dtype"])
def test_export_has_all_fields_that_loaders_need(tmp_path: Path, field: str):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()), "float16")
    fields = fields_of(source)
    fields.pop(field, None)
    (source / "config.json").write_text(json.dumps(fields))

    back = round_trip(source, tmp_path)

    expected = {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "torch_dtype": "float16"}
    assert missing_fields(back, expected) == {}


@every_dtype
@pytest.mark.parametrize("torch_dtype", ["float32", "bfloat16", None])
def test_config_has_the_dtype_of_the_tensors(tmp_path: Path, torch_dtype: str | None, dtype: str):
    source = write_hf(
        tmp_path / "hf", tiny(torch_dtype=torch_dtype, extra={"dtype": torch_dtype}), random_params(tiny()), dtype
    )

    back = round_trip(source, tmp_path)

    assert missing_fields(back, {"torch_dtype": dtype, "dtype": dtype}) == {}


def test_tokenizer_and_generation_config_round_trip(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    copied = {name: f'{{"{name}":\t"é｜"}}\r\n'.encode() for name in (*TOKENIZER_FILES, "generation_config.json")}
    for name, data in copied.items():
        (source / name).write_bytes(data)
    (source / "modeling_evil.py").write_text("raise SystemExit")

    back = round_trip(source, tmp_path)

    files = {name: (back / name).read_bytes() for name in copied}
    assert files == copied
    assert {path.name for path in back.iterdir()} == {
        *copied,
        "config.json",
        "configuration_deepseek.py",
        INDEX,
        "model-00001-of-00001.safetensors",
    }


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({}, {"bos_token_id": 0, "eos_token_id": 1}),
        ({"bos_token_id": None, "pad_token_id": 3}, {"eos_token_id": 1, "pad_token_id": 3}),
    ],
)
def test_missing_generation_config_is_created(tmp_path: Path, changes: dict, made: dict):
    source = write_hf(tmp_path / "hf", tiny(**changes), random_params(tiny()))

    back = round_trip(source, tmp_path)

    assert json.loads((back / "generation_config.json").read_text()) == {"_from_model_config": True, **made}


# Shards


def check_layout(folder: Path, limit: int) -> int:
    """Check index and headers against the format; returns the number of shards."""
    index = json.loads((folder / INDEX).read_text())
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    placed, total = {}, 0
    for file in files:
        content = (folder / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert length % 8 == 0
        assert content[8:9] == b"{"
        assert header.pop("__metadata__") == {"format": "pt"}
        size = len(content) - 8 - length
        assert size <= limit or len(header) == 1
        end = 0
        for name, entry in header.items():
            begin, last = entry["data_offsets"]
            assert begin == end
            assert begin % {"F32": 4, "F16": 2, "BF16": 2}[entry["dtype"]] == 0
            end = last
            placed[name] = file
        assert end == size
        total += size
    assert index == {"metadata": {"total_size": total}, "weight_map": placed}
    return len(files)


@pytest.mark.parametrize(
    ("size", "limit"), [(1, 1), (5_000, 5_000), ("20KB", 20_000), ("16KiB", 1 << 14), ("5GB", 5 * 10**9)]
)
@pytest.mark.parametrize("several_dtypes", [False, True], ids=["one dtype", "several dtypes"])
def test_shards_respect_size_and_format(tmp_path: Path, size: int | str, limit: int, several_dtypes: bool):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    if several_dtypes:
        write_tensors(source, norms_wide(tiny()))

    back = round_trip(source, tmp_path, max_shard_size=size)

    shards = check_layout(back, limit)
    assert (shards > 1) == (limit < 10**6)
    assert (shards == len(stored(back))) == (limit == 1)
    assert differing(stored(back), stored(source)) == []


def test_shards_are_filled_to_the_limit(tmp_path: Path, native: Path):
    total = sum(len(tensor.data) for tensor in stored(native.parent / "hf").values())

    just, short = (export_hf(native, tmp_path / str(size), max_shard_size=size).path for size in (total, total - 1))

    assert (check_layout(just, total), check_layout(short, total - 1)) == (1, 2)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("5GB", 5_000_000_000), ("500MB", 500_000_000), ("20KB", 20_000), ("2GiB", 2 << 30), ("3MiB", 3 << 20),
        ("7KiB", 7 << 10), ("1.5GB", 1_500_000_000), ("10 MB", 10_000_000), ("123", 123), (123, 123),
    ],
)  # fmt: skip
def test_shard_size_accepts_units(size: int | str, nbytes: int):
    got = parse_size(size)

    assert got == nbytes


@pytest.mark.parametrize(
    "size",
    ["", "GB", "5TB", "5gb", "-5GB", "0", 0, -1, "1e9", "0.1", "5GB\n", "5GB 5GB", "nan", True, None, "9" * 400],
    ids=lambda size: repr(size)[:12],
)
def test_invalid_shard_size_is_an_error(tmp_path: Path, native: Path, size: Any):
    with pytest.raises(ValueError, match=r"max_shard_size must be a size such as 5GB") as error:
        export_hf(native, tmp_path / "back", max_shard_size=size)

    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


# Another dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_cast_is_reported(tmp_path: Path, native: Path, dtype: str):
    tensors = hf_tensors(tiny(), random_params(tiny()))
    cast = Cast(np.dtype(DTYPES[dtype]))
    want = {name: cast(array) for name, array in tensors.items()}

    done = export_hf(native, tmp_path / "back", dtype=dtype, max_shard_size="20KB")

    assert differing(stored(done.path), as_stored(want)) == []
    assert missing_fields(done.path, {"torch_dtype": dtype}) == {}
    assert done.cast_stats == cast.stats
    assert f"cast: {cast.stats}" in str(done)
    check_layout(done.path, 20_000)


def test_export_without_cast_reports_no_change(tmp_path: Path, native: Path):
    kept = export_hf(native, tmp_path / "kept")
    same = export_hf(native, tmp_path / "same", dtype="float32")

    assert differing(stored(kept.path), stored(same.path)) == []
    assert "  cast:" not in str(kept)
    assert "  cast:" not in str(same)


# Errors

DATA = "parameters/state/{}"
# change of the native checkpoint | text of the error
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first bit of the first tensor": (
        lambda native: flip_bit(native / DATA.format("embed/c/0/0"), 0),
        "damaged checkpoint: SHA-256 mismatch of tensor embed",
    ),
    "last bit of the last tensor": (
        lambda native: flip_bit(native / DATA.format("head.weight/c/0/0"), -17, 7),
        r"damaged checkpoint: SHA-256 mismatch of tensor head\.weight",
    ),
    "an expert": (
        lambda native: flip_bit(native / DATA.format("layers.1.moe.experts.up/c/0/0/0"), 9_000, 3),
        r"damaged checkpoint: SHA-256 mismatch of tensor layers\.1\.moe\.experts\.up",
    ),
    "the index of parts": (lambda native: flip_bit(native / DATA.format("norm.weight/c/0"), -1), "or their index"),
    "a description": (lambda native: flip_bit(native / DATA.format("embed/zarr.json"), 20), "zarr.json"),
    "a file gone": (lambda native: (native / DATA.format("embed/c/0/0")).unlink(), "embed/c/0/0: cannot be read"),
    "no manifest": (lambda native: (native / "dsmoe_jax.json").unlink(), "not a native checkpoint"),
    "another config": (
        lambda native: (native / "config.json").write_text(json.dumps(tiny(vocab_size=32).to_dict())),
        "damaged: 'config.json' ",
    ),
    "another model": (
        rehashed(lambda native: (native / "config.json").write_text(json.dumps(tiny(vocab_size=32).to_dict()))),
        r"has shape \[64, 32\], the config asks for \[32, 32\]",
    ),
}


@pytest.mark.parametrize(("damage", "named"), BAD.values(), ids=BAD)
def test_export_of_a_damaged_checkpoint_is_an_error(tmp_path: Path, damage: Callable[[Path], Any], named: str):
    native = tmp_path / "native"
    import_hf(write_hf(tmp_path / "hf", tiny(), random_params(tiny())), native)
    damage(native)

    with pytest.raises(ValueError, match=named) as error:
        export_hf(native, tmp_path / "new" / "back", max_shard_size="20KB")

    assert "\n" not in str(error.value)
    assert list(tmp_path.glob("new/*")) == []


def test_resumed_export_detects_damage_of_the_first_run(tmp_path: Path):
    native, out = tmp_path / "native", tmp_path / "new" / "back"
    import_hf(write_hf(tmp_path / "hf", tiny(), random_params(tiny())), native)
    with pytest.raises(KeyboardInterrupt):
        export_hf(native, out, max_shard_size="20KB", progress=stop_after(60_000))
    flip_bit(native / DATA.format("embed/c/0/0"), 0)

    with pytest.raises(ValueError, match="SHA-256 mismatch of tensor embed"):
        export_hf(native, out, max_shard_size="20KB")

    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_existing_output_dir_is_an_error(tmp_path: Path, native: Path, kind: str):
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "checkpoint": lambda: export_hf(native, out)}[kind]()
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match="out exists; nothing is overwritten"):
        export_hf(native, out)

    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_hf_folder_is_exported_as_its_native_checkpoint(tmp_path: Path, native: Path, dtype: str | None):
    options: dict[str, Any] = {"max_shard_size": "20KB", "dtype": dtype}
    with pytest.raises(KeyboardInterrupt):
        export_hf(native.parent / "hf", tmp_path / "back", **options, progress=stop_after(60_000))

    report = export_hf(native.parent / "hf", tmp_path / "back", **options)

    export_hf(native, tmp_path / "want", **options)
    assert report.reused_bytes > 0
    assert "hf has no SHA-256 to verify" in str(report)
    assert snapshot(tmp_path / "back") == snapshot(tmp_path / "want")
