"""Native checkpoints: round trip, damage, and loading onto a mesh."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsmoe_jax.checkpoint import native
from dsmoe_jax.checkpoint.native import load, save
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import DeepSeekMoE, assemble, split
from tests.helpers.hf_folder import edit, random_params, rehashed, snapshot, tiny, write_hf
from tests.helpers.meshes import MESHES, check_parts

VARIANTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "dense": {"n_routed_experts": None, "num_experts_per_tok": None, "n_shared_experts": None},
}


def model_of(dtype: Any = np.float32, **changes: Any) -> DeepSeekMoE:
    config = tiny(**changes)
    return assemble(config, {name: jnp.asarray(array) for name, array in random_params(config, dtype).items()})


def differing(got: DeepSeekMoE, want: dict[str, np.ndarray]) -> list[str]:
    """Return the names of parameters that differ in dtype, shape or any bit."""
    arrays = {name: np.asarray(array) for name, array in split(got)[1].items()}
    assert arrays.keys() == want.keys()
    return [
        name
        for name, array in arrays.items()
        if (array.dtype, array.shape, array.tobytes()) != (want[name].dtype, want[name].shape, want[name].tobytes())
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared checkpoint; do not modify."""
    path = tmp_path_factory.mktemp("checkpoint") / "saved"
    save(model_of(), path)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        pytest.param(
            changes, dtype, id=f"{name}-{short}", marks=[pytest.mark.slow] * (name != "everything" and short != "bf16")
        )
        for name, changes in VARIANTS.items()
        for short, dtype in (("fp32", np.float32), ("bf16", ml_dtypes.bfloat16), ("fp16", np.float16))
    ],
)
def test_save_and_load_are_bitwise_inverse(tmp_path: Path, changes: dict, dtype: Any):
    save(model_of(dtype, **changes), tmp_path / "out")

    model = load(tmp_path / "out")

    assert model.config == tiny(**changes)
    assert differing(model, random_params(tiny(**changes), dtype)) == []


def test_load_casts_to_dtype(saved: Path):
    model = load(saved, dtype="bfloat16")

    assert differing(model, random_params(tiny(), ml_dtypes.bfloat16)) == []


def test_an_unknown_dtype_is_rejected(saved: Path):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int4'"):
        load(saved, dtype="int4")


def test_a_relative_path_and_a_moved_checkpoint_load(copy: Path, monkeypatch: pytest.MonkeyPatch):
    copy.rename(copy.parent / "moved")
    monkeypatch.chdir(copy.parent)

    model = load("moved")

    assert differing(model, random_params(tiny())) == []


@pytest.mark.parametrize("kind", ["folder", "file", "checkpoint"])
def test_save_does_not_overwrite(tmp_path: Path, saved: Path, kind: str):
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "checkpoint": lambda: shutil.copytree(saved, out)}[kind]()
    before = snapshot(tmp_path)

    with pytest.raises(ValueError, match="out exists; nothing is overwritten"):
        save(model_of(), out)

    assert snapshot(tmp_path) == before


def test_save_below_a_file_is_rejected(tmp_path: Path):
    (tmp_path / "file").touch()

    with pytest.raises(ValueError, match="cannot be written") as refused:
        save(model_of(), tmp_path / "file" / "out")

    assert "\n" not in str(refused.value)


