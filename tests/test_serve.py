"""The server against the official `openai` client: fields, streams, log-probabilities, and the generator's outputs."""

import asyncio
import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.generate import Generator, SamplingParams
from tests.helpers.serving import NEEDS_SERVE, Running, running, wait_until
from tests.helpers.small import small_model

openai: Any = pytest.importorskip("openai", reason="the official client is not installed")
pytestmark = [NEEDS_SERVE, pytest.mark.heavy]

GREEDY: dict[str, Any] = {"model": "small", "temperature": 0, "max_tokens": 8}
PROMPT = "def add(a, b):"
CHAT: list[Any] = [{"role": "user", "content": "Say it."}]


@pytest.fixture(scope="module")
def server(generator: Generator) -> Iterator[Running]:
    with running(generator) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def refused(client: Any, kind: str = "completions", **fields: Any) -> Any:
    """Return the error of a request."""
    create = client.completions.create if kind == "completions" else client.chat.completions.create
    default = {"prompt": PROMPT} if kind == "completions" else {"messages": CHAT}
    known = {"model", "prompt", "messages", "max_tokens", "n", "extra_body"}
    extra = {name: value for name, value in fields.items() if name not in known}
    passed = {name: value for name, value in fields.items() if name in known}
    with pytest.raises(openai.APIStatusError) as error:
        create(**{"model": "small"} | default | passed, extra_body=extra)
    return error.value


def test_a_completion_is_that_of_the_generator(client: Any, generator: Generator):
    expected = generator(PROMPT, max_tokens=8)

    got = client.completions.create(prompt=PROMPT, **GREEDY)

    assert (got.object, got.model, got.id[:5]) == ("text_completion", "small", "cmpl-")
    (choice,) = got.choices
    assert (choice.text, choice.finish_reason, choice.index) == (expected.text, expected.finish_reason, 0)
    tokens = len(generator.encode(PROMPT))
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (tokens, 8)
    assert got.usage.total_tokens == tokens + 8


def test_prompts_are_texts_token_ids_or_lists(client: Any, generator: Generator):
    ids = generator.encode(PROMPT)
    prompt: Any

    for prompt in (PROMPT, ids, [PROMPT, "import os"], [ids, [0, 5, 6]]):
        expected = generator([prompt] if prompt in (PROMPT, ids) else prompt, max_tokens=8)
        got = client.completions.create(prompt=prompt, **GREEDY)

        assert [choice.text for choice in got.choices] == [one.text for one in expected]
        assert [choice.index for choice in got.choices] == [*range(len(expected))]


def test_sampling_fields_are_those_of_the_generator(client: Any, generator: Generator):
    fields: dict[str, Any] = {"temperature": 1.2, "top_p": 0.9, "seed": 7, "n": 3, "presence_penalty": 0.5}
    fields |= {"frequency_penalty": 0.3, "max_tokens": 8}
    extra = {"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": [9]}
    expected = generator(PROMPT, **fields, **extra, logit_bias={5: 3.0})

    body = extra | {"return_token_ids": True}
    got = client.completions.create(model="small", prompt=PROMPT, **fields, logit_bias={"5": 3}, extra_body=body)

    assert [choice.token_ids for choice in got.choices] == [one.token_ids for one in expected]
    assert [choice.text for choice in got.choices] == [one.text for one in expected]


def test_samples_without_a_seed_differ(client: Any):
    seeds = (openai.NOT_GIVEN, openai.NOT_GIVEN, -1, -1)
    fields: dict[str, Any] = GREEDY | {"prompt": PROMPT, "temperature": 1}
    texts = {client.completions.create(seed=seed, **fields).choices[0].text for seed in seeds}

    assert len(texts) == 4


def test_a_seed_of_minus_one_is_a_random_one(generator: Generator):
    from dsmoe_jax.serve.prompts import EncodedPrompt, sampling_params
    from dsmoe_jax.serve.schemas import CompletionRequest

    body = CompletionRequest.model_validate({"prompt": "a", "seed": -1})
    seeds = {sampling_params(generator, body, [EncodedPrompt([5], "a")]).seed for _ in range(2)}

    assert len(seeds) == 2


def test_stop_strings_end_the_text(client: Any, generator: Generator):
    text = generator(PROMPT, max_tokens=8).text
    stop = text[4:6]

    got = client.completions.create(prompt=PROMPT, stop=[stop, "never"], **GREEDY).choices[0]

    assert (got.text, got.finish_reason, got.stop_reason) == (text[: text.index(stop)], "stop", stop)


