"""The routed experts on few tokens, without sorting: equal to the reference, on one device and over meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe_jax.kernels import few_tokens
from dsmoe_jax.kernels.expert_ffn import VARIABLE
from dsmoe_jax.kernels.few_tokens import by_choice, by_expert, form
from dsmoe_jax.kernels.operand import Experts, expert_of_rows
from dsmoe_jax.layers.token_dispatcher import DispatchConfig, routed_experts
from dsmoe_jax.model import merge, split
from tests.helpers import golden, reference
from tests.helpers.conformance import BF16, DENSE, FP32, KINDS, D, E, F, assert_near
from tests.helpers.meshes import MESHES, on_mesh

M, K = 5, 2
# Experts shared between tokens, and E: no expert.
IDS = np.array([[0, 3], [3, 1], [E, E], [3, 0], [1, E]], np.int32)

every_form = pytest.mark.parametrize("few", [by_choice, by_expert], ids=lambda few: few.__name__)


def operands(kinds: tuple[str, str, str], dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, Experts]:
    """States, router weights and experts."""
    rng = np.random.default_rng(0)
    shapes = ((F, D), (F, D), (D, F))
    experts = Experts(
        *(reference.random_operand(kind, (E, *shape), rng, dtype) for kind, shape in zip(kinds, shapes, strict=True))
    )
    return jnp.asarray(rng.normal(size=(M, D)), dtype), jnp.asarray(rng.uniform(0.2, 1, (M, K)), jnp.float32), experts


def one_by_one(x: Any, weights: Any, experts: Experts) -> np.ndarray:
    """The weighted sum over each token's experts in float64."""
    x, gate, up, down = np.asarray(x, np.float64), *map(reference.dense, experts)
    y = np.zeros(x.shape)
    for token, choice in np.argwhere(IDS < E):
        e = IDS[token, choice]
        one = reference.swiglu(x[token][None], gate[e], up[e], down[e], "silu")[0]
        y[token] += float(weights[token, choice]) * one
    return y


@every_form
@pytest.mark.parametrize("kinds", ["dense", *KINDS])
def test_every_kind_of_operand_equals_the_reference(kinds: str, few: few_tokens.Form):
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
def test_unchosen_experts_do_not_change_the_output(few: few_tokens.Form):
    x, weights, experts = operands(DENSE)
    up: Any = experts.up
    broken = experts._replace(up=up.at[2].set(jnp.inf))  # not selected by any token

    got = jax.jit(few, static_argnums=4)(x, jnp.asarray(IDS), weights, broken, "silu")

    assert_near(got, one_by_one(x, weights, experts), FP32)


def test_the_form_depends_on_platform_and_token_count():
    assert form("gpu", 1, 6, 64) is form("tpu", 10, 6, 64) is by_choice
    assert form("gpu", 11, 6, 64) is form("tpu", 32, 6, 64) is by_expert
    assert form("gpu", 33, 6, 64) is form("cpu", 1, 6, 64) is None


@pytest.mark.parametrize(
    "few", [pytest.param(by_choice, marks=pytest.mark.slow), by_expert], ids=lambda few: few.__name__
)
def test_the_form_runs_forward_and_gradients_sort(few: few_tokens.Form, monkeypatch: pytest.MonkeyPatch):
    x, weights, experts = operands(DENSE)

    def run() -> Any:
        def routed(x: Any, weights: Any, experts: Any) -> Any:
            return routed_experts(x, jnp.asarray(IDS), weights, experts, activation="silu")[0]

        y, pull = jax.vjp(routed, x, weights, experts)
        return y, pull(jnp.ones_like(y))

    want = run()
    monkeypatch.setattr(few_tokens, "form", lambda *args: few)
    program = jax.jit(run).lower().as_text(debug_info=True)
    got = run()

    assert "few_tokens" in program
    assert "sort" in program
    jax.tree.map(lambda one, other: assert_near(one, other, FP32), got, want)


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_requested_backend_overrides_the_form(way: str, monkeypatch: pytest.MonkeyPatch):
    x, weights, experts = operands(DENSE)
    monkeypatch.setattr(few_tokens, "form", lambda *args: pytest.fail("a backend was requested"))
    if way == "environment":
        monkeypatch.setenv(VARIABLE, "batched")

    config = DispatchConfig(backend="batched" if way == "argument" else None)
    got, _ = routed_experts(x, jnp.asarray(IDS), weights, experts, activation="silu", config=config)

    assert_near(got, one_by_one(x, weights, experts), FP32)


@pytest.mark.parametrize(
    ("mesh", "few"),
    [("expert=4,fsdp=2", by_choice), ("expert=2,tensor=2,fsdp=2", by_expert)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_few_tokens_on_a_mesh_equal_the_reference(mesh: str, few: few_tokens.Form, monkeypatch: pytest.MonkeyPatch):
    x, weights, experts = operands(DENSE)
    calls = []
    monkeypatch.setattr(few_tokens, "form", lambda platform, *sizes: calls.append(sizes) or few)

    with on_mesh(mesh):
        program = jax.jit(lambda x, ids, weights: routed_experts(x, ids, weights, experts, activation="silu"))
        got, overflow_passes = program(x, jnp.asarray(IDS), weights)
        lowered = program.lower(x, jnp.asarray(IDS), weights).as_text()

    assert_near(got, one_by_one(x, weights, experts), FP32)
    assert overflow_passes == 0
    assert "stablehlo.sort" not in lowered
    ways = MESHES[mesh].expert
    tokens = -(-M // (2 * ways)) * ways  # of an expert group, after padding to the data axes
    assert set(calls) == {(tokens, K, E // ways)}


def test_an_explicit_all_to_all_does_not_gather_few_tokens(monkeypatch: pytest.MonkeyPatch):
    x, weights, experts = operands(DENSE)
    monkeypatch.setattr(few_tokens, "form", lambda *args: pytest.fail("all_to_all was requested"))

    with on_mesh("expert=4,fsdp=2"):
        config = DispatchConfig("all_to_all")
        got, _ = routed_experts(x, jnp.asarray(IDS), weights, experts, activation="silu", config=config)

    assert_near(got, one_by_one(x, weights, experts), FP32)


@every_form
def test_golden_logits_by_either_form(few: few_tokens.Form, monkeypatch: pytest.MonkeyPatch):
    want = golden.tensors("a_baseline")
    graph, params = split(golden.model("a_baseline"))
    monkeypatch.setattr(few_tokens, "form", lambda *args: few)

    hidden = jax.jit(lambda params, ids: merge(graph, params).hidden(ids))(params, jnp.asarray(want["in.input_ids"]))

    np.testing.assert_allclose(
        merge(graph, params).logits(hidden.last_hidden_state), want["logits"], rtol=0, atol=golden.LOGITS
    )


def test_search_and_comparison_find_the_same_experts(monkeypatch: pytest.MonkeyPatch):
    sizes = jnp.array([0, 3, 0, 5, 1, 0], jnp.int32)
    search = expert_of_rows(sizes, 12)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    comparison = expert_of_rows(sizes, 12)

    jax.tree.map(np.testing.assert_array_equal, comparison, search)
    np.testing.assert_array_equal(search[0], [1] * 3 + [3] * 5 + [4] + [5] * 3)
    np.testing.assert_array_equal(search[1], [True] * 9 + [False] * 3)
