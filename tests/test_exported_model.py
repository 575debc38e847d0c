"""Arguments and training of the exported PyTorch code: what transformers' own models do, or a clear error.

Start at `test_accumulated_gradients_equal_those_of_the_batch`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import exports
from tests.helpers.exports import export, load
from tests.helpers.hf_folder import make_tokenizer, random_params, tiny, write_hf

torch: Any = pytest.importorskip("torch", reason="the reader is PyTorch: pip install -e '.[interop]'")
transformers: Any = pytest.importorskip(
    "transformers", reason="the reader is transformers: pip install -e '.[interop]'"
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch and transformers

modules_cache = exports.modules_cache
IDS = torch.from_numpy(np.random.default_rng(1).integers(2, 64, (4, 12)))
EQUAL: dict[str, float] = {"rtol": 1e-4, "atol": 1e-6}  # of float32 sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("exported")
    config = tiny(vocab_size=300, aux_loss_alpha=1.0)  # large, so that an error is seen
    make_tokenizer(work / "hf", 300)
    params = {name: value + 0.9 * name.endswith("norm.weight") for name, value in random_params(config).items()}
    return export(write_hf(work / "hf", config, params), work)


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder)


def trainer(model: Any, work: Path, **options: Any) -> Any:
    pytest.importorskip("accelerate", reason="Trainer needs accelerate: pip install -e '.[interop]'")
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0} | options
    arguments = transformers.TrainingArguments(
        output_dir=str(work / "out"), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **options
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def test_accumulated_gradients_equal_those_of_the_batch(folder: Path, tmp_path: Path):
    after = []
    for batch, steps in ((4, 1), (1, 4)):
        model = load(folder)
        trainer(model, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps).train()
        after.append(dict(model.named_parameters()))

    before = dict(load(folder).named_parameters())
    for name, whole in after[0].items():
        torch.testing.assert_close(after[1][name] - before[name], whole - before[name], **EQUAL)
    assert any((whole - before[name]).abs().max() > 1e-2 for name, whole in after[0].items())


def test_balance_loss_is_the_share_of_a_micro_batch(model: Any):
    model.train()
    labels = IDS.clone()
    labels[0, 3:] = -100

    whole = model(IDS, labels=labels)
    half = model(IDS, labels=labels, num_items_in_batch=2 * int((labels[:, 1:] != -100).sum()))

    torch.testing.assert_close(half.aux_loss, whole.aux_loss / 2)
    torch.testing.assert_close(half.loss, whole.loss / 2)


def test_trainer_evaluates_the_cross_entropy(model: Any, tmp_path: Path):
    found = trainer(model, tmp_path, per_device_eval_batch_size=2).evaluate()

    logits = model(IDS).logits[:, :-1].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
    shares = (1.0, 11 / 12)  # transformers 4 divides by the number of labels, the first of a sequence included
    assert any(found["eval_loss"] == pytest.approx(float(want) * share, rel=1e-4) for share in shares)


def test_gradient_checkpointing_ignores_the_cache(model: Any):
    model.train()
    want = model(IDS, labels=IDS, use_cache=True)
    want.loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()

    model.gradient_checkpointing_enable()
    found = model(IDS, labels=IDS, use_cache=True)
    found.loss.backward()

    assert found.past_key_values is None
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], **EQUAL)


@pytest.mark.parametrize("options", [
    {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True},
    {"prompt_lookup_num_tokens": 3},
    {"use_cache": False},
], ids=["all outputs", "speculative", "no cache"])  # fmt: skip
def test_text_is_generated_from_the_tokenizer_output(options: dict[str, Any], folder: Path, model: Any):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def f(x): return", return_tensors="pt")
    common: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}

    found = model.generate(**inputs, **common, **options)

    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert getattr(found, "sequences", found).tolist() == model.generate(**plain, **common).tolist()


def test_stop_strings_end_the_output(folder: Path, model: Any):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompt: dict[str, Any] = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    common: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(**prompt, **common)[0, 12:]
    stop = tokenizer.decode(want[1:2])  # the first token is no complete character

    found = model.generate(**prompt, **common, stop_strings=[stop], tokenizer=tokenizer)[0, 12:]

    assert found.tolist() == want[:2].tolist()


def test_generation_keeps_the_cache_in_training_mode(model: Any):
    prompt: dict[str, Any] = {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    want = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    lengths: list[int] = []
    model.train()
    model.gradient_checkpointing_enable()
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))

    found = model.generate(**prompt, max_new_tokens=8, do_sample=False)

    assert found.tolist() == want.tolist()
    assert lengths == [12] + [1] * (len(found[0]) - 13)


def test_shifted_labels_are_used(model: Any):
    shifted = torch.nn.functional.pad(IDS, (0, 1), value=-100)[:, 1:].contiguous()

    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, model(IDS, labels=IDS).loss)


def test_outputs_as_a_tuple(model: Any):
    want = model(IDS, labels=IDS)

    loss, logits, *rest = model(IDS, labels=IDS, return_dict=False)
    hidden, *_ = model.model(IDS, return_dict=False)

    torch.testing.assert_close((loss, logits), (want.loss, want.logits))
    assert len(rest) == 2  # cache and router logits
    torch.testing.assert_close(model.lm_head(hidden), want.logits)


def test_hidden_states_and_attentions_when_asked_for(model: Any):
    plain = model(IDS)

    out = model(IDS, output_hidden_states=True, output_attentions=True, output_router_logits=False)

    torch.testing.assert_close(out.logits, plain.logits, **EQUAL)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(out.hidden_states[0], model.model.embed_tokens(IDS))
    assert len(out.hidden_states) == 3
    assert [weights.shape for weights in out.attentions] == [(4, 4, 12, 12)] * 2
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(4, 4, 12))
    assert (out.attentions[0].triu(1) == 0).all()
    assert (out.router_logits, plain.hidden_states, plain.attentions) == (None, None, None)
    assert len(plain.router_logits) == 1


def test_options_of_the_config_hold(folder: Path):
    model = load(folder, output_hidden_states=True, attn_implementation="eager")
    model.config.output_attentions = True

    out = model(IDS)

    assert (len(out.hidden_states), len(out.attentions)) == (3, 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_four_dimensional_masks(dtype: Any, model: Any):
    padding = torch.ones(4, 12, dtype=torch.int64)
    padding[:, :3] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    allowed = (padding.bool()[:, None] | torch.eye(12, dtype=torch.bool)).tril()[:, None]
    mask = allowed.to(dtype) if dtype != torch.float32 else torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)

    found = model(IDS, attention_mask=mask, position_ids=positions).logits

    want = model(IDS, attention_mask=padding, position_ids=positions).logits
    torch.testing.assert_close(found[:, 3:], want[:, 3:], **EQUAL)


def test_packed_sequences_do_not_attend_to_each_other(model: Any):
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]

    packed = model(IDS[:1], position_ids=positions, use_cache=False).logits

    torch.testing.assert_close(packed[:, :5], model(IDS[:1, :5]).logits, **EQUAL)
    torch.testing.assert_close(packed[:, 5:], model(IDS[:1, 5:]).logits, **EQUAL)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"cu_seq_lens_q": torch.tensor([0, 12])}, "DeepseekModel does not support the arguments cu_seq_lens_q"),
    ({"attention_mask": torch.ones(4, 5)}, r"attention_mask must have shape \[4, 12\], got \[4, 5\]"),
    ({"attention_mask": torch.ones(4, 12, 12)}, r"attention_mask must be \[batch, tokens\] or .*, got \[4, 12, 12\]"),
    ({"attention_mask": torch.full((4, 1, 12, 12), 2)}, "4D attention_mask of integers must contain only 0 and 1"),
    ({"inputs_embeds": torch.ones(4, 12, 32)}, "pass either input_ids or inputs_embeds"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_other_arguments_are_refused(arguments: dict[str, Any], message: str, model: Any):
    with pytest.raises(ValueError, match=message):
        model(IDS, **arguments)