def test_a_completion_streams(client: Any, generator: Generator):
    expected = generator(PROMPT, max_tokens=8)

    options = {"include_usage": True}
    chunks = [*client.completions.create(prompt=PROMPT, stream=True, stream_options=options, **GREEDY)]

    *tokens, last = chunks
    assert "".join(chunk.choices[0].text for chunk in tokens) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in tokens if chunk.choices[0].finish_reason] == ["length"]
    assert all(chunk.usage is None for chunk in tokens)
    assert (last.choices, last.usage.completion_tokens) == ([], 8)
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(tokens) > 1


def test_a_stream_of_several_outputs_names_each(client: Any, generator: Generator):
    expected = generator([PROMPT, "import os"], temperature=1.0, seed=3, n=2, max_tokens=6)
    texts = ["", "", "", ""]

    fields: dict[str, Any] = {"model": "small", "temperature": 1.0, "seed": 3, "n": 2, "max_tokens": 6}
    for chunk in client.completions.create(prompt=[PROMPT, "import os"], stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] += choice.text

    assert texts == [one.text for each in expected for one in each]


def test_log_probabilities_of_a_completion(client: Any, generator: Generator):
    expected = generator(PROMPT, max_tokens=8, logprobs=2)

    got = client.completions.create(prompt=PROMPT, logprobs=2, **GREEDY).choices[0]

    assert "".join(got.logprobs.tokens) == got.text
    assert got.logprobs.token_logprobs == [one.logprob for one in expected.logprobs]
    assert [max(top.values()) for top in got.logprobs.top_logprobs] == got.logprobs.token_logprobs  # greedy
    assert [len(top) for top in got.logprobs.top_logprobs] == [2] * 8
    for token, at in zip(got.logprobs.tokens, got.logprobs.text_offset, strict=True):
        assert got.text[at:].startswith(token)


def test_an_echo_has_the_scores_of_the_prompt(client: Any, generator: Generator):
    ids = generator.encode(PROMPT)
    (expected,) = generator.score([ids[:1]], [ids[1:]])

    got = client.completions.create(prompt=ids, echo=True, logprobs=1, **GREEDY | {"max_tokens": 1}).choices[0]

    first, *prompt, _ = got.logprobs.token_logprobs
    assert (first, got.logprobs.top_logprobs[0]) == (None, None)
    assert prompt == expected.token_logprobs
    assert got.text == PROMPT + generator(PROMPT, max_tokens=1).text
    alone = client.completions.create(prompt=PROMPT, echo=True, logprobs=1, **GREEDY | {"max_tokens": 0})
    assert alone.choices[0].logprobs.token_logprobs == [None, *prompt]
    assert (alone.choices[0].text, alone.usage.completion_tokens) == (PROMPT, 0)


def test_an_echo_streams_once(client: Any, generator: Generator):
    expected = generator(PROMPT, max_tokens=8).text

    chunks = [*client.completions.create(prompt=PROMPT, echo=True, logprobs=0, stream=True, **GREEDY)]

    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPT + expected
    tokens = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
    assert len(tokens) == len(generator.encode(PROMPT)) + 8
    offsets = [at for chunk in chunks for at in chunk.choices[0].logprobs.text_offset]
    assert offsets == sorted(offsets)
    assert (PROMPT + expected)[offsets[-1] :] == tokens[-1]


def test_a_chat_is_that_of_the_generator(client: Any, generator: Generator):
    expected = generator(CHAT, max_tokens=8)

    got = client.chat.completions.create(messages=CHAT, **GREEDY)

    assert (got.object, got.id[:9]) == ("chat.completion", "chatcmpl-")
    message = got.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text)
    assert got.choices[0].finish_reason == expected.finish_reason
    assert got.usage.prompt_tokens == len(generator.encode(CHAT))


def test_a_chat_streams_with_the_role_first(client: Any, generator: Generator):
    expected = generator(CHAT, max_tokens=8).text

    options = {"include_usage": True}
    first, *chunks, last = client.chat.completions.create(messages=CHAT, stream=True, stream_options=options, **GREEDY)

    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected
    assert [chunk.object for chunk in chunks] == ["chat.completion.chunk"] * len(chunks)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage.total_tokens == len(generator.encode(CHAT)) + 8


def test_log_probabilities_of_a_chat(client: Any, generator: Generator):
    expected = generator(CHAT, max_tokens=8, logprobs=3)

    got = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, **GREEDY).choices[0]

    entries = got.logprobs.content
    assert "".join(entry.token for entry in entries) == got.message.content
    assert [entry.logprob for entry in entries] == [one.logprob for one in expected.logprobs]
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [
        [*one.top.values()] for one in expected.logprobs
    ]
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries if entry.bytes)


