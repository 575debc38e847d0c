"""The routed experts on few tokens, without sorting: the same sums as the slow twin's, and where they are used."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels import few_tokens
from dsmoe_jax.kernels.expert_ffn import VARIABLE
from dsmoe_jax.kernels.few_tokens import by_choice, by_expert, form
from dsmoe_jax.kernels.operand import Experts, expert_of_rows
from dsmoe_jax.layers.dispatch import DispatchConfig, routed_experts
from dsmoe_jax.model import merge, split
from tests.helpers import golden, reference
from tests.helpers.conformance import BF16, DENSE, FP32, KINDS, D, E, F, assert_near

M, A = 5, 2
# Of each token: an expert that others chose, too, and E, which is nobody.
IDS = np.array([[0, 3], [3, 1], [E, E], [3, 0], [1, E]], np.int32)

every_form = pytest.mark.parametrize("few", [by_choice, by_expert], ids=lambda few: few.__name__)


def operands(kinds: tuple[str, str, str], dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, Experts]:
    """States, weights and experts."""
    rng = np.random.default_rng(0)
    shapes = ((F, D), (F, D), (D, F))
    experts = Experts(
        *(reference.random_operand(kind, (E, *shape), rng, dtype) for kind, shape in zip(kinds, shapes, strict=True))
    )
    return jnp.asarray(rng.normal(size=(M, D)), dtype), jnp.asarray(rng.uniform(0.2, 1, (M, A)), jnp.float32), experts


def one_by_one(x: Any, weights: Any, experts: Experts) -> np.ndarray:
    """The sum over each token's choices in float64."""
    x, gate, up, down = np.asarray(x, np.float64), *map(reference.dense, experts)
    y = np.zeros(x.shape)
    for token, choice in np.argwhere(IDS < E):
        e = IDS[token, choice]
        own = reference.swiglu(x[token][None], gate[e], up[e], down[e], "silu")[0]
        y[token] += float(weights[token, choice]) * own
    return y


@every_form
@pytest.mark.parametrize("kinds", ["dense", *KINDS])
def test_every_token_meets_the_experts_it_chose(kinds: str, few: few_tokens.Form):
    x, weights, experts = operands(DENSE if kinds == "dense" else KINDS[kinds][0])

    got = jax.jit(few, static_argnums=4)(x, jnp.asarray(IDS), weights, experts, "silu")

    assert got.dtype == jnp.float32
    assert_near(got, one_by_one(x, weights, experts), FP32)
    assert not np.any(got[2])


@every_form
def test_bf16_stays_near_fp32(few: few_tokens.Form):
    x, weights, experts = operands(("dense", "int8", "low-rank over dense"), jnp.bfloat16)

    got = jax.jit(few, static_argnums=4)(x, jnp.asarray(IDS), weights, experts, "silu")

    assert_near(got, one_by_one(x, weights, experts), BF16)


@every_form
def test_what_an_expert_makes_of_tokens_that_did_not_choose_it_does_not_matter(few: few_tokens.Form):
    x, weights, experts = operands(DENSE)
    up: Any = experts.up
    broken = experts._replace(up=up.at[2].set(jnp.inf))  # nobody's choice

    got = jax.jit(few, static_argnums=4)(x, jnp.asarray(IDS), weights, broken, "silu")

    assert_near(got, one_by_one(x, weights, experts), FP32)


def test_the_form_goes_by_device_and_number_of_tokens():
    assert form("gpu", 1, 6, 64) is form("gpu", 10, 6, 64) is by_choice
    assert form("gpu", 11, 6, 64) is form("gpu", 32, 6, 64) is by_expert
    assert form("gpu", 33, 6, 64) is form("cpu", 1, 6, 64) is form("tpu", 1, 6, 64) is None


@every_form
def test_dispatch_takes_the_form_forward_and_sorts_for_gradients(few: few_tokens.Form, monkeypatch: pytest.MonkeyPatch):
    x, weights, experts = operands(DENSE)

    def run() -> Any:
        def routed(x: Any, weights: Any, experts: Any) -> Any:
            return routed_experts(x, jnp.asarray(IDS), weights, experts, activation="silu")[0]

        y, pull = jax.vjp(routed, x, weights, experts)
        return y, pull(jnp.ones_like(y))

    want = run()
    monkeypatch.setattr(few_tokens, "form", lambda *asked: few)
    program = jax.jit(run).lower().as_text(debug_info=True)
    got = run()

    assert "few_tokens" in program
    assert "sort" in program
    jax.tree.map(lambda one, other: assert_near(one, other, FP32), got, want)


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_backend_that_is_asked_for_goes_before_the_forms(way: str, monkeypatch: pytest.MonkeyPatch):
    x, weights, experts = operands(DENSE)
    monkeypatch.setattr(few_tokens, "form", lambda *asked: pytest.fail("a backend was asked for"))
    if way == "environment":
        monkeypatch.setenv(VARIABLE, "batched")

    options = DispatchConfig(backend="batched" if way == "argument" else None)
    got, _ = routed_experts(x, jnp.asarray(IDS), weights, experts, activation="silu", options=options)

    assert_near(got, one_by_one(x, weights, experts), FP32)


@every_form
def test_a_golden_model_says_the_same_by_either_form(few: few_tokens.Form, monkeypatch: pytest.MonkeyPatch):
    want = golden.tensors("a_baseline")
    graph, params = split(golden.model("a_baseline"))
    monkeypatch.setattr(few_tokens, "form", lambda *asked: few)

    hidden = jax.jit(lambda params, ids: merge(graph, params).hidden(ids))(params, jnp.asarray(want["in.input_ids"]))

    np.testing.assert_allclose(merge(graph, params).logits(hidden.states), want["logits"], rtol=0, atol=golden.LOGITS)


def test_rows_find_their_expert_by_search_and_by_comparison(monkeypatch: pytest.MonkeyPatch):
    sizes = jnp.array([0, 3, 0, 5, 1, 0], jnp.int32)
    search = expert_of_rows(sizes, 12)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    comparison = expert_of_rows(sizes, 12)

    jax.tree.map(np.testing.assert_array_equal, comparison, search)
    np.testing.assert_array_equal(search[0], [1] * 3 + [3] * 5 + [4] + [5] * 3)
    np.testing.assert_array_equal(search[1], [True] * 9 + [False] * 3)
