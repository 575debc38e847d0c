"""`Generator`: prompts in, completions out. Read `Generator._tokens` for the loop, `_prefill` and `_step` for the work.

Shapes are static: prompts are padded to a bucket of lengths and the cache has a bucket of slots, so that a new prompt
length is seldom a new program. Rows start at slot 0 and padding stands to the right (see `cache.py`).
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsmoe_jax.axes import Array, Int
from dsmoe_jax.cache import KVCache
from dsmoe_jax.checkpoint import load
from dsmoe_jax.convert import load_hf, with_adapter
from dsmoe_jax.generate.sampling import Sampler, SamplingParams, sample
from dsmoe_jax.json_file import read_json
from dsmoe_jax.manifest import is_native
from dsmoe_jax.model import DeepSeekMoE, check_token_ids, merge, split
from dsmoe_jax.sharding import MeshConfig, mesh_of
from dsmoe_jax.tokenizer import Tokenizer, tokenizer_files

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
Prompt = str | Sequence[int] | Sequence[Message]

_SHORTEST_CONTEXT: Final = 4096
_HALF: Final = (jnp.bfloat16, jnp.float16)
_log = logging.getLogger("dsmoe_jax")


class Completion(NamedTuple):
    """One answer."""

    text: str  # without the end-of-sequence token; empty if the generator has no tokenizer
    tokens: list[int]  # as generated, a closing end-of-sequence token included
    finish_reason: Literal["eos", "length"]


class Generator:
    """Generates from a model, with or without its tokenizer.

    The context is the length of the key-value cache, not `max_position_embeddings` (RoPE scaling runs past that):
    `context_length` tokens, prompt and answer together, by default what the model was trained for, stretched by
    linear or dynamic scaling, and at least 4096. The cache itself only ever takes what a call asks for.
    """

    def __init__(
        self,
        model: DeepSeekMoE,
        tokenizer: Tokenizer | None = None,
        *,
        context_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ):
        self.config, self.tokenizer = model.config, tokenizer
        self._graph, params = split(model)
        self._params = for_generation(params)
        scaling = self.config.rope_scaling
        trained = int(self.config.max_position_embeddings * (scaling.factor if scaling else 1))
        self.context_length = max(trained, _SHORTEST_CONTEXT) if context_length is None else context_length
        if self.context_length < 2:
            raise ValueError(f"context_length must be at least 2, not {context_length}")
        eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
        ids = [] if eos is None else eos if isinstance(eos, Sequence) else [eos]
        if not all(isinstance(token, int) for token in ids):
            raise ValueError(f"eos_token_id must be an int or a list of ints, not {eos!r}")
        self.eos_token_ids = frozenset(ids)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = None,
        mesh: Mesh | MeshConfig | None = None,
        context_length: int | None = None,
        adapter: str | Path | None = None,
    ) -> "Generator":
        """A generator from a native checkpoint or a Hugging Face folder, with the tokenizer that lies in it, if any.

        `adapter` is a folder with a LoRA adapter as the peft library stores it.
        """
        path = Path(path)
        model = (load if is_native(path) else load_hf)(path, dtype=dtype, mesh=mesh)
        if adapter is not None:
            model = with_adapter(model, adapter)
        tokenizer = Tokenizer.from_pretrained(path) if tokenizer_files(path) else None
        eos = read_json(path / "generation_config.json").get("eos_token_id") if _has_generation_config(path) else None
        return cls(model, tokenizer, context_length=context_length, eos_token_id=eos)

    def __call__(self, prompts: Sequence[Prompt], **params: Any) -> list[Completion]:
        """Answer all prompts, in order, as one batch.

        A prompt is a text, a list of token ids, or a chat (a list of messages). `params` are those of
        `SamplingParams`. Raises `ValueError` for an empty prompt, ids outside the vocabulary, and a prompt that with
        `max_new_tokens` is longer than the context.
        """
        if isinstance(prompts, str | bytes) or not len(prompts):
            raise ValueError("prompts must be a non-empty list, one entry per completion")
        asked = SamplingParams(**params)
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in self._tokens([self.encode(prompt) for prompt in prompts], asked):
            for answer, token in zip(answers, tokens, strict=True):
                if not self._ended(answer, asked):
                    answer.append(token)
            if all(self._ended(answer, asked) for answer in answers):
                break
        return [self._completion(answer, asked) for answer in answers]

    def stream(self, prompt: Prompt, **params: Any) -> Iterator[str]:
        """The answer to one prompt, text by text as it comes; close the iterator to stop early.

        Raises `ValueError` as a call does, at once, and if there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("streaming text needs a tokenizer, and this generator has none")
        asked, ids = SamplingParams(**params), self.encode(prompt)
        self._check_fits([ids], asked)
        return self._stream(ids, asked, self.tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt; a text gets its begin-of-sequence token, a chat its template."""
        if not len(prompt):
            raise ValueError("a prompt is empty")
        if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
            if self.tokenizer is None:
                raise ValueError("a prompt of text needs a tokenizer, and this generator has none: give token ids")
            if isinstance(prompt, str):
                return self.tokenizer.encode(prompt)
            return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)  # type: ignore[arg-type]
        return check_token_ids(np.asarray(prompt)[None], self.config.vocab_size)[0].tolist()

    def _stream(self, ids: list[int], asked: SamplingParams, tokenizer: Tokenizer) -> Iterator[str]:
        pieces, answer = tokenizer.decode_stream(), []
        for (token,) in self._tokens([ids], asked):
            answer.append(token)
            ended = self._ended(answer, asked)
            if not (ended and token in self.eos_token_ids) and (piece := pieces.feed(token)):
                yield piece
            if ended:
                break
        if piece := pieces.flush():
            yield piece

    def _check_fits(self, prompts: list[list[int]], asked: SamplingParams) -> None:
        longest = max(map(len, prompts))
        if longest + asked.max_new_tokens > self.context_length:
            raise ValueError(
                f"a prompt of {longest} tokens and max_new_tokens {asked.max_new_tokens} "
                f"exceed the context_length of {self.context_length}"
            )

    def _tokens(self, prompts: list[list[int]], asked: SamplingParams) -> Iterator[list[int]]:
        """The next token of every row, step by step; rows that have ended go on, for the caller to ignore."""
        self._check_fits(prompts, asked)
        counts = np.array([len(prompt) for prompt in prompts], np.int32)
        slots = min(bucket(int(counts.max()) + asked.max_new_tokens), self.context_length)
        # Any token would do for padding: nothing reads it.
        ids = np.full((len(prompts), min(bucket(int(counts.max())), slots)), self.config.pad_token_id or 0, np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        sampler = Sampler.of([asked] * len(prompts), self.config.vocab_size)
        with mesh_of(self._params):
            token, cache = _prefill(self._graph, slots, self._params, ids, counts, sampler)
        for step in range(1, asked.max_new_tokens + 1):
            ready = token
            if step < asked.max_new_tokens:
                # Asked for before the last one is read: the device does not wait for the host.
                with mesh_of(self._params):
                    token, cache = _step(self._graph, self._params, cache, token, sampler, np.int32(step))
            yield np.asarray(ready).tolist()

    def _ended(self, answer: list[int], asked: SamplingParams) -> bool:
        return len(answer) >= asked.max_new_tokens or self._hit_eos(answer, asked)

    def _hit_eos(self, answer: list[int], asked: SamplingParams) -> bool:
        return bool(answer) and answer[-1] in self.eos_token_ids and not asked.ignore_eos

    def _completion(self, answer: list[int], asked: SamplingParams) -> Completion:
        eos = self._hit_eos(answer, asked)
        text = self.tokenizer.decode(answer[:-1] if eos else answer) if self.tokenizer else ""
        return Completion(text, answer, "eos" if eos else "length")


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


def bucket(length: int) -> int:
    """The next size of the form 2ᵏ or 1.5·2ᵏ, at least 16: two programs an octave, at most a third of it padding."""
    power = 16
    while power < length:
        if length <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    graph: Any,
    slots: int,
    params: dict[str, Array],
    token_ids: Int[Array, "B T"],
    counts: Int[Array, "B"],
    sampler: Sampler | None,
) -> tuple[Int[Array, "B"], KVCache]:
    """Read the prompts into a new cache; returns each row's first new token."""
    model = merge(graph, params)
    B, T = token_ids.shape
    cache = KVCache.empty(model.config, B, slots, model.embed[...].dtype)
    real = jnp.arange(T)[None, :] < counts[:, None]
    # Dynamic NTK goes by the padded length of the batch, as in transformers; the bucket is none of its business.
    hidden = model.hidden(token_ids, real, cache=cache, prefill=True, rope_length=counts.max())
    last = jnp.take_along_axis(hidden.states, (counts - 1)[:, None, None], axis=1)[:, 0]
    assert hidden.cache is not None
    return sample(model.logits(last), sampler, jnp.int32(0)), hidden.cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(
    graph: Any,
    params: dict[str, Array],
    cache: KVCache,
    token: Int[Array, "B"],
    sampler: Sampler | None,
    step: Int[Array, ""],
) -> tuple[Int[Array, "B"], KVCache]:
    """One token further in every row, the cache updated in place."""
    model = merge(graph, params)
    hidden = model.hidden(token[:, None], cache=cache)
    assert hidden.cache is not None
    return sample(model.logits(hidden.states[:, 0]), sampler, step), hidden.cache


def _has_generation_config(path: Path) -> bool:
    return (path / "generation_config.json").is_file()
