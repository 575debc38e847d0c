"""Exports opened by transformers, 4.56 to 5: config, tokenizer, model, generation, training and PEFT.

Start at `test_logits_and_greedy_outputs_of_the_original`. The model is the exported PyTorch code; the expected values
are those of the original.
"""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_jax.convert import export_hf, import_hf
from dsmoe_jax.convert.peft import read_adapter, write_adapter
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.text.tokenizer import Tokenizer
from tests.helpers import exports, golden
from tests.helpers.exports import export, load, logits
from tests.helpers.hf_folder import VARIANTS, make_tokenizer, random_params, tiny, write_hf

pytest.importorskip("torch", reason="the reader is PyTorch: pip install -e '.[interop]'")
pytest.importorskip("transformers", reason="the reader is transformers: pip install -e '.[interop]'")
import torch  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, AutoTokenizer, GenerationConfig  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers

GREEDY: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
modules_cache = exports.modules_cache
GRADIENTS = 1e-3  # relative
IDS = torch.from_numpy(np.random.default_rng(1).integers(2, 64, (2, 12)))


def tensor(case: str, name: str) -> torch.Tensor:
    return torch.from_numpy(golden.tensors(case)[name].astype(np.int64))


@pytest.mark.parametrize("case", golden.CASES)
def test_logits_and_greedy_outputs_of_the_original(case: str, tmp_path: Path):
    want, generation = golden.tensors(case), golden.expected(case)["generation"]

    model = load(export(golden.folder(case), tmp_path))

    assert np.abs(logits(model, input_ids=tensor(case, "in.input_ids")) - want["logits"]).max() < golden.LOGITS
    for i in range(3):
        prompt = tensor(case, f"in.gen.prompt{i}")
        assert model.generate(prompt, **GREEDY)[0, prompt.shape[1] :].tolist() == generation[f"prompt{i}"]


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_padded_batches_generate_alike_with_every_cache(cache: str, tmp_path: Path):
    case, want = "a_baseline", golden.expected("a_baseline")["generation"]["leftpad_batch"]
    inputs = {name: tensor(case, f"in.gen.batch_{name}") for name in ("input_ids", "attention_mask")}
    options = {"none": {"use_cache": False}, "dynamic": {}}.get(cache, {"cache_implementation": cache})
    model = load(export(golden.folder(case), tmp_path))

    outputs = model.generate(**inputs, **GREEDY, **options, disable_compile=True)

    assert outputs[:, inputs["input_ids"].shape[1] :].tolist() == want


