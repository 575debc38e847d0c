"""`dsmoe_jax.load`: sources, arguments and the deprecated loader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsmoe_jax
from dsmoe_jax import convert
from dsmoe_jax.convert import attach_adapter, import_hf, write_adapter
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Generator
from dsmoe_jax.kernels.operand import LowRank, Quantized
from dsmoe_jax.loading import resolve
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.model import split
from tests.helpers.adapters import random_adapter
from tests.helpers.hf_folder import random_params, tiny, write_hf

IDS = np.array([[0, 5, 9, 2]])


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("loading") / "hf", tiny(), random_params(tiny()), shards=2)


@pytest.fixture(scope="module")
def native(hf: Path) -> Path:
    return import_hf(hf, hf.with_name("native")).path


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": "nf4"}], ids=str)
def test_both_layouts_load_the_same_model(hf: Path, native: Path, options: dict[str, Any]):
    one, other = dsmoe_jax.load(hf, **options), dsmoe_jax.load(str(native), **options)

    np.testing.assert_array_equal(one(IDS).logits, other(IDS).logits)
    embed = split(one)[1]["embed"]
    assert isinstance(embed, Quantized) == ("quantize" in options)
    assert "dtype" not in options or embed.dtype == "bfloat16"


def test_an_adapter_is_attached(hf: Path, tmp_path: Path):
    from dsmoe_jax.convert.peft_matching import make_plan

    config = LoraConfig(r=2, target_modules=("q_proj",))
    write_adapter(tmp_path / "adapter", config, tiny(), random_adapter(make_plan(config, tiny()), tiny()))

    model = dsmoe_jax.load(hf, adapter=tmp_path / "adapter")

    assert isinstance(split(model)[1]["layers.0.attention.q.weight"], LowRank)
    want = attach_adapter(dsmoe_jax.load(hf), tmp_path / "adapter")
    np.testing.assert_array_equal(model(IDS).logits, want(IDS).logits)


# fmt: off
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "absent":    ("absent", {}, r"^absent: no such file or folder, and not a hub id of the form owner/name$"),
    "a number":  (7, {}, r"^model must be a path, got 7$"),
    "revision":  ("{hf}", {"revision": "v1"}, r"^revision 'v1' needs a hub id, got the local path \S+hf$"),
    "dtype":     ("{hf}", {"dtype": "int3"}, r"^dtype must be one of float32, bfloat16, float16, got 'int3'$"),
    "quantize":  ("{hf}", {"quantize": "int3"}, r"^quantize must be one of int8, int4, nf4, got 'int3'$"),
    "mesh":      ("{hf}", {"mesh": 8}, r"^mesh must be a Mesh, a MeshConfig or None, got 8$"),
    "no files":  ("{empty}", {}, r"config\.json"),
}
# fmt: on


@pytest.mark.parametrize(("source", "options", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("load", [dsmoe_jax.load, Generator.from_pretrained], ids=["load", "from_pretrained"])
def test_bad_arguments_are_refused(
    load: Any, hf: Path, tmp_path: Path, source: Any, options: dict[str, Any], message: str
):
    source = source.format(hf=hf, empty=tmp_path) if isinstance(source, str) else source

    with pytest.raises(DSMoEError, match=message) as refused:
        load(source, **options)

    assert "\n" not in str(refused.value)


def test_a_checkpoint_without_its_manifest_is_named(native: Path, tmp_path: Path):
    import shutil

    shutil.copytree(native, tmp_path / "copy")
    (tmp_path / "copy" / "dsmoe_jax.json").unlink()

    with pytest.raises(DSMoEError, match=r"copy: not a native checkpoint \(no dsmoe_jax\.json\)$"):
        dsmoe_jax.load(tmp_path / "copy")


def test_a_mistyped_generator_option_is_refused_before_loading():
    with pytest.raises(DSMoEError, match=r"^unknown option 'max_batchsize'; did you mean 'max_batch_size'\?$"):
        Generator.from_pretrained("absent", max_batchsize=4)


def test_a_path_takes_precedence_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)

    assert resolve("owner/name") == Path("owner/name")


def test_load_hf_is_a_deprecated_alias(hf: Path):
    with pytest.warns(DeprecationWarning, match=r"load_hf is deprecated: use dsmoe_jax\.load$"):
        load_hf = convert.load_hf

    np.testing.assert_array_equal(load_hf(hf)(IDS).logits, dsmoe_jax.load(hf)(IDS).logits)
    assert "load_hf" not in convert.__all__
