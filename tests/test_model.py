"""The model against the NumPy reference, for every option of a config; padding, positions, initialization, errors.

Start at `test_logits_equal_the_reference`.
"""

import ast
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsmoe_jax
from dsmoe_jax import lora
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.kernels.activation import ACTIVATION_FUNCTIONS
from dsmoe_jax.model import DeepSeekMoE, Graph, assemble, merge, shardings, split
from dsmoe_jax.quantize import quantize_params
from dsmoe_jax.sharding import make_mesh
from tests.helpers import reference
from tests.helpers.hf_folder import tiny
from tests.helpers.meshes import MESHES

LOGITS = 1e-4  # absolute, on logits of rms 1; correct fp32 implementations differ by about 1e-6
BF16_RMS = 0.05  # of the logits' rms: eps is 0.0078 and a block rounds some ten times

IDS = np.random.default_rng(0).integers(0, 64, (2, 12))

LINEAR = {"type": "linear", "factor": 4.0}
DYNAMIC = {"type": "dynamic", "factor": 2.0}

# One MoE layer is enough for most options, and compiles fastest; `base` below has a dense layer before it.
# fmt: off
ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "one layer":                ONE_LAYER,
    "as many key-value heads":  ONE_LAYER | {"num_key_value_heads": None},
    "one key-value head":       ONE_LAYER | {"num_key_value_heads": 1},
    "wide heads":               ONE_LAYER | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "narrow heads":             ONE_LAYER | {"num_attention_heads": 16, "num_key_value_heads": 4},
    "attention_bias":           ONE_LAYER | {"attention_bias": True},
    "MoE from layer 2":         {"first_k_dense_replace": 2, "num_hidden_layers": 3},
    "MoE every other layer":    {"first_k_dense_replace": 0, "moe_layer_freq": 2, "num_hidden_layers": 3},
    "no shared experts":        ONE_LAYER | {"n_shared_experts": None},
    "no experts":               ONE_LAYER | {"n_routed_experts": None},
    "top-1":                    ONE_LAYER | {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "all experts":              ONE_LAYER | {"num_experts_per_tok": 8},
    "norm_topk_prob":           ONE_LAYER | {"norm_topk_prob": True},
    "tied embeddings":          ONE_LAYER | {"tie_word_embeddings": True},
    "linear rope":              ONE_LAYER | {"rope_scaling": LINEAR},
    "dynamic rope, beyond":     ONE_LAYER | {"rope_scaling": DYNAMIC, "max_position_embeddings": 6},
    "rope_theta":               ONE_LAYER | {"rope_theta": 500.0},
    "rms_norm_eps":             ONE_LAYER | {"rms_norm_eps": 1e-3},
} | {name: ONE_LAYER | {"hidden_act": name} for name in ACTIVATION_FUNCTIONS if name != "silu"}
# fmt: on

# Validated and exported only.
CARRIED = {
    "use_cache",
    "torch_dtype",
    "transformers_version",
    "architectures",
    "extra",
    "pretraining_tp",
    "scoring_func",
    "pad_token_id",
}


@functools.cache
def base() -> DeepSeekMoE:
    """Grouped queries, a dense layer and a MoE layer, shared experts."""
    return reference.random_model(tiny())


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def assert_logits(got: Any, want: Any, where: Any = np.s_[:]):
    np.testing.assert_allclose(np.asarray(got)[where], want[where], rtol=0, atol=LOGITS)


# The reference


@pytest.mark.parametrize(
    "variant",
    [pytest.param(one, marks=[pytest.mark.slow] * (one in ACTIVATION_FUNCTIONS and one != "gelu")) for one in VARIANTS],
)
def test_logits_equal_the_reference(variant: str):
    model = reference.random_model(tiny(**VARIANTS[variant]))

    out = model(IDS)

    want = reference.forward(model, IDS)
    assert_logits(out.logits, want.logits)
    assert out.hidden_states is None
    assert out.routing.keys() == want.chosen.keys()
    for layer, chosen in want.chosen.items():
        np.testing.assert_array_equal(out.routing[layer].ids, chosen)


OF_THE_SAME_SHAPES = ["norm_topk_prob", "linear rope", "dynamic rope, beyond", "rope_theta", "rms_norm_eps", "relu"]


