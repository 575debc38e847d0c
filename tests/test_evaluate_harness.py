"""`DSMoELM`, the model of lm-evaluation-harness: requests, tokenization, truncation, generation arguments, chats."""

from typing import Any

import numpy as np
import pytest

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.evaluate.encoding import Encoder
from dsmoe_jax.evaluate.generation_args import generation_args
from dsmoe_jax.evaluate.responses import Response, Responses
from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.text.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="evaluation needs the harness: pip install -e '.[eval]'")

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import get_model, model_registry  # pyright: ignore[reportMissingImports]

from dsmoe_jax.evaluate.harness import DSMoELM

pytestmark = pytest.mark.heavy

PAIRS = [("def f(x", "): return"), ("import os ", " path"), ("", "import"), ("a\n", "b"), ("def f(x", "): return")]
WINDOW = 16


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]  # pyright: ignore


@pytest.fixture(scope="module")
def lm(generator: Generator) -> DSMoELM:
    return DSMoELM(generator)


def logprobs(generator: Generator, ids: list[int]) -> np.ndarray:
    """Log-probabilities at every position, by a whole forward pass."""
    from dsmoe_jax.model import merge

    logits = np.asarray(merge(generator._graph, generator._params)(np.array([ids])).logits[0], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_loglikelihood_equals_a_forward_pass(lm: DSMoELM, generator: Generator):
    tokenizer = generator.tokenizer
    assert tokenizer is not None

    found = lm.loglikelihood(requests("loglikelihood", PAIRS))

    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        stripped = context.rstrip()
        before = tokenizer.encode(stripped) if stripped else [lm.prefix_token_id]
        whole = (
            tokenizer.encode(context + continuation) if stripped else [*before, *tokenizer.encode(continuation)[-1:]]
        )
        table = logprobs(generator, whole)[len(before) - 1 : -1]
        targets = whole[len(before) :]
        assert logprob == pytest.approx(table[np.arange(len(targets)), targets].sum(), abs=1e-4)
        assert greedy == (table.argmax(-1).tolist() == targets)
    assert found[0] == found[-1]


def test_rolling_loglikelihood_predicts_every_token_once(generator: Generator):
    lm = DSMoELM(generator, max_length=WINDOW)
    text = "import os, sys\nassert path\n" * 6
    ids = lm.tok_encode(text)
    assert len(ids) > 2 * WINDOW

    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))

    want, tokens = 0.0, [lm.prefix_token_id, *ids]
    for start in range(0, len(ids), WINDOW):
        end = min(start + WINDOW, len(ids))
        read = tokens[max(0, end - WINDOW) : end]
        table = logprobs(generator, read)[-(end - start) :]
        want += table[np.arange(end - start), tokens[start + 1 : end + 1]].sum()
    assert found == pytest.approx(want, abs=1e-3)


def test_generation_stops_before_the_stop_string(lm: DSMoELM, generator: Generator):
    whole = generator("import", max_new_tokens=12).text
    stop = whole[4:6]

    found = lm.generate_until(
        requests(
            "generate_until", [("import", {"until": [stop], "max_gen_toks": 12}), ("import", {"max_gen_toks": 12})]
        )
    )

    assert found == [whole.split(stop)[0], whole]