def test_left_padding_with_and_without_position_ids(tmp_path: Path):
    case = "a_baseline"
    inputs = {name: tensor(case, f"in.leftpad.{name}") for name in ("input_ids", "attention_mask", "position_ids")}
    valid = inputs["attention_mask"].bool().numpy()
    model = load(export(golden.folder(case), tmp_path))

    explicit = logits(model, **inputs)
    default = logits(model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

    want = golden.tensors(case)
    assert np.abs(explicit - want["leftpad.logits"])[valid].max() < golden.LOGITS
    assert np.abs(default - want["leftpad.logits_default_position_ids"])[valid].max() < golden.LOGITS


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_training_losses_and_gradients_of_the_original(checkpointing: bool, tmp_path: Path):
    case, want = "a_baseline", golden.expected("a_baseline")
    model = load(export(golden.folder(case), tmp_path)).train()
    if checkpointing:
        model.gradient_checkpointing_enable()

    out = model(tensor(case, "in.train.input_ids"), labels=tensor(case, "in.train.labels"))
    out.loss.backward()

    assert float((out.loss - out.aux_loss).detach()) == pytest.approx(want["train"]["ce"], abs=1e-5)
    assert float(out.aux_loss.detach()) == pytest.approx(want["train"]["aux_sum"], abs=1e-6)
    norms = {name: float(value.grad.norm()) for name, value in model.named_parameters()}
    assert norms == pytest.approx(want["grad_norms"], rel=GRADIENTS)


def test_balance_loss_over_the_batch(tmp_path: Path):
    case, want = "a_baseline", golden.expected("a_baseline")["train_aux_seq_false"]
    model = load(export(golden.folder(case), tmp_path)).train()
    model.config.seq_aux = False

    out = model(tensor(case, "in.train.input_ids"), labels=tensor(case, "in.train.labels"))

    assert float(out.aux_loss.detach()) == pytest.approx(want["aux_sum"], abs=1e-6)


@pytest.mark.parametrize("changes", [
    *VARIANTS.values(),
    {"hidden_act": "gelu"},
    {"num_experts_per_tok": 1, "norm_topk_prob": True},
    {"rope_scaling": {"type": "dynamic", "factor": 2.5}, "max_position_embeddings": 8},
], ids=[*VARIANTS, "gelu", "top-1", "dynamic"])  # fmt: skip
def test_variants_have_our_logits(changes: dict[str, Any], tmp_path: Path):
    import dsmoe_jax

    config = tiny(**changes)
    params = {
        name: value + 1 if name.endswith("norm.weight") else 3 * value for name, value in random_params(config).items()
    }
    exported = export(write_hf(tmp_path / "hf", config, params), tmp_path)

    model = load(exported)

    want = np.asarray(dsmoe_jax.load(tmp_path / "native")(IDS.numpy().astype(np.int32)).logits)
    assert np.abs(logits(model, input_ids=IDS) - want).max() < golden.LOGITS


def test_bfloat16_is_as_close_as_the_original(tmp_path: Path):
    case = "a_baseline"
    model = load(export(golden.folder(case), tmp_path), dtype=torch.bfloat16)

    error = logits(model, input_ids=tensor(case, "in.input_ids")) - golden.tensors(case)["logits"]

    assert np.sqrt((error**2).mean()) < 2 * golden.expected(case)["bf16_vs_fp32_logits_rms"]


def test_saved_by_transformers_and_converted_back(tmp_path: Path):
    exported = export(golden.folder("a_baseline"), tmp_path)

    load(exported).save_pretrained(tmp_path / "saved")
    import_hf(tmp_path / "saved", tmp_path / "again")

    before, after = (json.loads((tmp_path / name / "dsmoe_jax.json").read_text()) for name in ("native", "again"))
    assert before["tensors"] == after["tensors"]
    assert not list((tmp_path / "again").glob("*.py"))


def test_config_alone_opens_without_the_model(tmp_path: Path):
    import_hf(golden.folder("b_norm_topk"), tmp_path / "native")
    export_hf(tmp_path / "native", tmp_path / "exported")

    config = AutoConfig.from_pretrained(tmp_path / "exported", trust_remote_code=True)

    fields = json.loads((golden.folder("b_norm_topk") / "config.json").read_text())
    names = {"n_routed_experts", "norm_topk_prob", "moe_intermediate_size", "vocab_size", "rope_theta"}
    assert {name: getattr(config, name) for name in names} == {name: fields[name] for name in names}
    assert config.architectures == ["DeepseekForCausalLM"]


# What the models of vLLM and SGLang for `DeepseekForCausalLM` read of the config, besides `rope_scaling`.
ENGINES = {
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_routed_experts", "num_experts_per_tok"),
    *("moe_layer_freq", "first_k_dense_replace", "norm_topk_prob", "hidden_act", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "tie_word_embeddings", "attention_bias", "bos_token_id", "eos_token_id"),
}


def test_serving_engines_find_what_they_read(tmp_path: Path):
    source = write_hf(tmp_path / "hf", tiny(vocab_size=300), random_params(tiny(vocab_size=300)))
    make_tokenizer(tmp_path / "tokenizer", 300)
    for file in (tmp_path / "tokenizer").iterdir():
        file.rename(source / file.name)
    exported = export(source, tmp_path)

    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    generation = GenerationConfig.from_pretrained(exported)

    stored = json.loads((exported / "config.json").read_text())
    assert {name: getattr(config, name) for name in ENGINES} == {name: stored[name] for name in ENGINES}
    assert (config.rope_scaling or {}).get("rope_type", "default") == "default"
    assert (config.model_type, config.architectures) == ("deepseek", ["DeepseekForCausalLM"])
    assert config.get_text_config() is config
    assert config.dtype == torch.float32
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert tokenizer("def f")["input_ids"] == Tokenizer.from_pretrained(exported).encode("def f")
    assert generation.eos_token_id == config.eos_token_id


def test_rope_fields_of_either_line_are_read(tmp_path: Path):
    import dsmoe_jax

    config = tiny(rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4.0})
    params = {name: 3 * value for name, value in random_params(config).items()}
    exported = export(write_hf(tmp_path / "hf", config, params), tmp_path)
    fields = json.loads((exported / "config.json").read_text())
    del fields["rope_theta"], fields["rope_scaling"]
    rope = {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}
    want = np.asarray(dsmoe_jax.load(tmp_path / "native")(IDS.numpy().astype(np.int32)).logits)

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        AutoConfig.from_pretrained(exported, trust_remote_code=True)
    errors = [np.abs(logits(load(exported), input_ids=IDS) - want).max()]
    (exported / "config.json").write_text(json.dumps(fields | {"rope_parameters": rope}))  # as transformers 5 saves it
    errors.append(np.abs(logits(load(exported), input_ids=IDS) - want).max())

    assert max(errors) < golden.LOGITS