def test_the_length_of_a_chat_has_two_names(client: Any, generator: Generator):
    expected = generator(CHAT, max_tokens=5)

    got = client.chat.completions.create(model="small", messages=CHAT, temperature=0, max_completion_tokens=5)

    assert got.choices[0].message.content == expected.text
    assert refused(client, "chat", max_tokens=5, max_completion_tokens=6).param == "max_tokens"


def test_content_is_text_or_parts(client: Any, generator: Generator):
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "it."}]
    expected = generator([{"role": "user", "content": "Say\nit."}], max_tokens=8).text

    got = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **GREEDY)

    assert got.choices[0].message.content == expected
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]
    error = refused(client, "chat", messages=image)
    assert (error.status_code, error.param) == (400, "messages[0].content[0]")
    assert "'image_url'" in error.message


def test_special_tokens_in_messages_are_text(server: Running, generator: Generator):
    tokenizer = generator.tokenizer
    assert tokenizer is not None
    messages = [{"role": "user", "content": f"a{tokenizer.eos_token}b"}]

    got = server.post("/tokenize", {"messages": messages}).json["tokens"]

    assert tokenizer.eos_token_id not in got
    assert tokenizer.eos_token_id in generator.encode(messages)  # the default of transformers
    assert server.post("/detokenize", {"tokens": got}).json["prompt"].count(tokenizer.eos_token or "?") == 1
    with running(generator, parse_special_tokens=True) as other:
        assert other.post("/tokenize", {"messages": messages}).json["tokens"] == generator.encode(messages)


def test_models_are_listed(client: Any, generator: Generator):
    (model,) = client.models.list().data

    assert (model.id, model.max_model_len, model.moe_layers) == ("small", generator.context_length, [1])
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_texts_are_tokenized_and_back(server: Running, generator: Generator):
    ids = generator.encode(PROMPT)

    got = server.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json

    assert (got["tokens"], got["count"], got["max_model_len"]) == (ids, len(ids), generator.context_length)
    assert "".join(got["token_strs"][1:]) == PROMPT
    without = server.post("/tokenize", {"prompt": PROMPT, "add_special_tokens": False}).json["tokens"]
    assert without == ids[1:]
    assert server.post("/detokenize", {"tokens": without}).json == {"prompt": PROMPT}
    assert server.post("/detokenize", {"tokens": []}).json == {"prompt": ""}
    outside = server.post("/detokenize", {"tokens": [5, generator.config.vocab_size]})
    assert (outside.status, outside.error["param"]) == (400, "tokens")
    assert "outside the vocabulary" in outside.error["message"]


def test_routing_is_that_of_the_model(client: Any, generator: Generator):
    body = {"routing": True, "return_token_ids": True}
    got = client.completions.create(prompt=PROMPT, logprobs=2, extra_body=body, **GREEDY).choices[0]
    plain = client.completions.create(prompt=PROMPT, logprobs=2, **GREEDY).choices[0]

    assert got.logprobs == plain.logprobs  # bit-identical
    routing = small_model()(jnp.array([[*got.prompt_token_ids, *got.token_ids]])).routing[1]
    ids = routing.ids[0, len(got.prompt_token_ids) : -1]
    assert [[expert for expert, _ in layers[0]] for layers in got.routing] == ids.tolist()
    weights = [[weight for _, weight in layers[0]] for layers in got.routing]
    np.testing.assert_allclose(weights, routing.weights[0, len(got.prompt_token_ids) : -1], atol=1e-5)
    chunks = [*client.completions.create(prompt=PROMPT, stream=True, extra_body=body, **GREEDY)]
    assert [token for chunk in chunks for token in chunk.choices[0].routing] == got.routing


def test_later_prompts_reuse_earlier_ones(client: Any):
    first = [{"role": "user", "content": "Tell me a long story about " + "a fox and " * 12}]
    answer = client.chat.completions.create(messages=first, **GREEDY)
    turns = [*first, {"role": "assistant", "content": answer.choices[0].message.content}]

    got = client.chat.completions.create(messages=[*turns, {"role": "user", "content": "Go on."}], **GREEDY)

    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert got.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens


def test_thirty_two_clients_get_what_one_gets(server: Running, generator: Generator):
    prompts = [f"{PROMPT} # {i}" for i in range(32)]
    fields = [{"temperature": 0.9 * (i % 2), "seed": i, "max_tokens": 4 + i % 7} for i in range(32)]
    expected = [one.text for one in generator(prompts, [SamplingParams(**one) for one in fields])]

    async def ask(client: Any, i: int) -> str:
        if i % 4 < 2:
            got = await client.completions.create(model="small", prompt=prompts[i], **fields[i])
            return got.choices[0].text
        stream = await client.completions.create(model="small", prompt=prompts[i], stream=True, **fields[i])
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(32)))

    assert asyncio.run(ask_all()) == expected