def test_a_stop_string_that_is_a_special_token_stops_at_it(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    lm, whole = DSMoELM(generator), generator("import", max_new_tokens=8)
    second = next(token for token in whole.token_ids if token != whole.token_ids[0])  # the vocabulary may change
    before = whole.token_ids[: whole.token_ids.index(second)]
    monkeypatch.setattr(lm, "_special_id", {"<|call|>": second, "<|x|>": 1}.get)
    arguments = {"until": ["<|call|>", "<|none|>"], "max_gen_toks": 8}

    assert lm.tokenizer.eos_token is not None
    assert DSMoELM(generator)._special_id(lm.tokenizer.eos_token) == lm.tokenizer.eos_token_id
    assert [DSMoELM(generator)._special_id(text) for text in ("import", " ", "\n")] == [None] * 3
    assert lm._generation_args(arguments).params.stop_token_ids == (second,)
    (found,) = lm.generate_until(requests("generate_until", [("import", arguments)]))
    assert found == lm.tok_decode(before)
    assert found != whole.text


def test_the_default_length_leaves_half_the_window(generator: Generator):
    assert DSMoELM(generator, max_length=WINDOW).max_gen_toks == WINDOW // 2
    assert DSMoELM(generator, max_length=WINDOW, max_gen_toks=3).max_gen_toks == 3
    assert DSMoELM(generator, batch_size="auto:4").max_gen_toks == min(256, generator.config.context_length // 2)


def test_errors_name_task_and_document(generator: Generator):
    lm = DSMoELM(generator, max_length=WINDOW)
    cases: list[tuple[str, Any, Any]] = [
        ("loglikelihood", ("a", ""), lm.loglikelihood),
        ("generate_until", ("a", {"max_gen_toks": 16}), lm.generate_until),
        ("generate_until", ("a", {"untill": []}), lm.generate_until),
    ]
    for kind, arguments, answer in cases:
        one = Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("copy", 7, 1))  # pyright: ignore
        with pytest.raises(DSMoEError, match=r"^copy, document 7: "):
            answer([one])


def test_other_defaults_of_the_length_do_not_share_responses(generator: Generator):
    kept = Responses()

    texts = [
        DSMoELM(generator, responses=kept, max_gen_toks=length).generate_until(requests("", [("import", {})]))[0]
        for length in (2, 6)
    ]

    assert len(texts[0]) < len(texts[1])


def test_a_tokenizer_without_chat_template_is_named(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    lm = DSMoELM(generator)
    monkeypatch.setattr(lm.tokenizer, "chat_templates", {})

    with pytest.raises(DSMoEError, match="needs a chat template, and the tokenizer has none"):
        lm.chat_template(True)


def test_equal_requests_are_computed_once(generator: Generator):
    counted = []
    lm = DSMoELM(generator, responses=Responses(), progress=lambda what, total: counted.append(total) or _silent())
    for _ in range(2):
        lm.loglikelihood(requests("loglikelihood", [("a", " b"), ("a", " b"), ("a", " c")]))

    assert counted == [2]


def _silent() -> Any:
    from dsmoe_jax.progress import silent

    return silent("", 0)


def test_kept_responses_are_not_computed_again(lm: DSMoELM, generator: Generator):
    responses = Responses()
    first = DSMoELM(generator, responses=responses)
    first.loglikelihood(requests("loglikelihood", [("a", " b")]))
    (key,) = responses._known
    responses.add(key, Response([-1.5, True]))

    assert first.loglikelihood(requests("loglikelihood", [("a", " b")])) == [(-1.5, True)]


def test_samples_of_a_request_differ_and_repeat(generator: Generator):
    sampled = [("import", {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8})] * 2

    one, two, three = (DSMoELM(generator, seed=seed).generate_until(requests("", sampled)) for seed in (7, 7, 8))

    assert one[0] != one[1]
    assert one == two
    assert one != three


def test_a_long_context_loses_its_first_tokens_and_is_counted(generator: Generator, caplog: pytest.LogCaptureFixture):
    lm = DSMoELM(generator, max_length=WINDOW)
    long, continuation = "import os, sys\n" * 9 + "import", " path"
    ids = lm.tok_encode(long + continuation)
    kept = ids[-(WINDOW + 1) :]

    (found,) = lm.loglikelihood(requests("loglikelihood", [(long, continuation)]))
    lm.generate_until(requests("generate_until", [(long, {"max_gen_toks": 4}), ("a", {"max_gen_toks": 4})]))

    assert lm.truncated == 2
    assert "Truncated the context of 1 of 2 requests to max_length 16" in caplog.text
    split = len(kept) - len(ids) + len(lm.tok_encode(long))
    (want,) = generator.score([kept[:split]], [kept[split:]])
    assert found[0] == pytest.approx(want.logprob, abs=1e-5)


def test_texts_are_encoded_as_the_harness_does(tokenizer: Tokenizer):
    """`TemplateLM._encode_pair` of the harness, over the same tokenizer, is the reference."""
    encoder = Encoder(tokenizer, 7, 100)

    class Reference(DSMoELM):
        def __init__(self) -> None:
            self._encoder = encoder

    pairs = [("a b", " c"), ("a b  ", "c"), ("x\n\n", "\ny"), ("é", "ü z")]

    found = encoder.pairs(pairs)

    assert [pair[:2] for pair in found] == [Reference()._encode_pair(*pair) for pair in pairs]


def test_a_text_that_starts_with_bos_gets_no_other(generator: Generator, lm: DSMoELM):
    assert generator.tokenizer is not None
    bos = generator.tokenizer.decode([lm.prefix_token_id], skip_special_tokens=False)

    assert lm.tok_encode(f"{bos}a") == [lm.prefix_token_id, *lm.tok_encode("a", add_special_tokens=False)]


BAD: dict[str, tuple[Any, str]] = {
    "empty continuation": (
        lambda lm: lm.loglikelihood(requests("", [("a", "")])),
        "the continuation '' has no tokens of its own",
    ),
    "long continuation": (
        lambda lm: lm.loglikelihood(requests("", [("a", " import" * 40)])),
        "at most max_length, 16, can be scored",
    ),
    "no room": (
        lambda lm: lm.generate_until(requests("", [("a", {"max_gen_toks": 16})])),
        "max_gen_toks must be less than max_length, 16, got 16",
    ),
    "unknown argument": (
        lambda lm: lm.generate_until(requests("", [("a", {"untill": ["x"]})])),
        "unknown generation argument 'untill'; did you mean 'until'?",
    ),
    "beams": (lambda lm: lm.generate_until(requests("", [("a", {"num_beams": 4})])), "num_beams must be 1, got 4"),
    "temperature": (
        lambda lm: lm.generate_until(requests("", [("a", {"temperature": "hot"})])),
        "temperature must be a number, got 'hot'",
    ),
    "do_sample": (
        lambda lm: lm.generate_until(requests("", [("a", {"do_sample": "no"})])),
        "do_sample must be True or False, got 'no'",
    ),
    "top_p": (
        lambda lm: lm.generate_until(requests("", [("a", {"do_sample": True, "top_p": 1.5})])),
        "top_p must be in",
    ),
    "until": (lambda lm: lm.generate_until(requests("", [("a", {"until": 3})])), "until must be a string or a list"),
    "template": (lambda lm: lm.chat_template("other"), "chat_template must be one of default, got 'other'"),
}


@pytest.mark.parametrize(("use", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused_by_name(generator: Generator, use: Any, message: str):
    with pytest.raises(DSMoEError, match=message.replace("?", r"\?")):
        use(DSMoELM(generator, max_length=WINDOW))


ARGS: dict[str, tuple[dict[str, Any], SamplingParams, bool]] = {
    "default": ({}, SamplingParams(max_new_tokens=256), False),
    "greedy whatever the temperature": (
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3},
        SamplingParams(max_new_tokens=3),
        False,
    ),
    "a temperature samples": (
        {"temperature": 0.7, "top_k": 5, "max_gen_toks": 3},
        SamplingParams(max_new_tokens=3, temperature=0.7, top_k=5),
        True,
    ),
    "do_sample alone": ({"do_sample": True}, SamplingParams(max_new_tokens=256, temperature=1.0), True),
    "one stop string": ({"until": "\n", "num_beams": 1}, SamplingParams(max_new_tokens=256, stop=["\n"]), False),
    "penalties apply to greedy decoding": (
        {"do_sample": False, "repetition_penalty": 1.2, "presence_penalty": 1, "min_p": 0.5},
        SamplingParams(max_new_tokens=256, repetition_penalty=1.2, presence_penalty=1),
        False,
    ),
    "do_sample as a number": ({"do_sample": 0, "temperature": 1}, SamplingParams(max_new_tokens=256), False),
    "the first alias wins": ({"max_tokens": 5, "max_gen_toks": 4}, SamplingParams(max_new_tokens=4), False),
}


@pytest.mark.parametrize(("given", "params", "sampled"), ARGS.values(), ids=ARGS)
def test_generation_arguments_mean_what_they_do_in_the_harness(
    given: dict[str, Any], params: SamplingParams, sampled: bool
):
    assert generation_args(given, max_gen_toks=256) == (params, sampled)


def test_chats_are_rendered_by_the_template(lm: DSMoELM):
    chat = [{"role": "user", "content": "2 + 2?"}]

    assert lm.apply_chat_template(chat).endswith("User: 2 + 2?\n\nAssistant:")
    assert lm.chat_template(True) == lm.tokenizer.chat_templates["default"]
    assert lm.chat_template(False) is None


def test_a_chat_continues_its_last_message(lm: DSMoELM):
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "The answer is "}]

    text = lm.apply_chat_template(chat, add_generation_prompt=False)

    assert text.endswith("Assistant: The answer is ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "many"}, "batch_size must be a positive int or 'auto', got 'many'"),
        ({"max_gen_toks": 0}, r"max_gen_toks must be in \[1, "),
        ({"device": "cuda:0"}, "device must be None, got 'cuda:0'"),
        ({"max_length": 1}, "max_length must be in"),
        ({"quantize": "int8"}, "quantize needs the path of a model"),
    ],
)
def test_bad_options_are_refused_by_name(generator: Generator, options: dict[str, Any], message: str):
    with pytest.raises(DSMoEError, match=message):
        DSMoELM(generator, **options)


def test_a_model_without_tokenizer_is_refused():
    from tests.helpers.small import small_model

    with pytest.raises(DSMoEError, match="evaluation needs a tokenizer"):
        DSMoELM(Generator(small_model()))


def test_the_registry_finds_it_beside_the_models_of_the_harness():
    assert get_model("dsmoe_jax") is DSMoELM
    assert "hf" in model_registry.keys()  # noqa: SIM118 — no dict


def test_the_harness_creates_it_from_a_string(generator: Generator, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}
    monkeypatch.setattr(Generator, "from_pretrained", lambda path, **options: seen.update(options) or generator)

    DSMoELM.create_from_arg_string("pretrained=model,quantize=int8", {"batch_size": "auto", "device": None})

    assert seen == {"quantize": "int8", "max_batch_size": None}