def test_trained_tokenizer_has_equal_ids(tmp_path: Path):
    make_tokenizer(tmp_path / "tokenizer", 300)
    texts = ["def f(x):\n    return x", "Grüße  \u3000 12345 ｜<｜begin▁of▁sentence｜>", "", " a"]

    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    ours = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    assert [theirs(text)["input_ids"] for text in texts] == ours.encode_batch(texts)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_token_id, ours.eos_token_id)


def test_our_adapter_opens_in_peft_on_the_export(tmp_path: Path):
    import dsmoe_jax

    peft = pytest.importorskip("peft", reason="pip install -e '.[interop]'")
    config = tiny()
    exported = export(write_hf(tmp_path / "hf", config, random_params(config)), tmp_path)
    lora = LoraConfig(r=2, target_modules=("q_proj", "up_proj", "down_proj"))
    names = read_shapes(lora, config)
    rng = np.random.default_rng(0)
    write_adapter(tmp_path / "adapter", lora, config, {name: rng.normal(size=shape) for name, shape in names.items()})

    adapted = peft.PeftModel.from_pretrained(load(exported), tmp_path / "adapter").eval()

    ours = dsmoe_jax.load(tmp_path / "native", adapter=tmp_path / "adapter")
    want = np.asarray(ours(IDS.numpy().astype(np.int32)).logits)
    assert np.abs(logits(adapted, input_ids=IDS) - want).max() < golden.LOGITS
    assert np.abs(logits(load(exported), input_ids=IDS) - want).max() > 100 * golden.LOGITS
    assert read_adapter(tmp_path / "adapter", config).base is None


def read_shapes(lora: LoraConfig, config: Any) -> dict[str, tuple[int, ...]]:
    from dsmoe_jax.convert.peft_matching import base_config, make_plan
    from dsmoe_jax.lora import specs

    plan = make_plan(lora, config)
    return {name: spec.shape for name, spec in specs(plan, base_config(plan, config)).items()}


@pytest.mark.parametrize("name", ["configuration_deepseek", "modeling_deepseek"])
def test_templates_are_formatted_and_typed(name: str, tmp_path: Path):
    code = tmp_path / f"{name}.py"
    code.write_bytes((Path(import_hf.__code__.co_filename).with_name(f"{name}.py.txt")).read_bytes())
    config = Path(__file__).parent.parent / "pyproject.toml"
    for command in (["check", "--ignore", "D"], ["format", "--check"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(config), str(code)], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
