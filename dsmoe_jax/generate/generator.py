"""`Generator`: prompts in, completions out; each call or stream runs an `Engine`. Start at `Generator.__call__`."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import jax
from jax.sharding import Mesh

from dsmoe_jax.errors import DSMoEError, check_choice, suggest
from dsmoe_jax.generate import loading
from dsmoe_jax.generate.engine import Engine
from dsmoe_jax.generate.memory_plan import device_bytes
from dsmoe_jax.generate.prefix_cache import Prefix, PrefixCache
from dsmoe_jax.generate.prompts import Prompt, encode_pair, encode_prompt, is_one_prompt
from dsmoe_jax.generate.request import Completion, Output, Stats
from dsmoe_jax.generate.sampling_params import Params, SamplingParams, each_params, read_sampling_defaults
from dsmoe_jax.generate.scoring import Perplexity, Score, iter_scores, perplexity, score
from dsmoe_jax.loading import resolve
from dsmoe_jax.model import DeepSeekMoE, split
from dsmoe_jax.progress import Meter, silent
from dsmoe_jax.sharding import MeshConfig, concrete_mesh
from dsmoe_jax.text import generation_config as stops
from dsmoe_jax.text.tokenizer import Tokenizer

_CACHE_FRACTION: Final = 0.45  # of the free memory: the cache is copied when it grows


class Generator:
    """Generates completions and scores text with a model.

    The arguments of the constructor are attributes too, with defaults filled in.

    Attributes:
        config: Config of the model.
        eos_token_ids: Tokens that end an output.
        stats: Counters of the last call or stream.
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
        prefix_cache_bytes: int | None = None,
        sampling_defaults: Mapping[str, Any] = MappingProxyType({}),
    ):
        """Create a generator.

        Args:
            model: The model.
            tokenizer: Required for prompts of text, chats, stop strings and streams.
            context_length: Maximum tokens of prompt and output together. Default: `max_position_embeddings`, times the
                factor of RoPE scaling, at least 4096. The KV cache grows as needed.
            eos_token_id: Tokens that end an output. Default: those of the config and the tokenizer.
            stop_strings: Strings that end an output like EOS, unless `ignore_eos`.
            max_batch_size: Outputs generated at once; others are queued. Default 8 on CPU, 64 elsewhere.
            prefill_chunk: Tokens of a prompt per call of the model. Default 512 on CPU, 2048 elsewhere.
            cache_dtype: Dtype of keys and values: float32, bfloat16, float16 or int8. Default: that of the model.
            cache_bytes: Bound on the KV cache; requests that exceed it are rejected. Default: on GPUs 45 % of the
                memory that is free after loading, on CPU none.
            prefix_cache_bytes: Bound on keys and values retained for prompts with the same beginning; 0: none. Default:
                1 GB on CPU, 5 % of the free memory of a GPU, at least one sequence of `context_length`.
            sampling_defaults: Fields of `SamplingParams` for `Chat`; calls and streams do not use them.

        Raises:
            DSMoEError: A value is out of range.
        """
        if not isinstance(model, DeepSeekMoE):
            raise DSMoEError(f"model must be a DeepSeekMoE, got {model!r:.80}; Generator.from_pretrained loads one")
        if not isinstance(tokenizer, Tokenizer | None):
            got = f"got {tokenizer!r:.80}; Tokenizer.from_pretrained loads one"
            raise DSMoEError(f"tokenizer must be a Tokenizer or None, {got}")
        self.config, self.tokenizer = model.config, tokenizer
        self._graph, params = split(model)
        self._params = loading.upcast_for_cpu(params)
        on_cpu = jax.default_backend() == "cpu"
        trained = max(self.config.context_length, loading.MIN_CONTEXT_LENGTH)
        self.context_length = loading.at_least(2, "context_length", context_length, trained)
        self.max_batch_size = loading.at_least(1, "max_batch_size", max_batch_size, 8 if on_cpu else 64)
        self.prefill_chunk = loading.at_least(16, "prefill_chunk", prefill_chunk, loading.default_prefill_chunk())
        dtype = self._params["norm.weight"].dtype
        self.cache_dtype = dtype if cache_dtype is None else loading.as_cache_dtype(cache_dtype)
        free = device_bytes()
        default_bytes = None if free is None else int(free * _CACHE_FRACTION)
        self.cache_bytes = loading.at_least(1, "cache_bytes", cache_bytes, default_bytes)
        sequence = self.context_length, self.cache_dtype, concrete_mesh(self._params)
        default_bytes = loading.default_prefix_cache_bytes(free, self.config, *sequence)
        self.prefix_cache_bytes = loading.at_least(0, "prefix_cache_bytes", prefix_cache_bytes, default_bytes)
        self._prefix_cache = PrefixCache(self.prefix_cache_bytes)
        if eos_token_id is None:
            fields = stops.with_default_eos({}, self.config)
            eos_token_id = loading.valid_eos_token_ids(fields, tokenizer, self.config.vocab_size)
        self.eos_token_ids = frozenset(stops.eos_token_ids({"eos_token_id": eos_token_id}))
        for token in self.eos_token_ids:
            if not 0 <= token < self.config.vocab_size:
                raise DSMoEError(f"eos_token_id {token} is outside the vocabulary of {self.config.vocab_size}")
        self.stop_strings = SamplingParams(stop=stop_strings).stop
        self.sampling_defaults = dict(sampling_defaults)
        self.stats = Stats()
        self._num_requests = 0  # the default seed

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        dtype: Any = None,
        mesh: Mesh | MeshConfig | None = None,
        quantize: str | None = None,
        adapter: str | Path | None = None,
        revision: str | None = None,
        verify: bool = True,
        split_special_tokens: bool | None = None,
        force: bool = False,
        **options: Any,
    ) -> "Generator":
        """Load a model as `dsmoe_jax.load` does, with its tokenizer if there is one.

        EOS ids and stop strings come from `generation_config.json`, the config and the tokenizer; `sampling_defaults`
        from `generation_config.json`.

        Args:
            path_or_hub_id: Native checkpoint, Hugging Face folder or hub id.
            dtype: Dtype of the weights; default: as stored.
            mesh: Mesh to shard the model over.
            quantize: Quantize weights while loading: "int8", "int4" or "nf4".
            adapter: Folder of a LoRA adapter in PEFT's format; its EOS ids and stop strings are added.
            revision: Branch, tag or commit of a hub id; default: `main`.
            verify: Compare every file of a native checkpoint with its SHA-256 first.
            split_special_tokens: Encode special tokens in prompts as plain text (`Tokenizer.from_pretrained`).
            force: Load a model that exceeds the planned memory, with a warning.
            **options: Options of `Generator`.

        Returns:
            The generator.

        Raises:
            DSMoEError: The checkpoint is invalid, or exceeds the memory of its devices.
        """
        for name in options:
            if name not in _OPTIONS:
                raise DSMoEError(f"unknown option {name!r}; {suggest(name, _FROM_PRETRAINED)}")
        folder = resolve(path_or_hub_id, revision)
        settings: dict[str, Any] = {"dtype": dtype, "mesh": mesh, "quantize": quantize, "adapter": adapter}
        settings |= {"verify": verify, "split_special_tokens": split_special_tokens, "force": force}
        model, tokenizer, fields = loading.load(folder, engine_options=options, **settings)
        if options.get("eos_token_id") is None:
            options["eos_token_id"] = loading.valid_eos_token_ids(fields, tokenizer, model.config.vocab_size)
        options = {
            "stop_strings": stops.stop_strings(fields),
            "sampling_defaults": read_sampling_defaults(folder),
        } | options
        return cls(model, tokenizer, **options)

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        errors: str = "raise",
        progress: Meter = silent,
        **keywords: Any,
    ) -> Any:
        """Generate completions for one prompt or for a list of prompts.

        Args:
            prompts: A prompt or a list of them. A prompt is a string, a list of token ids, or a chat (a list of
                messages with role and content).
            params: Sampling parameters, for all prompts or one for each.
            errors: "raise", or "return" to return a completion with `error` for each invalid prompt.
            progress: Progress meter, in completions.
            **keywords: `SamplingParams` by field, instead of `params`.

        Returns:
            For one prompt a `Completion`, or a list of them if `n` is more than 1; for a list of prompts a list of
            these, in order.

        Raises:
            DSMoEError: Before generation starts: a prompt is empty, too long for the context or has ids outside the
                vocabulary, or a parameter is out of range.
        """
        check_choice("errors", errors, ("raise", "return"))
        if single := is_one_prompt(prompts):
            prompts = [prompts]  # type: ignore[list-item]
        engine, each = self.engine(), each_params(params, keywords, len(prompts))
        results: list[list[Output] | DSMoEError] = []
        for prompt, one in zip(prompts, each, strict=True):
            try:
                results.append(self.submit(engine, prompt, one))  # type: ignore[arg-type]
            except DSMoEError as error:
                if errors == "raise":
                    raise
                results.append(error)
        outputs = [output for result in results if isinstance(result, list) for output in result]
        with progress("completions", len(outputs)) as advance:
            reported = 0
            while engine.busy:
                engine.step()
                finished = sum(output.finished for output in outputs)
                advance(finished - reported)
                reported = finished
        completions = [
            [Completion("", [], "error", error=str(result))]
            if isinstance(result, DSMoEError)
            else [self.completion(output) for output in result]
            for result in results
        ]
        entries = [found if one.n > 1 else found[0] for one, found in zip(each, completions, strict=True)]
        return entries[0] if single else entries

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **keywords: Any) -> Iterator[str]:
        """Stream the completion of one prompt as pieces of text; close the iterator to abort.

        Args:
            prompt: As in a call.
            params: Sampling parameters.
            **keywords: `SamplingParams` by field, instead of `params`.

        Returns:
            Pieces of whole characters, without stop strings.

        Raises:
            DSMoEError: At once: as a call, if there is no tokenizer, or if `n` is not 1.
        """
        return self.pieces(*self.start(prompt, params, **keywords))

    def engine(self) -> Engine:
        """Return a new engine, whose counters become `stats`."""
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
            max_cache_bytes=self.cache_bytes,
            prefix_cache=self._prefix_cache,
        )
        self.stats = engine.stats
        return engine

    def start(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        prefix: Prefix | None = None,
        retain_prefix: bool = False,
        **keywords: Any,
    ) -> tuple[Engine, Output]:
        """Submit one prompt to a new engine, for `pieces`.

        Args:
            prompt: Text, chat or token ids.
            params: Sampling parameters; default: `SamplingParams()`.
            prefix: Cached keys and values of an earlier prompt (`Engine.submit`).
            retain_prefix: Retain keys and values as `Output.prefix`.
            **keywords: Fields of `SamplingParams` that replace those of `params`.

        Returns:
            The engine and the output it generates.

        Raises:
            DSMoEError: The prompt or a parameter is invalid.
        """
        (params,) = each_params(params, keywords, 1)
        if params.n != 1:
            raise DSMoEError(f"n must be 1 for a stream, got {params.n}")
        engine = self.engine()
        (output,) = self.submit(engine, prompt, params, detokenize=True, prefix=prefix, retain_prefix=retain_prefix)
        return engine, output

    @staticmethod
    def pieces(engine: Engine, output: Output) -> Iterator[str]:
        """Yield the text of an output as it is generated.

        Args:
            engine: The engine, without other requests.
            output: The output; it is canceled if the iterator is closed.

        Yields:
            New text.
        """
        try:
            while engine.busy and not output.finished:
                engine.step()
                if piece := output.new_text():
                    yield piece
        finally:
            engine.cancel(output)

    def encode(self, prompt: Prompt, *, split_special_tokens: bool | None = None) -> list[int]:
        """Return the token ids of a prompt: text with BOS, a chat with the chat template.

        Args:
            prompt: As in a call.
            split_special_tokens: Encode special-token strings in it as plain text; default: as the tokenizer.

        Returns:
            The token ids.

        Raises:
            DSMoEError: The prompt is empty, needs a tokenizer, has ids outside the vocabulary, or is a chat whose roles
                do not alternate.
        """
        return encode_prompt(prompt, self.tokenizer, self.config.vocab_size, split_special_tokens)

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str | Sequence[int]], **options: Any
    ) -> list[Score]:
        """Return the log-likelihood of each continuation given its prompt.

        Text is tokenized together with its prompt, as in lm-evaluation-harness: whitespace between the two belongs to
        the continuation, and an empty or blank prompt is the BOS token.

        Args:
            prompts: A list of prompts as in a call.
            continuations: Text or token ids, one per prompt.
            **options: `context_length` (default: that of the generator), `max_tokens` per batch with padding (2048),
                `share_prefixes` (True: tokens that pairs share are read once; changes only rounding) and `progress`, a
                progress meter in pairs.

        Returns:
            Scores in the order of the prompts.

        Raises:
            DSMoEError: As `encode`, an option is out of range, or a pair is empty or exceeds `context_length`.
        """
        for name, value in (("prompts", prompts), ("continuations", continuations)):
            if isinstance(value, str):
                raise DSMoEError(f"{name} must be a list, got the string {value!r:.80}")
        if len(prompts) != len(continuations):
            counts = f"{len(prompts)} and {len(continuations)}"
            raise DSMoEError(f"prompts and continuations must have one length, got {counts}")
        shared = self.tokenizer, self.config.vocab_size, self.prefix_token_id
        pairs = [encode_pair(*pair, *shared) for pair in zip(prompts, continuations, strict=True)]
        return score(self._graph, self._params, self.config, pairs, **self._scoring_options() | options)

    def iter_scores(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], **options: Any
    ) -> Iterator[tuple[int, Score]]:
        """Yield index and log-likelihood of each (context, continuation) of token ids, in the order of computation.

        Args:
            pairs: Token ids of non-empty contexts and continuations.
            **options: Those of `score`, except for `progress`.

        Yields:
            Index of the pair and its score.

        Raises:
            DSMoEError: At once, as `score`.
        """
        return iter_scores(self._graph, self._params, self.config, pairs, **self._scoring_options() | options)

    def perplexity(self, text: str | Sequence[int], **options: Any) -> Perplexity:
        """Return the perplexity of text or token ids over rolling windows, as lm-evaluation-harness does.

        Args:
            text: Text, or token ids with or without BOS.
            **options: Options of `score`, `window` (tokens read at once; default: `max_position_embeddings`, at most
                `context_length`) and `stride` (new tokens per window; default: `window`).

        Returns:
            Perplexity, negative log-likelihood and bits per byte.

        Raises:
            DSMoEError: An option is out of range, or there is no token to predict.
        """
        if not isinstance(text, str) and not hasattr(text, "__getitem__"):
            raise DSMoEError(f"text must be a string or token ids, got {text!r:.80}")
        prefix = self.prefix_token_id
        has_prefix = not isinstance(text, str) and len(text) > 0 and text[0] == prefix
        options = self._scoring_options() | {"prefix": None if has_prefix else prefix} | options
        if isinstance(text, str):
            if self.tokenizer is None:
                raise DSMoEError("text needs a tokenizer, and this generator has none: pass token ids")
            options = {"text_bytes": len(text.encode())} | options
            text = self.tokenizer.encode(text, add_special_tokens=False)
        return perplexity(self._graph, self._params, self.config, text, **options)

    def _scoring_options(self) -> dict[str, Any]:
        self.stats = Stats()
        names = ("context_length", "prefill_chunk", "stats")
        return {name: getattr(self, name) for name in names} | {"prefix_cache": self._prefix_cache}

    @property
    def prefix_token_id(self) -> int | None:
        """Context of the first token of a text: BOS, else EOS, else None."""
        sources = [self.tokenizer, self.config] if self.tokenizer else [self.config]
        ids = [*(s.bos_token_id for s in sources), *(s.eos_token_id for s in sources), *sorted(self.eos_token_ids)]
        return next((token for token in ids if type(token) is int and 0 <= token < self.config.vocab_size), None)

    def submit(self, engine: Engine, prompt: Prompt, params: SamplingParams, **options: Any) -> list[Output]:
        """Queue a prompt in an engine of this generator, with its stop strings and default seed.

        Args:
            engine: From `engine`.
            prompt: As in a call.
            params: Sampling parameters.
            **options: Those of `Engine.submit`.

        Returns:
            `params.n` outputs.

        Raises:
            DSMoEError: The prompt or a parameter is invalid.
        """
        ids = self.encode(prompt)
        params.check_vocabulary(self.config.vocab_size)
        if self.stop_strings and self.tokenizer is not None and not params.ignore_eos:
            params = dataclasses.replace(params, stop=tuple(dict.fromkeys((*params.stop, *self.stop_strings))))
        self._num_requests += 1
        return engine.submit(ids, params, seed=self._num_requests - 1, **options)

    def completion(self, output: Output) -> Completion:
        """Return a finished output as a completion."""
        token_ids, params = output.token_ids, output.request.params
        text = output.text
        if not params.stop:
            visible = token_ids[:-1] if output.finish_reason == "stop" else token_ids
            text = self.tokenizer.decode(visible) if self.tokenizer else ""
        logprobs = None if params.logprobs is None else output.logprobs
        return Completion(text, token_ids, output.finish_reason or "length", output.stop_reason, logprobs)


_OPTIONS: Final = inspect.getfullargspec(Generator.__init__).kwonlyargs
_FROM_PRETRAINED: Final = [*inspect.getfullargspec(Generator.from_pretrained).kwonlyargs, *_OPTIONS]
