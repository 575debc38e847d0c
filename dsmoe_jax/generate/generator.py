"""`Generator`: prompts in, completions out. The work is done by an `Engine`, one for each call or stream.

Read `Generator.__call__`, then `engine.py`.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.manifest import is_native
from dsmoe_jax.checkpoint.native import DTYPES, as_dtype, load
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert import attach_adapter, load_hf, load_hf_quantized
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.generate.answer import Answer, Prefix, TokenLogprob
from dsmoe_jax.generate.engine import Engine, Stats
from dsmoe_jax.generate.memory_plan import MemoryPlan, device_bytes, weight_dtypes
from dsmoe_jax.generate.sampling_params import SamplingParams
from dsmoe_jax.generate.scoring import Perplexity, Score, perplexity, score
from dsmoe_jax.model import DeepSeekMoE, assemble, check_token_ids, split
from dsmoe_jax.quantize import load_quantized, quantize_embedding
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text.generation_config import (
    eos_token_ids,
    merge_stop_conditions,
    read_generation_config,
    with_default_eos,
)
from dsmoe_jax.text.generation_config import stop_strings as stop_strings_of
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
Prompt = str | Sequence[int] | Sequence[Message]
Progress = Callable[[int], Any]  # told how many answers have ended since the last call

_SHORTEST_CONTEXT: Final = 4096
_CACHE_SHARE: Final = 0.45
_WORTH_SAYING: Final = 1e9  # bytes
_HALF: Final = (jnp.bfloat16, jnp.float16)
_log = logging.getLogger("dsmoe_jax")


class Completion(NamedTuple):
    """One answer."""

    text: str  # without the end-of-sequence token or stop string; empty if the generator has no tokenizer
    tokens: list[int]  # as generated, a closing end-of-sequence token included
    finish_reason: str  # "eos", "stop", "length", or "error"
    logprobs: list[TokenLogprob] | None = None  # of each token, if asked for
    error: str | None = None  # why there is no answer, where errors are returned


class Generator:
    """Generates from a model, with or without its tokenizer.

    An answer ends with one of `eos_token_id`, by default the config's and the tokenizer's, and before one of
    `stop_strings`, which are text that ends an answer as an EOS token does; both unless `ignore_eos`.

    The context is the length of the key-value cache, not `max_position_embeddings` (RoPE scaling runs past that):
    `context_length` tokens, prompt and answer together, by default what the model was trained for, stretched by
    linear or dynamic scaling, and at least 4096. The cache itself only ever takes what a call asks for.

    `max_batch_size` answers are generated at once (default 8 on CPU, 64 elsewhere); further ones wait. Prompts are
    read in pieces of `prefill_chunk` tokens (default 512 on CPU, 2048 elsewhere). `cache_dtype` is that of keys and
    values, by default the model's; "int8" halves or quarters the cache. `cache_bytes` bounds the cache (default on
    GPUs: 45 % of what the weights leave, as the cache is copied when it grows); a request that cannot fit is refused,
    others wait for room.
    """

    def __init__(
        self,
        model: DeepSeekMoE,
        tokenizer: Tokenizer | None = None,
        *,
        context_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        max_batch_size: int | None = None,
        prefill_chunk: int | None = None,
        cache_dtype: Any = None,
        cache_bytes: int | None = None,
    ):
        self.config, self.tokenizer = model.config, tokenizer
        self._graph, params = split(model)
        self._params = for_generation(params)
        scaling = self.config.rope_scaling
        trained = int(self.config.max_position_embeddings * (scaling.factor if scaling else 1))
        defaults = _defaults()
        self.context_length = _at_least(2, "context_length", context_length, max(trained, _SHORTEST_CONTEXT))
        self.max_batch_size = _at_least(1, "max_batch_size", max_batch_size, defaults.max_batch_size)
        self.prefill_chunk = _at_least(16, "prefill_chunk", prefill_chunk, defaults.prefill_chunk)
        self.cache_dtype = self._params["norm.weight"].dtype if cache_dtype is None else _cache_dtype(cache_dtype)
        self.cache_bytes = _room_for_cache() if cache_bytes is None else _at_least(1, "cache_bytes", cache_bytes, 1)
        if eos_token_id is None:
            eos_token_id = _eos_token_ids(with_default_eos({}, self.config), tokenizer, self.config.vocab_size)
        self.eos_token_ids = frozenset(eos_token_ids({"eos_token_id": eos_token_id}))
        for token in self.eos_token_ids:
            if not 0 <= token < self.config.vocab_size:
                raise DSMoEError(f"eos_token_id {token} is outside the vocabulary of {self.config.vocab_size}")
        self.stop_strings = SamplingParams(stop=stop_strings).stop
        self.stats = Stats()  # of the last call or stream
        self._requests = 0  # so far: the seed of those that name none

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = None,
        mesh: Mesh | MeshConfig | None = None,
        adapter: str | Path | None = None,
        quantize: str | None = None,
        split_special_tokens: bool | None = None,
        **options: Any,
    ) -> "Generator":
        """A generator from a native checkpoint or a Hugging Face folder, with the tokenizer that lies in it, if any.

        Completions end as the generation config (`generation_config.json`, or else the config) and the tokenizer say.

        `adapter` is a folder with a LoRA adapter as the peft library stores it; its own generation config adds EOS ids
        and stop strings. `quantize` ("int8", "int4" or "nf4") quantizes the weights as they are read, the embedding in
        int8; norms, routers and the head stay. `split_special_tokens` is that of `Tokenizer.from_pretrained`: no text
        of a prompt becomes a special token. `options` are those of `Generator`.
        """
        path = user_path(path, "model")
        _check_memory(path, dtype, quantize, mesh, options)
        if quantize is None:
            model = (load if is_native(path) else load_hf)(path, dtype=dtype, mesh=mesh)
        else:
            read = load_quantized if is_native(path) else load_hf_quantized
            config, params = read(path, quantize, dtype=dtype, mesh=mesh)
            model = assemble(config, quantize_embedding(params))
        if adapter is not None:
            model = attach_adapter(model, adapter)
        tokenizer = None
        if tokenizer_files(path):
            # Loading the model has verified the files.
            tokenizer = Tokenizer.from_pretrained(path, split_special_tokens=split_special_tokens, verify=False)
        fields = with_default_eos(read_generation_config(path), model.config)
        if adapter is not None:
            fields = merge_stop_conditions(fields, read_generation_config(adapter))
        if options.get("eos_token_id") is None:
            options["eos_token_id"] = _eos_token_ids(fields, tokenizer, model.config.vocab_size)
        options.setdefault("stop_strings", stop_strings_of(fields))
        return cls(model, tokenizer, **options)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        errors: str = "raise",
        progress: Progress = lambda ended: None,
        **keywords: Any,
    ) -> list[Completion]:
        """Answer all prompts, in order: one completion a prompt, or `n` one after the other.

        A prompt is a text, a list of token ids, or a chat (a list of messages, the user's and the assistant's in
        turn). `params` are for all prompts, or one for each; or else `keywords` are those of `SamplingParams`.

        Raises `ValueError` before anything is generated: for an empty prompt, ids outside the vocabulary, a parameter
        out of range, and a prompt that with `max_new_tokens` is longer than the context. With `errors="return"` such
        a prompt gets a completion that says so, and the others are answered.
        """
        if isinstance(prompts, str | bytes) or not len(prompts):
            raise DSMoEError("prompts must be a non-empty list, one entry per completion")
        if errors not in ("raise", "return"):
            raise DSMoEError(f"errors must be 'raise' or 'return', not {errors!r}")
        engine = self.engine()
        asked = self._asked(params, keywords, len(prompts))
        queued: list[list[Answer] | str] = []
        for prompt, one in zip(prompts, asked, strict=True):
            try:
                queued.append(self._submit(engine, prompt, one))
            except ValueError as error:
                if errors == "raise":
                    raise
                queued.append(str(error))
        answers = [answer for one in queued if not isinstance(one, str) for answer in one]
        ended = 0
        while engine.busy:
            engine.step()
            now = sum(answer.done for answer in answers)
            progress(now - ended)
            ended = now
        failed = lambda reason: [Completion("", [], "error", None, reason)]  # noqa: E731
        return [
            completion
            for one in queued
            for completion in (failed(one) if isinstance(one, str) else map(self._completion, one))
        ]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **keywords: Any) -> Iterator[str]:
        """The answer to one prompt, text by text as it comes; close the iterator to stop early.

        No piece ends within a character, and none holds a part of a stop string. Raises `ValueError` as a call does,
        at once, and if there is no tokenizer or `n` is not 1.
        """
        return self.pieces(self.start(prompt, params, **keywords))

    # --- what `Chat` and others build on ---

    def engine(self) -> Engine:
        """An engine of this generator, without requests; `stats` are its own from now on."""
        engine = Engine(
            self._graph,
            self._params,
            self.config,
            context_length=self.context_length,
            tokenizer=self.tokenizer,
            eos_token_ids=self.eos_token_ids,
            max_batch_size=self.max_batch_size,
            prefill_chunk=self.prefill_chunk,
            cache_dtype=self.cache_dtype,
            most_cache_bytes=self.cache_bytes,
        )
        self.stats = engine.stats
        return engine

    def start(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prefix: Prefix | None = None,
        keep: bool = False,
        **keywords: Any,
    ) -> "Stream":
        """One answer in the making, with its engine; see `Engine.submit` for `prefix` and `keep`."""
        (asked,) = self._asked(params, keywords, 1)
        if asked.n != 1:
            raise DSMoEError(f"a stream has one answer, n must be 1, not {asked.n}")
        engine = self.engine()
        (answer,) = self._submit(engine, prompt, asked, text=True, prefix=prefix, keep=keep)
        return Stream(engine, answer)

    @staticmethod
    def pieces(stream: "Stream") -> Iterator[str]:
        """The text of the answer as it comes."""
        engine, answer = stream
        try:
            while engine.busy and not answer.done:
                engine.step()
                if piece := answer.new_text():
                    yield piece
        finally:
            engine.cancel(answer)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt; a text gets its begin-of-sequence token, a chat its template.

        Raises `ValueError` for an empty prompt, one that needs a tokenizer where there is none, ids outside the
        vocabulary, and a chat whose roles do not alternate.
        """
        if not len(prompt):
            raise DSMoEError("a prompt is empty")
        if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
            if self.tokenizer is None:
                raise DSMoEError("a prompt of text needs a tokenizer, and this generator has none: give token ids")
            if isinstance(prompt, str):
                ids = self.tokenizer.encode(prompt)
            else:
                ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)  # type: ignore[arg-type]
                _check_turns(prompt)  # type: ignore[arg-type]
            if not ids:
                raise DSMoEError("a prompt has no tokens")
            if (highest := max(ids)) >= self.config.vocab_size:  # a tokenizer of another model
                raise DSMoEError(f"token id {highest} is outside the vocabulary of {self.config.vocab_size}")
            return ids
        return check_token_ids(np.asarray(prompt)[None], self.config.vocab_size)[0].tolist()

    # --- scoring ---

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str | Sequence[int]], **options: Any
    ) -> list[Score]:
        """How likely each continuation is after its prompt; `options` are those of `scoring.score`.

        A continuation of text is tokenized together with its prompt, as lm-evaluation-harness does: a blank between
        the two belongs to the continuation, and an empty or blank prompt stands for the BOS token.

        Raises `ValueError` as `scoring.score` and `encode` do.
        """
        if len(prompts) != len(continuations):
            raise DSMoEError(f"there are {len(prompts)} prompts and {len(continuations)} continuations")
        pairs = [self._pair(prompt, rest) for prompt, rest in zip(prompts, continuations, strict=True)]
        options = {"context_length": self.context_length} | options
        return score(self._graph, self._params, self.config, pairs, **options)

    def perplexity(self, text: str | Sequence[int], **options: Any) -> Perplexity:
        """How well the model predicts a text (or token ids), in rolling windows; see `scoring.perplexity`."""
        prefix = self.prefix_token_id
        begun = not isinstance(text, str) and len(text) > 0 and text[0] == prefix
        options = {"context_length": self.context_length, "prefix": None if begun else prefix} | options
        if isinstance(text, str):
            if self.tokenizer is None:
                raise DSMoEError("a text needs a tokenizer, and this generator has none: give token ids")
            options = {"text_bytes": len(text.encode())} | options
            text = self.tokenizer.encode(text, add_special_tokens=False)
        return perplexity(self._graph, self._params, self.config, text, **options)

    @property
    def prefix_token_id(self) -> int | None:
        """What the first token of a text is predicted from: BOS, or EOS where there is no BOS, or None."""
        known = [self.tokenizer, self.config] if self.tokenizer else [self.config]
        ids = [*(one.bos_token_id for one in known), *(one.eos_token_id for one in known), *sorted(self.eos_token_ids)]
        return next((token for token in ids if type(token) is int and 0 <= token < self.config.vocab_size), None)

    def _pair(self, prompt: Prompt, continuation: str | Sequence[int]) -> tuple[list[int], list[int]]:
        if not isinstance(continuation, str):
            return (self.encode(prompt) if len(prompt) else self._empty_context()), list(continuation)
        if self.tokenizer is None:
            raise DSMoEError("a continuation of text needs a tokenizer, and this generator has none: give token ids")
        if isinstance(prompt, str) and (context := prompt.rstrip()):
            before = self.encode(context)
            return before, self.encode(prompt + continuation)[len(before) :]
        if len(prompt) and not isinstance(prompt, str):
            return self.encode(prompt), self.tokenizer.encode(continuation, add_special_tokens=False)
        blank = prompt if isinstance(prompt, str) else ""
        before, rest = self._empty_context(), self.tokenizer.encode(blank + continuation, add_special_tokens=False)
        return before, rest[1:] if len(rest) > 1 and rest[:1] == before else rest  # a text that names BOS itself

    def _empty_context(self) -> list[int]:
        if (prefix := self.prefix_token_id) is None:
            raise DSMoEError("an empty prompt needs a BOS or EOS token to begin with, and this model has neither")
        return [prefix]

    # --- small things ---

    def _asked(
        self, params: SamplingParams | Sequence[SamplingParams] | None, keywords: Mapping[str, Any], prompts: int
    ) -> list[SamplingParams]:
        """The parameters of each prompt."""
        if params is not None and keywords:
            raise DSMoEError(f"give params or keywords, not both: {', '.join(keywords)}")
        if params is None:
            params = SamplingParams.of(**keywords)
        each = [params] * prompts if isinstance(params, SamplingParams) else list(params)
        if len(each) != prompts:
            raise DSMoEError(f"there are {prompts} prompts and {len(each)} params")
        return each

    def _submit(self, engine: Engine, prompt: Prompt, asked: SamplingParams, **options: Any) -> list[Answer]:
        ids = self.encode(prompt)
        asked.check_vocabulary(self.config.vocab_size)
        if self.stop_strings and self.tokenizer is not None and not asked.ignore_eos:
            asked = dataclasses.replace(asked, stop=tuple(dict.fromkeys((*asked.stop, *self.stop_strings))))
        self._requests += 1
        return engine.submit(ids, asked, seed=self._requests - 1, **options)

    def _completion(self, answer: Answer) -> Completion:
        tokens, asked = answer.tokens, answer.request.asked
        shown = tokens[:-1] if answer.finish_reason in ("eos", "stop") else tokens
        text = answer.text if asked.stop else self.tokenizer.decode(shown) if self.tokenizer else ""
        logprobs = None if asked.logprobs is None else answer.logprobs
        return Completion(text, tokens, answer.finish_reason or "length", logprobs)