@pytest.mark.parametrize("variant", OF_THE_SAME_SHAPES)
def test_the_reference_distinguishes_the_variants(variant: str):
    """Otherwise the comparison above would not test the option."""
    plain = reference.random_model(tiny(**ONE_LAYER))
    other = assemble(tiny(**VARIANTS[variant]), split(plain)[1])

    logits, changed = (reference.forward(model, IDS).logits for model in (plain, other))

    assert np.abs(changed - logits).max() > 1e1 * LOGITS


def test_every_hidden_state_equals_the_reference():
    out = base()(IDS, output_hidden_states=True)

    want = reference.forward(base(), IDS)
    assert out.hidden_states is not None
    assert len(out.hidden_states) == base().config.num_hidden_layers + 1
    for got, states in zip(out.hidden_states, want.hidden_states, strict=True):
        np.testing.assert_allclose(got, states, rtol=0, atol=LOGITS)
    assert_logits(out.logits, want.logits)


@pytest.mark.parametrize(
    ("first", "every", "experts", "layers"),
    [(0, 1, 8, [0, 1, 2, 3, 4]), (1, 2, 8, [2, 4]), (3, 1, 8, [3, 4]), (5, 1, 8, []), (0, 1, None, [])],
)
def test_routing_is_returned_for_moe_layers(first: int, every: int, experts: int | None, layers: list[int]):
    plan = {"first_k_dense_replace": first, "moe_layer_freq": every, "num_hidden_layers": 5}
    model = reference.random_model(tiny(n_routed_experts=experts, **plan))

    routing = jax.eval_shape(model, IDS).routing

    assert list(routing) == layers
    assert all(r.ids.shape == r.weights.shape == (2, 12, 2) and r.scores.shape == (2, 12, 8) for r in routing.values())


def test_bf16_runs_and_stays_near_fp32():
    model = reference.random_model(tiny(**ONE_LAYER), dtype=jnp.bfloat16)

    out = model(IDS)

    want = reference.forward(model, IDS).logits
    assert out.logits.dtype == jnp.float32
    assert rms(out.logits - want) <= BF16_RMS * rms(want)


# Padding and positions


@pytest.mark.parametrize(("positions", "kind"), [("default", bool), ("counted", int)])
def test_padding_does_not_change_valid_logits(positions: str, kind: type):
    """Sequence 0 is left-padded, sequence 1 right-padded; RoPE is relative, so a shift changes nothing."""
    mask = np.ones(IDS.shape, int)
    mask[0, :5], mask[1, 8:] = 0, 0
    position_ids = np.maximum(mask.cumsum(axis=1) - 1, 0) if positions == "counted" else None

    out = base()(IDS, mask.astype(kind), position_ids)

    for row in range(2):
        real = mask[row] == 1
        alone = reference.forward(base(), IDS[row : row + 1, real])
        assert_logits(np.asarray(out.logits)[row, real], alone.logits[0])
        np.testing.assert_array_equal(np.asarray(out.routing[1].ids)[row, real], alone.chosen[1][0])
    assert np.isfinite(out.logits).all()


def test_positions_with_gaps():
    positions = np.array([[0, 1, 2, 9, 10, 11, 3, 4, 5, 30, 31, 60], [5, 5, 5, 6, 6, 7, 7, 8, 0, 0, 1, 1]])

    out = base()(IDS, np.ones_like(IDS), positions)

    assert_logits(out.logits, reference.forward(base(), IDS, position_ids=positions).logits)
    assert rms(out.logits - reference.forward(base(), IDS).logits) > 1e2 * LOGITS


# Transformations

