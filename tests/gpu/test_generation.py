"""Generation on a GPU: the original's greedy ids, rows that do not notice one another, an int8 cache, decode steps.

Start at `test_decode_steps_equal_the_originals`; the greedy ids are those of `tests/test_golden.py`, collected a second
time.
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
from tests.test_engine import test_requests_that_come_later_fill_rows_that_are_free  # noqa: F401
from tests.test_golden import (
    every_case,
    test_greedy_ids_equal_the_original,  # noqa: F401
)

CASE = "a_baseline"
SAME = 1e-4  # absolute, of log-probabilities, as of logits: other row counts are other matmuls
SAME_INT8 = 1e-2  # a key or value that lies between two codes may then get the other one
INT8_KL = 1e-3  # nats a token, the median: 1e-4 to 2e-4 on CPU. The worst is 0.02, where another expert is chosen
INT8_WORST = 0.1
NEAR = 0.1  # nats, absolute: 0.04 on CPU

NEW = 24


def decoded(case: str, cache_dtype: Any = jnp.float32) -> np.ndarray:
    """The logits after the prompt and after each further token of the case's two rows [2, steps, V]."""
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
def traced_anew():
    """Which backend runs is decided while a program is traced, and jax remembers what it traced."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def heard(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[int]:
    """How many rows this backend is asked for, each time that it is traced."""
    forward, backward = BACKENDS[backend]
    rows = []

    def listening(inputs: Any, group_sizes: Any, activation: str):
        rows.append(len(inputs.rows))
        return forward(inputs, group_sizes, activation)

    monkeypatch.setitem(BACKENDS, backend, Backend(listening, backward))
    return rows


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("backend", SERVING)
def test_decode_steps_equal_the_originals(backend: str, monkeypatch: pytest.MonkeyPatch):
    skip_without(backend)
    monkeypatch.setenv(VARIABLE, backend)
    rows = heard(monkeypatch, backend)

    logits = decoded(CASE)

    np.testing.assert_allclose(logits, golden.tensors(CASE)["cache.step_logits"], rtol=0, atol=golden.LOGITS)
    assert {2 * 16 * 3, 2 * 3} <= set(rows)  # rows × tokens × experts of each: the prompt, and a step


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("form", [few_tokens.by_choice, few_tokens.by_expert], ids=lambda form: form.__name__)
def test_decode_steps_without_sorting_equal_the_originals(form: few_tokens.Form, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(few_tokens, "form", lambda *asked: form)

    logits = decoded(CASE)

    np.testing.assert_allclose(logits, golden.tensors(CASE)["cache.step_logits"], rtol=0, atol=golden.LOGITS)


@pytest.mark.usefixtures("traced_anew")
def test_on_a_gpu_few_tokens_are_not_sorted(monkeypatch: pytest.MonkeyPatch):
    original, taken = few_tokens.form, set()

    def heard(platform: str, tokens: int, *others: int) -> few_tokens.Form | None:
        found = original(platform, tokens, *others)
        taken.add((tokens, found))
        return found

    monkeypatch.setattr(few_tokens, "form", heard)

    decoded(CASE)

    # A step of two rows with three experts each, of eight; and the prompts, two of 16 tokens.
    on_gpu = jax.default_backend() == "gpu"
    assert taken == ({(2, few_tokens.by_choice), (32, few_tokens.by_expert)} if on_gpu else {(2, None), (32, None)})


@every_case
def test_an_int8_cache_hardly_changes_what_comes_next(case: str):
    exact = jax.nn.log_softmax(golden.tensors(case)["cache.step_logits"])

    rounded = jax.nn.log_softmax(decoded(case, jnp.int8))

    kl = np.asarray((jnp.exp(exact) * (exact - rounded)).sum(-1))[:, 1:]  # the prompt looks at itself, not at the cache
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


def answers(made: Generator, *given: list[int]) -> list[Completion]:
    return made(given, max_new_tokens=NEW, ignore_eos=True, logprobs=1)


def logprobs(answer: Completion) -> np.ndarray:
    return np.array([token.logprob for token in answer.logprobs or []])


@pytest.mark.parametrize("kind", KINDS)
def test_two_rows_alone_are_the_two_together(kind: str):
    made, (short, _, long) = generator(kind), prompts()

    alone = [*answers(made, short), *answers(made, long)]
    together = answers(made, short, long)

    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(logprobs(one), logprobs(other), rtol=0, atol=KINDS[kind][2])


def test_answers_from_an_int8_cache_are_nearly_the_likeliest_of_the_exact_model():
    """Their ids may differ from the original's: its two likeliest tokens are 0.008 apart at the nearest."""
    given = prompts()

    together = answers(generator("int8 cache"), *given)

    longest = max(map(len, given))
    texts = [prompt + answer.token_ids for prompt, answer in zip(given, together, strict=True)]
    ids = [text + [0] * (longest + NEW - len(text)) for text in texts]
    exact = np.asarray(jax.nn.log_softmax(golden.model(CASE)(np.array(ids)).logits))
    for row, prompt, answer in zip(exact, given, together, strict=True):
        here = row[len(prompt) - 1 :][:NEW]
        chosen = here[np.arange(NEW), answer.token_ids]
        assert (here.max(-1) - chosen).max() < NEAR
        np.testing.assert_allclose(logprobs(answer), chosen, rtol=0, atol=NEAR)