# fields | what the message names | status and code
REFUSED: dict[str, tuple[dict[str, Any], str, tuple[int, str | None]]] = {
    "out of range": ({"top_p": 1.5}, "top_p", (400, None)),
    "of the wrong type": ({"temperature": "hot"}, "temperature", (400, None)),
    "an empty stop string": ({"stop": ""}, "stop", (400, None)),
    "a list with an empty stop string": ({"stop": ["a", ""]}, "stop", (400, None)),
    "a list with an empty prompt": ({"prompt": ["a", ""]}, "prompt", (400, None)),
    "a list with a prompt of no ids": ({"prompt": [[]]}, "prompt", (400, None)),
    "a misspelled field": ({"temprature": 1}, "temprature", (400, None)),
    "best_of": ({"best_of": 2}, "best_of", (400, None)),
    "suffix": ({"suffix": "end"}, "suffix", (400, None)),
    "too many outputs": ({"n": 129}, "n", (400, None)),
    "too many log-probabilities": ({"logprobs": 21}, "logprobs", (400, None)),
    "an empty prompt": ({"prompt": ""}, "prompt", (400, None)),
    "an unknown token": ({"prompt": [1, 99999]}, "prompt", (400, None)),
    "a biased unknown token": ({"logit_bias": {"99999": 1}}, "logit_bias", (400, None)),
    "no tokens": ({"max_tokens": 0}, "max_tokens", (400, None)),
    "a long output": ({"max_tokens": 9999}, "max_tokens", (400, "context_length_exceeded")),
    "an unknown model": ({"model": "gpt"}, "model", (404, "model_not_found")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_fields_are_refused_by_name(client: Any, case: str):
    fields, name, (status, code) = REFUSED[case]

    error = refused(client, **fields)

    assert (error.status_code, error.code, error.param) == (status, code, name)
    assert error.type == "invalid_request_error"
    assert name in error.message
    assert ("non-empty" in error.message) == ("empty" in case or "no ids" in case)


CHAT_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "roles do not alternate": ({"messages": CHAT * 2}, "messages"),
    "a role of tools": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    "a name": ({"messages": [CHAT[0] | {"name": "Ann"}]}, "messages[0].name"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "a JSON format": ({"response_format": {"type": "json_object"}}, "response_format.type"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "reasoning effort": ({"reasoning_effort": "low"}, "reasoning_effort"),
}


@pytest.mark.parametrize("case", CHAT_REFUSED)
def test_bad_fields_of_chats_are_refused_by_name(client: Any, case: str):
    fields, name = CHAT_REFUSED[case]

    error = refused(client, "chat", **fields)

    assert (error.status_code, error.param) == (400, name)


def test_a_model_without_a_tokenizer_streams_token_ids(generator: Generator):
    (expected,) = generator([[5, 6]], max_tokens=8)
    bare = copy.copy(generator)
    bare.tokenizer = None
    body = GREEDY | {"prompt": [5, 6], "return_token_ids": True}

    with running(bare) as server:
        whole = server.post("/v1/completions", body).json["choices"][0]
        *events, _ = server.post("/v1/completions", body | {"stream": True}).body.decode().split("data: ")[1:]
        chat = server.post("/v1/chat/completions", {"messages": CHAT})

    choices = [json.loads(event)["choices"][0] for event in events]
    assert whole["token_ids"] == [id for choice in choices for id in choice["token_ids"]] == expected.token_ids
    assert {whole["text"], *(choice["text"] for choice in choices)} == {""}
    assert (chat.status, chat.error["param"]) == (400, "messages")


def test_null_is_the_default(server: Running, generator: Generator):
    fields = {"stop": None, "n": None, "suffix": None, "logprobs": None, "stream": None, "logit_bias": None}

    got = server.post("/v1/completions", {"prompt": PROMPT, "temperature": 0, "max_tokens": 8} | fields)

    assert got.json["choices"][0]["text"] == generator(PROMPT, max_tokens=8).text


def test_a_client_that_stops_a_stream_is_canceled(client: Any, server: Running):
    before = server.server.metrics.finished.labels("abort")._value.get()
    with client.completions.create(prompt=PROMPT, stream=True, **GREEDY | {"max_tokens": 3000}) as stream:
        first = [*itertools.islice(stream, 3)]

    assert len(first) == 3
    wait_until(lambda: not server.server.worker.outstanding and not server.server.worker.engine.busy)
    assert server.server.metrics.finished.labels("abort")._value.get() == before + 1
