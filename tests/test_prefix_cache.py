"""`PrefixCache`: eviction, and reuse across the prompts of a call, calls and chats."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.generate import Generator
from dsmoe_jax.generate.prefix_cache import Prefix, PrefixCache, common_prefix
from dsmoe_jax.kv_cache import KVCache
from dsmoe_jax.model import DeepSeekMoE
from tests.helpers import small
from tests.helpers.few_shot import questions

pytestmark = pytest.mark.heavy

MODEL = DeepSeekMoE.init(small.SMALL, seed=2)
PROMPTS = [context for context, _ in questions(6, shots=4, vocab=small.SMALL.vocab_size)[::4]]


def prefix(tokens: list[int], dtype=jnp.float32) -> Prefix:
    return Prefix(tuple(tokens), KVCache.empty(small.SMALL, 1, 32, dtype))


def size_of(one: Prefix) -> int:
    return sum(x.nbytes for layer in one.cache.layers for x in layer if x is not None)


def test_common_prefix_ends_at_the_first_difference():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix((1, 2), np.array([1, 2, 3])) == 2
    assert common_prefix([], [1]) == 0


def test_longest_match_is_found():
    cache = PrefixCache(10**9)
    for tokens in (range(20), [*range(30), 99], range(100, 120)):
        cache.add(prefix([*tokens]))

    found = cache.find([*range(40)], jnp.float32)

    assert found is not None
    assert len(found.token_ids) == 31
    assert cache.find([*range(40)], jnp.bfloat16) is None
    assert cache.find([5, *range(40)], jnp.float32) is None


def test_short_match_of_a_long_prompt_is_not_used():
    cache = PrefixCache(10**9)
    cache.add(prefix([*range(8), 99]))

    assert cache.find([*range(100)], jnp.float32) is None
    assert cache.find([*range(12)], jnp.float32) is not None


def test_longer_prefix_replaces_its_beginning():
    cache = PrefixCache(10**9)
    cache.add(prefix([*range(20)]))
    cache.add(prefix([*range(30)]))
    cache.add(prefix([*range(10)]))

    assert len(cache) == 1
    assert cache.nbytes == size_of(prefix([1]))


def test_least_recently_used_prefix_is_evicted():
    one = size_of(prefix([1]))
    cache = PrefixCache(2 * one)
    first, second, third = ([start + i for i in range(20)] for start in (0, 100, 200))
    cache.add(prefix(first))
    cache.add(prefix(second))
    cache.find(first, jnp.float32)
    cache.add(prefix(third))

    assert [cache.find(tokens, jnp.float32) is not None for tokens in (first, second, third)] == [True, False, True]
    assert cache.nbytes == 2 * one


def test_prefix_beyond_the_bound_is_dropped():
    cache = PrefixCache(size_of(prefix([1])) - 1)
    cache.add(prefix([*range(20)]))

    assert len(cache) == 0


@pytest.mark.parametrize(
    "options",
    [{"max_batch_size": 2}, *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, {"prefill_chunk": 32}))],
    ids=str,
)
def test_shared_beginning_of_prompts_is_read_once(options):
    sharing, plain = Generator(MODEL, **options), Generator(MODEL, prefix_cache_bytes=0, **options)

    got = sharing(PROMPTS, max_new_tokens=5, ignore_eos=True)

    assert got == plain(PROMPTS, max_new_tokens=5, ignore_eos=True)
    shared = min(common_prefix(PROMPTS[0], other) for other in PROMPTS[1:])
    assert sharing.stats.reused_tokens >= 5 * shared
    total = sum(map(len, PROMPTS))
    assert sharing.stats.prompt_tokens + sharing.stats.reused_tokens == total
    assert (plain.stats.prompt_tokens, plain.stats.reused_tokens) == (total, 0)


def test_prefix_outlives_the_call():
    generate = Generator(MODEL)
    expected = generate(PROMPTS, max_new_tokens=3)

    assert generate(PROMPTS[1:], max_new_tokens=3) == expected[1:]
    assert generate.stats.reused_tokens > len(PROMPTS[1:]) * 64


def test_prompts_without_a_shared_beginning_retain_nothing():
    generate = Generator(MODEL)

    generate([[i, *range(2, 20)] for i in range(20, 26)], max_new_tokens=2)

    assert generate.stats.reused_tokens == 0
    assert len(generate._prefix_cache) == 0


def test_samples_of_a_prompt_read_it_once():
    generate = Generator(MODEL)

    generate([PROMPTS[0]], n=4, temperature=1.0, max_new_tokens=3, ignore_eos=True)

    assert generate.stats.prompt_tokens == len(PROMPTS[0])


def test_scores_and_completions_share_prefixes():
    generate = Generator(MODEL)
    generate(PROMPTS, max_new_tokens=1)

    generate.score(PROMPTS, [[5]] * len(PROMPTS))

    assert generate.stats.reused_tokens > (len(PROMPTS) - 1) * 64
    assert generate.stats.prompt_tokens < sum(map(len, PROMPTS)) / 3