class Stream(NamedTuple):
    """One answer in the making and the engine that makes it."""

    engine: Engine
    answer: Answer


def for_generation(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as they are generated from: on CPU, half-precision ones in fp32 but for the routed experts.

    XLA has no fast bf16 on CPUs and would widen them for every token anew. The experts are most of the weights, and
    their kernel reads them as they are stored.
    """
    if jax.default_backend() != "cpu":
        return params
    outside = {name: value for name, value in params.items() if ".experts." not in name}
    narrow = [leaf for leaf in jax.tree.leaves(outside) if leaf.dtype in _HALF]
    if narrow:
        _log.info(
            "%d weights outside the routed experts (%.1f MB) are widened from %s to float32: CPUs are faster so",
            len(narrow),
            sum(leaf.nbytes for leaf in narrow) / 1e6,
            narrow[0].dtype,
        )
    widen = lambda leaf: leaf.astype(jnp.float32) if leaf.dtype in _HALF else leaf  # noqa: E731
    return params | jax.tree.map(widen, outside)


def _eos_token_ids(fields: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """The EOS ids of a generation config and the tokenizer's, without those that no answer can reach."""
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    named = list(dict.fromkeys((*eos_token_ids(fields), *own)))
    ids = [token for token in named if 0 <= token < vocab_size]
    ends = f"answers end with {' or '.join(map(str, ids))}" if ids else "no EOS token ends an answer"
    for token in named:
        if token not in ids:
            _log.warning("eos_token_id %d is outside the vocabulary of %d: %s", token, vocab_size, ends)
    return ids


def _check_turns(messages: Sequence[Message]) -> None:
    """`ValueError` unless user and assistant speak in turn, after at most one system message, the user last."""
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    for index, role in enumerate(spoken):
        if role != ("user", "assistant")[index % 2]:
            place = index + len(roles) - len(spoken)
            raise DSMoEError(f"message {place} of the chat is the {role}'s, and it is the other's turn")
    if not spoken or spoken[-1] != "user":
        raise DSMoEError("the last message of a chat must be the user's")


class _Defaults(NamedTuple):
    max_batch_size: int
    prefill_chunk: int


def _defaults() -> _Defaults:
    return _Defaults(8, 512) if jax.default_backend() == "cpu" else _Defaults(64, 2048)


def _check_memory(path: Path, dtype: Any, quantize: str | None, mesh: Any, options: Mapping[str, Any]) -> None:
    """Say what an answer will take before it is taken, from 1 GB on.

    Raises `ValueError` where the weights alone are more than there is.
    """
    config = ModelConfig.from_file(path)
    wanted = as_dtype(dtype)
    slots = options.get("context_length") or _SHORTEST_CONTEXT
    plan = MemoryPlan.of(
        config,
        rows=1,
        slots=slots,
        dtype=weight_dtypes(path, config) if wanted is None else wanted,
        cache_dtype=None if options.get("cache_dtype") is None else _cache_dtype(options["cache_dtype"]),
        quantize=quantize,
        prefill_chunk=options.get("prefill_chunk") or _defaults().prefill_chunk,
        mesh=mesh,
        widened=jax.default_backend() == "cpu",
    )
    if plan.total >= _WORTH_SAYING:
        _log.info("memory for one answer of %s tokens: %s", slots, plan)
    if (free := device_bytes()) is not None and plan.weights > free:
        raise DSMoEError(f"{path}: the weights take {plan.weights / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free")


def _room_for_cache() -> int | None:
    free = device_bytes()
    return None if free is None else int(free * _CACHE_SHARE)


def _cache_dtype(value: Any) -> np.dtype:
    """The dtype of that name, or of that type."""
    known = {name: np.dtype(dtype) for name, dtype in (*DTYPES.items(), ("int8", jnp.int8))}
    for name, dtype in known.items():
        if value == name or (not isinstance(value, str) and value in (dtype, dtype.type)):
            return dtype
    raise DSMoEError(f"cache_dtype must be one of {', '.join(known)}, not {value!r}")


def _at_least(least: int, name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DSMoEError(f"{name} must be at least {least}, not {value!r}")
    return value