# The logits of `params` for IDS under each transformation.
LOGITS_BY = {
    "jit": lambda graph, params, ids: jax.jit(lambda params: merge(graph, params)(ids).logits)(params),
    "jit of a closure": lambda graph, params, ids: jax.jit(lambda ids: merge(graph, params)(ids).logits)(ids),
    "jit without arguments": lambda graph, params, ids: jax.jit(lambda: merge(graph, params)(ids).logits)(),
    "nnx.jit": lambda graph, params, ids: nnx.jit(lambda model, ids: model(ids).logits)(merge(graph, params), ids),
    "vmap": lambda graph, params, ids: jax.vmap(lambda row: merge(graph, params)(row[None]).logits[0])(ids),
}
GRADS_BY = {
    "grad": lambda loss, graph, params: jax.grad(lambda params: loss(merge(graph, params)))(params),
    "jit of grad": lambda loss, graph, params: jax.jit(jax.grad(lambda params: loss(merge(graph, params))))(params),
    "checkpoint": lambda loss, graph, params: jax.grad(jax.checkpoint(lambda params: loss(merge(graph, params))))(
        params
    ),
    "nnx.value_and_grad": lambda loss, graph, params: {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.value_and_grad(loss)(merge(graph, params))[1])
    },
}
ODD = jnp.asarray(np.random.default_rng(1).integers(0, 64, (3, 12)))  # no mesh divides three rows
MESH, QUERY = "expert=2,tensor=2,fsdp=2", "layers.0.attention.q.weight"


@functools.cache
def shallow(mesh: str | None = None) -> tuple[Graph, dict[str, Any]]:
    graph, params = split(reference.random_model(tiny(**ONE_LAYER)))
    if mesh is not None:
        places = shardings(tiny(**ONE_LAYER), MESHES[mesh])
        params = {name: jax.device_put(np.asarray(value), places[name]) for name, value in params.items()}
    return graph, params


@functools.cache
def gradients_of_one_program() -> dict[str, Any]:
    """The gradients of one jitted program on one device, as in training."""
    graph, params = shallow()

    def loss(params: dict[str, Any]) -> jax.Array:
        model = merge(graph, params)
        return (model.logits(model.hidden(ODD).last_hidden_state) ** 2).sum()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("mesh", [pytest.param(None, marks=pytest.mark.slow), MESH])
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * way.startswith("jit ")) for way in LOGITS_BY]
)
def test_transformations_give_the_same_logits(way: str, mesh: str | None):
    logits = LOGITS_BY[way](*shallow(mesh), ODD)

    assert_logits(logits, reference.forward(merge(*shallow()), np.asarray(ODD)).logits)


@pytest.mark.parametrize("mesh", [pytest.param(None, marks=pytest.mark.slow), MESH])
@pytest.mark.parametrize("way", GRADS_BY)
def test_all_ways_to_differentiate_agree(way: str, mesh: str | None):
    grads = GRADS_BY[way](lambda model: (model(ODD).logits ** 2).sum(), *shallow(mesh))

    for name, want in gradients_of_one_program().items():
        np.testing.assert_allclose(grads[name], want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("placed", ["on the mesh", "on one device", "on the host"])
def test_a_model_may_be_called_within_a_mesh(placed: str):
    graph, params = shallow(MESH if placed == "on the mesh" else None)
    if placed == "on the host":
        params = {name: np.asarray(value) for name, value in params.items()}

    with jax.set_mesh(make_mesh(MESHES[MESH])):
        logits = merge(graph, params)(ODD).logits

    assert_logits(logits, reference.forward(merge(*shallow()), np.asarray(ODD)).logits)


def test_mask_and_positions_may_be_traced():
    graph, params = shallow()
    mask = np.ones(ODD.shape, int)
    mask[0, :5] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)

    traced = jax.jit(lambda *given: merge(graph, params)(*given).logits)(ODD, mask, positions)

    assert_logits(traced, np.asarray(merge(graph, params)(ODD, mask, positions).logits), np.s_[1:])


def test_gradients_of_an_adapter_on_an_int8_base():
    graph, params = shallow()
    config, base = merge(graph, params).config, params | quantize_params({QUERY: params[QUERY]}, "int8")
    plan = make_plan(lora.LoraConfig(r=2, target_modules=("q_proj", "gate_proj")), config)
    adapter = lora.init(plan, config, base, jax.random.key(0))

    def loss(adapter: dict[str, Any], whole: bool) -> jax.Array:
        model = merge(graph, lora.attach(plan, base, adapter))
        return ((model(ODD).logits if whole else model.logits(model.hidden(ODD).last_hidden_state)) ** 2).sum()

    grads = jax.grad(loss)(adapter, True)

    for name, want in jax.jit(jax.grad(loss), static_argnums=1)(adapter, False).items():
        np.testing.assert_allclose(grads[name], want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=name)
    assert any(np.abs(grad).max() > 0 for grad in grads.values())


