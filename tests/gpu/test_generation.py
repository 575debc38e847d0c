"""Generation on a GPU: decode steps, greedy ids of the original, batch invariance, an int8 KV cache.

Start at `test_decode_steps_equal_the_originals`; the greedy ids are from `tests/test_golden.py`, collected again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.generate import Completion, Generator
from dsmoe_jax.kernels import few_tokens
from dsmoe_jax.kernels.expert_ffn import BACKENDS, VARIABLE, Backend
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import assemble, merge, split
from dsmoe_jax.quantize import quantize_embedding, quantize_params
from tests.gpu.backends import SERVING, skip_without
from tests.helpers import golden
from tests.test_engine import test_later_requests_fill_idle_rows  # noqa: F401
from tests.test_golden import (
    every_case,
    test_greedy_ids_equal_the_original,  # noqa: F401
)

CASE = "a_baseline"
SAME = 1e-4  # absolute, of log-probabilities: the matmuls depend on the batch size
SAME_INT8 = 1e-2  # a key or value near the middle of two codes may round differently
INT8_KL = 1e-3  # nats per token, median: 1e-4 to 2e-4 on CPU. The worst is 0.02, where routing differs
INT8_WORST = 0.1
NEAR = 0.1  # nats, absolute: 0.04 on CPU

NEW = 24


def decoded(case: str, cache_dtype: Any = jnp.float32) -> np.ndarray:
    """The logits after the prompt and each further token of the case's two sequences [2, steps, V]."""
    model, want = golden.model(case), golden.tensors(case)
    ids, first = want["in.input_ids"], golden.expected(case)["cache_prefill_len"]
    graph, params = split(model)

    @jax.jit
    def read(params: Any, ids: Any, cache: KVCache):
        model = merge(graph, params)
        hidden = model.hidden(ids, cache=cache)
        return model.logits(hidden.last_hidden_state[:, -1]), hidden.cache

    empty = KVCache.empty(model.config, len(ids), ids.shape[1], cache_dtype)
    logits, cache = read(params, jnp.asarray(ids[:, :first]), empty)
    steps = [logits]
    for t in range(first, first + want["cache.step_logits"].shape[1] - 1):
        logits, cache = read(params, jnp.asarray(ids[:, t : t + 1]), cache)
        steps.append(logits)
    return np.stack(steps, axis=1)


@pytest.fixture
def clear_traces():
    """The backend is chosen while tracing, and jax caches traces."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def record_rows(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[int]:
    """Record the rows of each trace of this backend."""
    forward, backward = BACKENDS[backend]
    rows = []

    def recorded(inputs: Any, group_sizes: Any, activation: str):
        rows.append(len(inputs.rows))
        return forward(inputs, group_sizes, activation)

    monkeypatch.setitem(BACKENDS, backend, Backend(recorded, backward))
    return rows


@pytest.mark.usefixtures("clear_traces")
@pytest.mark.parametrize("backend", SERVING)
def test_decode_steps_equal_the_originals(backend: str, monkeypatch: pytest.MonkeyPatch):
    skip_without(backend)
    monkeypatch.setenv(VARIABLE, backend)
    rows = record_rows(monkeypatch, backend)

    logits = decoded(CASE)

    np.testing.assert_allclose(logits, golden.tensors(CASE)["cache.step_logits"], rtol=0, atol=golden.LOGITS)
    assert {2 * 16 * 3, 2 * 3} <= set(rows)  # sequences × tokens × top-k: the prompt, and a step


@pytest.mark.usefixtures("clear_traces")
@pytest.mark.parametrize("form", [few_tokens.by_choice, few_tokens.by_expert], ids=lambda form: form.__name__)
def test_unsorted_decode_steps_equal_the_originals(form: few_tokens.Form, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(few_tokens, "form", lambda *args: form)

    logits = decoded(CASE)

    np.testing.assert_allclose(logits, golden.tensors(CASE)["cache.step_logits"], rtol=0, atol=golden.LOGITS)


@pytest.mark.usefixtures("clear_traces")
def test_on_a_gpu_few_tokens_are_not_sorted(monkeypatch: pytest.MonkeyPatch):
    original, taken = few_tokens.form, set()

    def recorded(platform: str, tokens: int, *others: int) -> few_tokens.Form | None:
        found = original(platform, tokens, *others)
        taken.add((tokens, found))
        return found

    monkeypatch.setattr(few_tokens, "form", recorded)

    decoded(CASE)

    # A step of two sequences with top-3 of 8 experts; and the prompts, two of 16 tokens.
    on_gpu = jax.default_backend() == "gpu"
    assert taken == ({(2, few_tokens.by_choice), (32, few_tokens.by_expert)} if on_gpu else {(2, None), (32, None)})


@every_case
def test_an_int8_cache_has_a_small_kl_divergence(case: str):
    exact = jax.nn.log_softmax(golden.tensors(case)["cache.step_logits"])

    rounded = jax.nn.log_softmax(decoded(case, jnp.int8))

    kl = np.asarray((jnp.exp(exact) * (exact - rounded)).sum(-1))[:, 1:]  # prefill does not read the cache
    assert 0 < np.median(kl) < INT8_KL
    assert kl.max() < INT8_WORST


# fmt: off
KINDS = {
    #                              weights  cache    log-probabilities
    "fp32":                       (None,    None,    SAME),
    "int8 cache":                 (None,    "int8",  SAME_INT8),
    "int8 weights":               ("int8",  None,    SAME),
    "nf4 weights and int8 cache": ("nf4",   "int8",  SAME_INT8),
}
# fmt: on


def generator(kind: str) -> Generator:
    scheme, cache, _ = KINDS[kind]
    model = golden.model(CASE)
    if scheme is not None:
        model = assemble(model.config, quantize_embedding(quantize_params(split(model)[1], scheme)))
    return Generator(model, cache_dtype=cache)


def prompts() -> list[list[int]]:
    """Of 5, 9 and 12 tokens."""
    return [golden.tensors(CASE)[f"in.gen.prompt{i}"][0].tolist() for i in range(3)]


def completions(generate: Generator, *prompts: list[int]) -> list[Completion]:
    return generate(prompts, max_new_tokens=NEW, ignore_eos=True, logprobs=1)


def logprobs(completion: Completion) -> np.ndarray:
    return np.array([token.logprob for token in completion.logprobs or []])


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_batch(kind: str):
    made, (short, _, long) = generator(kind), prompts()

    alone = [*completions(made, short), *completions(made, long)]
    together = completions(made, short, long)

    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(logprobs(one), logprobs(other), rtol=0, atol=KINDS[kind][2])


def test_int8_cache_completions_are_nearly_the_likeliest():
    """Ids may differ from the original's: its top two tokens come within 0.008."""
    given = prompts()

    together = completions(generator("int8 cache"), *given)

    longest = max(map(len, given))
    texts = [prompt + completion.token_ids for prompt, completion in zip(given, together, strict=True)]
    ids = [text + [0] * (longest + NEW - len(text)) for text in texts]
    exact = np.asarray(jax.nn.log_softmax(golden.model(CASE)(np.array(ids)).logits))
    for row, prompt, completion in zip(exact, given, together, strict=True):
        here = row[len(prompt) - 1 :][:NEW]
        chosen = here[np.arange(NEW), completion.token_ids]
        assert (here.max(-1) - chosen).max() < NEAR
        np.testing.assert_allclose(logprobs(completion), chosen, rtol=0, atol=NEAR)
