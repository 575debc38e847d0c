"""From bodies to token ids and sampling parameters: `completion_prompts`, `chat_prompt`, `sampling_params`."""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate import Generator, SamplingParams
from dsmoe_jax.generate.sampling_params import merge_fields
from dsmoe_jax.serve.api_error import ApiError, from_refusal, refusals
from dsmoe_jax.serve.schemas import ChatRequest, CompletionRequest, Message, SamplingRequest
from dsmoe_jax.serve.worker import random_seed

_COMPLETION_TOKENS: Final = 16  # the default of the OpenAI API
# Fields of both bodies that are fields of `SamplingParams`.
_FIELDS: Final = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "stop", "stop_token_ids", "ignore_eos", "n", "seed"),
)


class EncodedPrompt(NamedTuple):
    """Token ids of a prompt, and its text unless it came as token ids."""

    token_ids: list[int]
    text: str | None


def completion_prompts(generator: Generator, body: CompletionRequest) -> list[EncodedPrompt]:
    """Encode the prompts of a completion."""
    prompt: Any = body.prompt
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    return [_encode(generator, prompt, body.add_special_tokens is not False) for prompt in prompts]


def _encode(generator: Generator, prompt: str | list[int], add_special_tokens: bool) -> EncodedPrompt:
    text = prompt if isinstance(prompt, str) else None
    with refusals("prompt"):
        if text is not None and not add_special_tokens and generator.tokenizer is not None:
            prompt = generator.tokenizer.encode(text, add_special_tokens=False)
        return EncodedPrompt(generator.encode(prompt), text)


def chat_prompt(generator: Generator, messages: Sequence[Message], *, parse_special_tokens: bool) -> EncodedPrompt:
    """Encode a chat by the template of the tokenizer; special tokens in messages are text unless they are parsed."""
    split = None if parse_special_tokens else True
    if generator.tokenizer is None:
        raise ApiError(400, "a chat needs a tokenizer, and this model has none", param="messages")
    with refusals("messages"):
        return EncodedPrompt(generator.encode(chat_messages(messages), split_special_tokens=split), None)


def chat_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as templates read them: parts are joined by newlines, and a developer is the system."""
    return [
        {"role": "system" if one.role == "developer" else one.role, "content": _text(i, one)}
        for i, one in enumerate(messages)
    ]


def _text(index: int, message: Message) -> str:
    if isinstance(message.content, str):
        return message.content
    for i, part in enumerate(message.content):
        if part.type != "text" or part.text is None or part.model_extra:
            param = f"messages[{index}].content[{i}]"
            kind = (
                "must have a text" if part.type == "text" else f"has type {part.type!r:.80}; only 'text' is supported"
            )
            raise ApiError(400, f"{param} {kind}", param=param)
    return "\n".join(part.text or "" for part in message.content)


def sampling_params(generator: Generator, body: SamplingRequest, prompts: Sequence[EncodedPrompt]) -> SamplingParams:
    """Return the sampling parameters of a request.

    Defaults are those of `generation_config.json`, and a temperature of 1 as in the OpenAI API.
    """
    length = max(len(prompt.token_ids) for prompt in prompts)
    room = generator.context_length - length
    if isinstance(body, CompletionRequest):
        source, name, max_tokens, logprobs = "prompt", "max_tokens", body.max_tokens, body.logprobs
        default = _COMPLETION_TOKENS
    elif isinstance(body, ChatRequest):
        source, (name, max_tokens, logprobs) = "messages", _chat_length(body)
        default = generator.sampling_defaults.get("max_new_tokens", room)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
    else:
        raise AssertionError(type(body))
    if max_tokens == 0 and not (isinstance(body, CompletionRequest) and body.echo):
        raise ApiError(400, f"{name} must be at least 1 without echo, got 0", param=name)
    if (1 if max_tokens is None else max_tokens) > room:
        param = name if room > 0 else source
        what = f"and {name} {max_tokens} exceed" if room > 0 else "fills" if room == 0 else "exceeds"
        message = f"a prompt of {length} tokens {what} the context length of {generator.context_length} tokens"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    max_tokens = max_tokens or max(1, min(room, default))
    passed = {field: value for field in _FIELDS if (value := getattr(body, field)) is not None}
    if passed.get("seed") == -1:
        del passed["seed"]
    fields = {"temperature": 1.0} | generator.sampling_defaults | {"seed": random_seed()}
    fields = merge_fields(fields, passed | {"max_tokens": max_tokens, "logprobs": logprobs})
    try:
        params = SamplingParams(**fields)
        params.check_vocabulary(generator.config.vocab_size)
    except DSMoEError as error:
        raise from_refusal(error, (*_FIELDS, name)) from None
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream true", param="stream_options")
    if params.stop and generator.tokenizer is None:
        raise ApiError(400, "stop needs a tokenizer, and this model has none; use stop_token_ids", param="stop")
    return params


def _chat_length(body: ChatRequest) -> tuple[str, int | None, int | None]:
    """Return the field that sets the length of the output, its value, and the log-probabilities."""
    lengths = {name: getattr(body, name) for name in ("max_completion_tokens", "max_tokens")}
    passed = {name: value for name, value in lengths.items() if value is not None}
    if len({*passed.values()}) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens must be equal", param="max_tokens")
    name, value = next(iter(passed.items()), ("max_completion_tokens", None))
    return name, value, (body.top_logprobs or 0) if body.logprobs else None