@pytest.mark.parametrize(
    "ids", [jnp.arange(3), jnp.ones((1, 2)), jnp.zeros((0, 3), int)], ids=["rank", "dtype", "size"]
)
def test_traced_ids_of_a_wrong_type_are_rejected(ids: jax.Array):
    with pytest.raises(ValueError, match=r"token_ids must be non-empty int \[B, T\]"):
        jax.jit(base())(ids)


# Every field is read


def reads_of_the_config() -> set[str]:
    """Attributes read anywhere in the package; within config.py only by the properties and methods others call."""
    package, found = Path(dsmoe_jax.__file__).parent, set()
    for file in [*package.glob("*.py"), *package.glob("*/*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        roots: list[ast.AST] = [tree]
        if file.name == "config.py":
            kept_out = ("__post_init__", "to_dict", "from_dict")
            roots = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name not in kept_out]
        for node in (node for root in roots for node in ast.walk(root)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
    return found


def test_every_field_of_the_config_is_read_somewhere():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}

    unread = fields - reads_of_the_config() - CARRIED

    assert not unread
    assert fields >= CARRIED


# Parameters and init


def test_every_parameter_has_logical_axes():
    for changes in ({}, {"attention_bias": True, "tie_word_embeddings": True}):
        state = nnx.state(reference.random_model(tiny(**changes)))

        unnamed = [path for path, leaf in nnx.to_flat_state(state) if len(leaf.logical_axes) != leaf[...].ndim]

        assert not unnamed


@functools.cache
def fresh(seed: int) -> dict[str, np.ndarray]:
    """A config with few shapes: each compiles an initializer."""
    return {name: np.asarray(value) for name, value in split(DeepSeekMoE.init(SQUARE, seed=seed))[1].items()}


SQUARE = tiny(
    initializer_range=0.05,
    attention_bias=True,
    num_key_value_heads=4,
    intermediate_size=32,
    moe_intermediate_size=32,
    n_shared_experts=1,
)


def test_init_depends_on_the_seed():
    again = split(DeepSeekMoE.init(SQUARE, seed=0))[1]

    for name, value in fresh(0).items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
        assert np.array_equal(value, fresh(1)[name]) == name.endswith(("norm.weight", "bias")), name


def test_all_parameters_start_differently():
    drawn = [value.ravel()[:100].tobytes() for name, value in fresh(0).items() if value.ndim > 1]

    assert len(set(drawn)) == len(drawn)


def test_init_has_the_distributions_of_the_original():
    """N(0, initializer_range²), norms 1, biases 0; only the router has U(±1/√D), PyTorch's default."""
    bound = 32**-0.5
    for name, value in fresh(0).items():
        if name.endswith("norm.weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif name.endswith("router.weight"):
            assert 0.95 * bound < np.abs(value).max() <= bound, name
            assert value.std() == pytest.approx(bound / 3**0.5, rel=0.2), name
        else:
            five_deviations = 5 / (2 * value.size) ** 0.5
            assert value.std() == pytest.approx(0.05, rel=five_deviations), name
            assert abs(value.mean()) < 5 * 0.05 / value.size**0.5, name


# Errors


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([[1, 64]], r"token id 64 is outside the vocabulary of 64"),
        ([[1, -1]], r"token id -1 is outside the vocabulary of 64"),
        ([[]], r"float64 \[1, 0\]"),
        (np.zeros((2, 0), int), r"int64 \[2, 0\]"),
        ([[1.0, 2.0]], r"float64 \[1, 2\]"),
        ([[True, False]], r"bool \[1, 2\]"),
        ([1, 2, 3], r"int64 \[3\]"),
        (7, r"int64 \[\]"),
    ],
    ids=str,
)
def test_malformed_token_ids_are_rejected(token_ids: Any, message: str):
    with pytest.raises(ValueError, match=message):
        base()(token_ids)


def test_masks_and_positions_of_another_shape_are_rejected():
    other = np.ones((2, 11), int)

    with pytest.raises(ValueError, match=r"attention_mask must have the shape of token_ids, \(2, 12\), got \(2, 11\)"):
        base()(IDS, other)
    with pytest.raises(ValueError, match=r"position_ids must have the shape of token_ids, \(2, 12\), got \(2, 11\)"):
        base()(IDS, None, other)
