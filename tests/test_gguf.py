"""GGUF files, read by llama.cpp. Start at `test_greedy_outputs_of_the_original`."""

import json
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.cli import main
from dsmoe_jax.convert import import_hf
from dsmoe_jax.convert.gguf_export import export_gguf
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.text.tokenizer import Tokenizer
from tests.helpers import golden, tokenizers
from tests.helpers.hf_folder import make_tokenizer, random_params, tiny, write_hf
from tests.helpers.tokenizers import train_model

gguf = pytest.importorskip("gguf", reason="the writer is gguf: pip install -e '.[gguf]'")

PROMPTS = range(3)
model_file = tokenizers.model_file


def llama_cpp() -> Any:
    return pytest.importorskip("xllamacpp", reason="the reader is llama.cpp: pip install -e '.[interop]'")


@contextmanager
def server(file: Path) -> Iterator[Any]:
    """Yield a function that posts JSON to llama.cpp's server on loopback."""
    module = llama_cpp()
    params = module.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(file), 256, 1, False
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = module.ggml_type.GGML_TYPE_F32  # default: float16
    params.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    running = module.Server(params)

    def post(path: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(running.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    yield post
    del running


def byte_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of `vocab_size` tokens with one merge, for models of 256 tokens or more."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet())[:255], "ab", *(f"<{i}>" for i in range(256, vocab_size))]
    library = Library(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("a", "b")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.save(str(folder / "tokenizer.json"))


def convert_case(case: str, work: Path) -> Path:
    """Return the native checkpoint of a golden case, with a tokenizer, without which llama.cpp generates nothing."""
    source = work / "hf"
    source.mkdir()
    for file in golden.folder(case).iterdir():
        shutil.copyfile(file, source / file.name)
    byte_tokenizer(source, json.loads((source / "config.json").read_text())["vocab_size"])
    return import_hf(source, work / "native").path


def complete(post: Any, prompt: list[int], **options: Any) -> dict[str, Any]:
    options = {"n_predict": 32, "temperature": 0, "ignore_eos": True, "return_tokens": True} | options
    return post("/completion", prompt=prompt, cache_prompt=False, **options)


@pytest.mark.parametrize("case", ["a_baseline", "k_bin_shards", "i_mid"])
def test_greedy_outputs_of_the_original(case: str, tmp_path: Path):
    native, want = convert_case(case, tmp_path), golden.expected(case)["generation"]
    export_gguf(native, tmp_path / "model.gguf", dtype="float32")

    with server(tmp_path / "model.gguf") as post:
        for i in PROMPTS:
            prompt = golden.tensors(case)[f"in.gen.prompt{i}"][0].tolist()
            assert complete(post, prompt)["tokens"] == want[f"prompt{i}"]


def test_text_has_our_ids(tmp_path: Path):
    texts = ["def f(x):\n    return x", "Grüße 12345 ｜", "  a\t\tb", "<｜end▁of▁sentence｜>"]
    config = tiny(vocab_size=320)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    make_tokenizer(tmp_path / "tokenizer", 300)
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(source / file.name)
    import_hf(source, tmp_path / "native")
    export_gguf(tmp_path / "native", tmp_path / "model.gguf")

    with server(tmp_path / "model.gguf") as post:
        ids = [post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in texts]
        back = [post("/detokenize", tokens=one[1:])["content"] for one in ids[:3]]

    assert ids == Tokenizer.from_pretrained(tmp_path / "native").encode_batch(texts)
    assert back == texts[:3]


def test_sentencepiece_text_has_our_ids(model_file: Path, tmp_path: Path):
    texts = ["the quick brown fox", " two  spaces", "wörld 你", "line\nbreak"]
    config = tiny(vocab_size=320, bos_token_id=1, eos_token_id=2)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    shutil.copyfile(model_file, source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    export_gguf(source, tmp_path / "model.gguf")

    with server(tmp_path / "model.gguf") as post:
        ids = [post("/tokenize", content=text, add_special=True)["tokens"] for text in texts]

    assert ids == Tokenizer.from_pretrained(source).encode_batch(texts)


def test_unigram_models_are_refused(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    train_model(source / "tokenizer.model", model_type="unigram", byte_fallback=False, vocab_size=60)

    with pytest.raises(DSMoEError, match=r"llama\.cpp needs a BPE model, got a unigram one"):
        export_gguf(source, tmp_path / "model.gguf")


def test_normalizing_models_are_refused(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(vocab_size=320), random_params(tiny(vocab_size=320)))
    train_model(source / "tokenizer.model")

    with pytest.raises(DSMoEError, match=r"llama\.cpp does not normalize text, which this model does"):
        export_gguf(source, tmp_path / "model.gguf")


def test_added_tokens_with_flags_are_refused(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(vocab_size=320), random_params(tiny(vocab_size=320)))
    byte_tokenizer(source, 300)
    fields = json.loads((source / "tokenizer.json").read_text())
    flags = {"single_word": True, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    fields["added_tokens"] = [{"id": 300, "content": "<sep>", **flags}]
    (source / "tokenizer.json").write_text(json.dumps(fields))

    with pytest.raises(DSMoEError, match=r"llama\.cpp does not support single_word of added token '<sep>'"):
        export_gguf(source, tmp_path / "model.gguf")


def test_deepseek_tokenizer_has_our_ids(tmp_path: Path):
    folder = golden.SHARED / "tokenizer"
    if not folder.is_dir():
        pytest.skip("DeepSeek's tokenizer is in ../shared, which is absent")
    texts = [vector["text"] for vector in json.loads((folder / "vectors_raw.json").read_text()) if vector["text"]]
    config = tiny(vocab_size=102400)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, source / name)
    import_hf(source, tmp_path / "native")
    export_gguf(tmp_path / "native", tmp_path / "model.gguf")

    with server(tmp_path / "model.gguf") as post:
        found = [post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] for text in texts]

    assert found == Tokenizer.from_pretrained(tmp_path / "native").encode_batch(texts)


@pytest.mark.parametrize(("dtype", "bound"), [("q8_0", 0.03), ("bfloat16", 0.01), ("float16", 0.002)])
def test_tensors_are_within_the_rounding(dtype: str, bound: float, tmp_path: Path):
    config = tiny(vocab_size=320, moe_intermediate_size=32, intermediate_size=64)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    byte_tokenizer(source, 320)
    import_hf(source, tmp_path / "native")
    for name in ("float32", dtype):
        export_gguf(tmp_path / "native", tmp_path / f"{name}.gguf", dtype=name)

    exact, rounded = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("float32", dtype))

    kinds = {tensor.name: tensor.tensor_type.name for tensor in rounded}
    assert kinds["blk.1.ffn_gate_exps.weight"] == {"q8_0": "Q8_0", "bfloat16": "BF16", "float16": "F16"}[dtype]
    assert {kinds[name] for name in ("output_norm.weight", "blk.1.ffn_gate_inp.weight")} == {"F32"}
    for one, other in zip(exact, rounded, strict=True):
        values = gguf.dequantize(other.data, other.tensor_type).reshape(one.data.shape)
        assert np.abs(values - one.data).max() <= bound * np.abs(one.data).max(), one.name


def test_rows_that_do_not_divide_into_blocks_stay_float16(tmp_path: Path):
    config = tiny()  # experts 16 wide
    source = write_hf(tmp_path / "hf", config, random_params(config))
    import_hf(source, tmp_path / "native")

    export_gguf(tmp_path / "native", tmp_path / "model.gguf", dtype="q8_0")

    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["blk.1.ffn_down_exps.weight"], kinds["blk.1.ffn_up_exps.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize(("changes", "named"), [
    ({"norm_topk_prob": True}, "norm_topk_prob True"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
    ({"n_shared_experts": None}, "n_shared_experts None"),
    ({"n_routed_experts": None, "num_experts_per_tok": None}, "n_routed_experts None"),
], ids=str)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(changes: dict[str, Any], named: str, tmp_path: Path):
    config = tiny(**changes)
    import_hf(write_hf(tmp_path / "hf", config, random_params(config)), tmp_path / "native")

    with pytest.raises(DSMoEError, match=named):
        export_gguf(tmp_path / "native", tmp_path / "model.gguf")

    assert not (tmp_path / "model.gguf").exists()


def test_damaged_tensor_leaves_no_file(tmp_path: Path):
    import_hf(write_hf(tmp_path / "hf", tiny(), random_params(tiny())), tmp_path / "native")
    (array,) = (path for path in (tmp_path / "native").rglob("norm.weight/**/*") if path.name == "0")
    data = bytearray(array.read_bytes())
    data[0] ^= 1
    array.write_bytes(data)

    with pytest.raises(DSMoEError, match=r"SHA-256 mismatch of tensor norm\.weight"):
        export_gguf(tmp_path / "native", tmp_path / "model.gguf")

    assert {path.name for path in tmp_path.iterdir()} == {"hf", "native"}


def test_unknown_pre_tokenizer_is_refused(tmp_path: Path):
    config = tiny(vocab_size=320)
    source = write_hf(tmp_path / "hf", config, random_params(config))
    byte_tokenizer(source, 320)
    fields = json.loads((source / "tokenizer.json").read_text())
    fields["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(fields))
    import_hf(source, tmp_path / "native")

    with pytest.raises(DSMoEError, match=r"tokenizer\.json: llama\.cpp has no pre-tokenizer equal to this one"):
        export_gguf(tmp_path / "native", tmp_path / "model.gguf")


def test_existing_file_is_kept(tmp_path: Path):
    (tmp_path / "model.gguf").write_text("mine")

    with pytest.raises(DSMoEError, match="exists"):
        export_gguf(tmp_path, tmp_path / "model.gguf")

    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_dtype_must_be_known(tmp_path: Path):
    with pytest.raises(DSMoEError, match="dtype must be one of float32, float16, bfloat16, q8_0, got 'q4_k'"):
        export_gguf(tmp_path, tmp_path / "model.gguf", dtype="q4_k")


def test_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = write_hf(tmp_path / "hf", tiny(), random_params(tiny()))
    file = tmp_path / "model.gguf"

    code = main(["export", str(source), str(file), "--format", "gguf", "--dtype", "bfloat16"])
    refused = main(["export", str(source), str(tmp_path / "other"), "--format", "gguf", "--with-modeling"])

    assert (code, refused) == (0, 2)
    assert gguf.GGUFReader(file).fields["general.architecture"].contents() == "deepseek"
    assert capsys.readouterr().err.splitlines()[-1] == "dsmoe export: --with-modeling needs --format hf"
