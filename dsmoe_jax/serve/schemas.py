"""Bodies of requests: every field, its default and its bounds. Start at `CompletionRequest` and `ChatRequest`.

Fields that are not computed are refused by name (`Unsupported`), and so are unknown ones. Null is the default of every
optional field. `openapi.py` publishes these schemas.
"""

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from dsmoe_jax.generate.sampling_params import BOUNDS, MAX_STOP_STRINGS
from dsmoe_jax.serve.config import MAX_N

MAX_LOGPROBS: Final = int(BOUNDS["logprobs"].high)
Unsupported: TypeAlias = Annotated[None, Field(description="Not supported: must be null.")]
_TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 31)]
_TokenIds: TypeAlias = Annotated[list[_TokenId], Field(min_length=1, fail_fast=True)]
_Text: TypeAlias = Annotated[str, Field(min_length=1)]
_Count: TypeAlias = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def _bounded(name: str, text: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Return the optional number `name` of `SamplingParams` within its bounds."""
    bound = BOUNDS[name]
    return Field(None, ge=bound.low if low is None else low, le=bound.high if high is None else high, description=text)


class Body(BaseModel):
    """A JSON object without unknown fields, and without conversions of types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = Field(None, description="End with a chunk that has the usage and no choices.")
    include_obfuscation: Literal[False] | None = None


class SamplingRequest(Body):
    """What both kinds of completions have in common; None selects the default of the model."""

    model: str | None = Field(None, description="Name of the model; default: the one that is served.")
    temperature: float | None = _bounded("temperature", "0: greedy. Default: that of generation_config.json, or 1.")
    top_p: float | None = _bounded("top_p", "Default: that of generation_config.json, or 1.")
    presence_penalty: float | None = _bounded("presence_penalty", "Default: 0.")
    frequency_penalty: float | None = _bounded("frequency_penalty", "Default: 0.")
    logit_bias: dict[_TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=300)
    seed: int | None = _bounded("seed", "-1, the default: a random one.", low=-1)
    n: int | None = _bounded("n", "Outputs per prompt. Default: 1.", high=MAX_N)
    stop: _Text | Annotated[list[_Text], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    stream: bool | None = Field(None, description="Send the output as server-sent events. Default: false.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted for compatibility; without effect.")
    # As in vLLM.
    top_k: int | None = _bounded("top_k", "0 or -1: disabled. Default: that of generation_config.json.", low=-1)
    min_p: float | None = _bounded("min_p", "Default: that of generation_config.json, or 0.")
    repetition_penalty: float | None = _bounded("repetition_penalty", "Default: that of generation_config.json, or 1.")
    stop_token_ids: list[_TokenId] | None = Field(None, max_length=MAX_STOP_STRINGS)
    ignore_eos: bool | None = Field(None, description="Continue past EOS and the stop strings of the model.")
    return_token_ids: bool | None = Field(None, description="Add `token_ids` of prompt and output to the choices.")
    # Of this server alone.
    routing: bool | None = Field(None, description="Add the experts of each output token but the last to the choices.")


class CompletionRequest(SamplingRequest):
    """Body of /v1/completions."""

    prompt: (
        _Text
        | _TokenIds
        | Annotated[list[_Text], Field(min_length=1, fail_fast=True)]
        | Annotated[list[_TokenIds], Field(min_length=1)]
    ) = Field(description="A text, token ids, or a list of either.")
    max_tokens: int | None = _bounded(
        "max_tokens", "Default: 16, or the rest of the context. 0 with `echo`: score the prompt alone.", low=0
    )
    echo: bool | None = Field(None, description="Start the output with the prompt.")
    logprobs: _Count | None = Field(None, description="Most likely tokens to return at each position.")
    add_special_tokens: bool | None = Field(None, description="Start a prompt of text with BOS. Default: true.")
    suffix: Unsupported = None
    best_of: Literal[1] | None = None


class ContentPart(BaseModel):
    """A part of a message; `prompts.py` refuses all but text."""

    model_config = ConfigDict(extra="allow", strict=True)
    type: str
    text: str | None = None


class Message(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: Unsupported = None
    refusal: Unsupported = None
    audio: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None
    function_call: Unsupported = None


class TextFormat(Body):
    """The only format of a response."""

    type: Literal["text"]


class ChatRequest(SamplingRequest):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = _bounded("max_tokens", "Default: the rest of the context.")
    max_tokens: int | None = _bounded("max_tokens", "The same, deprecated in the OpenAI API.")
    logprobs: bool | None = None
    top_logprobs: _Count | None = Field(None, description="Most likely tokens to return at each position.")
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    audio: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None
    metadata: Unsupported = None
    parallel_tool_calls: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    service_tier: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


class TokenizeRequest(Body):
    """Body of /tokenize, as in vLLM: a text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = Field(None, description="Start a text with BOS. Default: true.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Body of /detokenize, as in vLLM."""

    model: str | None = None
    tokens: Annotated[list[_TokenId], Field(fail_fast=True)]