def test_a_failed_save_leaves_nothing(tmp_path: Path):
    with pytest.raises(DSMoEError, match=r"tokenizer\.json is not a file"):
        save(model_of(), tmp_path / "out", extra_files=[tmp_path / "tokenizer.json"])

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [OSError("disk full"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_a_save_stopped_at_its_last_file_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
):
    def fail(folder: Path, arrays: dict, source: dict) -> str:
        assert arrays
        assert list(folder.iterdir())
        raise stop

    monkeypatch.setattr(native, "write_manifest", fail)

    with pytest.raises(type(stop)):
        save(model_of(), tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def weights_file(folder: Path) -> Path:
    return max((file for file in (folder / "parameters").rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)


def flip(at: float) -> Callable[[Path], None]:
    """Flip one bit of the weights at this fraction of their file."""

    def spoil(folder: Path) -> None:
        data = bytearray(weights_file(folder).read_bytes())
        data[int(at * len(data))] ^= 1
        weights_file(folder).write_bytes(data)

    return spoil


MODEL_MANIFEST = "dsmoe_jax.json"
METADATA = "parameters/state/_METADATA"

# damage | error
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (lambda folder: folder.rename(folder.parent / "away"), "copy: not a native checkpoint"),
    "no header": (lambda folder: (folder / MODEL_MANIFEST).unlink(), "copy: not a native checkpoint"),
    "another format": (edit(MODEL_MANIFEST, lambda h: h.update(format=3)), "format must be 2, got 3"),
    "a header that is no JSON": (
        lambda folder: (folder / MODEL_MANIFEST).write_text("{"),
        "dsmoe_jax.json: is not JSON",
    ),
    "a header without files": (edit(MODEL_MANIFEST, lambda h: h.pop("files")), "`files` must list"),
    "a header without tensors": (edit(MODEL_MANIFEST, lambda h: h.pop("tensors")), "`tensors` must list"),
    "a header that leads out": (
        rehashed(edit(MODEL_MANIFEST, lambda h: h["files"].update({"parameters/../../x": {"bytes": 0, "sha256": ""}}))),
        r"'parameters/\.\./\.\./x' is missing",
    ),
    "a header without sums": (
        edit(MODEL_MANIFEST, lambda h: h["files"].update({METADATA: {}})),
        "must have bytes and sha256",
    ),
    "a header with other sums": (
        rehashed(edit(MODEL_MANIFEST, lambda h: h["files"].update({METADATA: {"bytes": 1, "sha256": ""}}))),
        "_METADATA' has",
    ),
    "a tensor of another dtype": (
        edit(MODEL_MANIFEST, lambda h: h["tensors"]["embed"].update(dtype="int4")),
        "int4.* is not the shape and dtype of a tensor",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "damaged: 'config.json' is missing"),
    "another config": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("e-06", "e-02")
        ),
        "damaged: 'config.json' does not match its SHA-256",
    ),
    "an edited header": (
        edit(MODEL_MANIFEST, lambda h: h["source"].update(repository="other")),
        "damaged: 'dsmoe_jax.json' does not match",
    ),
    "a layer more": (
        rehashed(edit("config.json", lambda c: c.update(num_hidden_layers=3))),
        r"layers\.2\.\S+ is missing \(and 12 more\)",
    ),
    "a layer less": (
        rehashed(edit("config.json", lambda c: c.update(num_hidden_layers=1))),
        r"layers\.1\.\S+ is unexpected under this config \(and 12 more\)",
    ),
    "tied": (
        rehashed(edit("config.json", lambda c: c.update(tie_word_embeddings=True))),
        r"head\.weight is unexpected",
    ),
    "other experts": (
        rehashed(edit("config.json", lambda c: c.update(moe_intermediate_size=8, n_shared_experts=4))),
        r"layers\.1\.moe\.experts\.down has shape \[8, 32, 16\], the config asks for \[8, 32, 8\]",
    ),
    "missing weights": (lambda folder: weights_file(folder).unlink(), "damaged: .* is missing"),
    "empty weights": (lambda folder: os.truncate(weights_file(folder), 0), "damaged: .* has 0 bytes"),
    "truncated weights": (lambda folder: os.truncate(weights_file(folder), 50_000), "damaged: .* has 50000 bytes"),
    "a bit at the start": (flip(0.0), r"damaged: .*SHA-256 \(tensor \S+\)"),
    "a bit in the middle": (flip(0.5), r"damaged: .*SHA-256 \(tensor \S+\)"),
    "a bit at the end": (flip(0.9999), r"damaged: .*SHA-256 \(tensor \S+\)"),
    "no metadata": (lambda folder: (folder / METADATA).unlink(), "damaged: .*_METADATA' is missing"),
    "no parameters": (lambda folder: shutil.rmtree(folder / "parameters"), "damaged: .* is missing"),
    "empty parameters, sums and all": (
        rehashed(
            lambda folder: (
                shutil.rmtree(folder / "parameters"),
                (folder / "parameters").mkdir(),
                edit(MODEL_MANIFEST, lambda h: h.update(files={"config.json": {}}))(folder),
            )
        ),
        "damaged: ",
    ),
}


@pytest.mark.parametrize(("spoil", "named"), BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_rejected(copy: Path, spoil: Callable[[Path], Any], named: str):
    spoil(copy)

    with pytest.raises(ValueError, match=named) as refused:
        load(copy)

    assert "\n" not in str(refused.value)
    assert str(copy) in str(refused.value)


def test_a_hugging_face_folder_is_not_native(tmp_path: Path):
    write_hf(tmp_path, tiny(), random_params(tiny()))

    with pytest.raises(ValueError, match="not a native checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_device_loads_its_shard(saved: Path, mesh: str):
    model = load(saved, mesh=MESHES[mesh])

    check_parts(model, mesh)
    assert differing(model, random_params(tiny())) == []


def test_a_sharded_checkpoint_loads_on_any_mesh(tmp_path: Path, saved: Path):
    save(load(saved, mesh=MESHES["fsdp=8"]), tmp_path / "out")

    elsewhere, alone = load(tmp_path / "out", mesh=MESHES["expert=4,fsdp=2"]), load(tmp_path / "out")

    check_parts(elsewhere, "expert=4,fsdp=2")
    assert differing(elsewhere, random_params(tiny())) == []
    assert differing(alone, random_params(tiny())) == []
