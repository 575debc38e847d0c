"""The mesh, the sharding of every array, and results equal to one device.

Start at `test_loss_and_all_gradients_equal_one_device`; `test_token_dispatcher.py` tests the routed experts alone.
"""

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dsmoe_jax.checkpoint.native import save
from dsmoe_jax.generate import Generator
from dsmoe_jax.layers.token_dispatcher import STRATEGIES, DispatchConfig, Strategy
from dsmoe_jax.loading import load
from dsmoe_jax.model import DeepSeekMoE, assemble, merge, shardings, split
from dsmoe_jax.sharding import MeshConfig, make_mesh, place_batch
from dsmoe_jax.train import balance_loss, cross_entropy
from tests.helpers import golden
from tests.helpers.hf_folder import random_params, tiny, write_hf
from tests.helpers.meshes import MESHES, check_parts, check_placement, on_mesh
from tests.helpers.reference import random_model

LOGITS = 1e-5  # absolute, on logits of rms 2: a different order of summation
DRAWN = 1e-6  # relative: equal random bits, but rounding may depend on the shard shape
TRAINING = 1e-5  # absolute, on a loss near 5 and gradients below 1: a different order of summation

every_mesh = pytest.mark.parametrize("mesh", MESHES)


# make_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (None, (1, 8, 1, 1)),
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(expert=4), (1, 2, 4, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=2, fsdp=1, expert=-1), (2, 1, 4, 1)),
        (MeshConfig(fsdp=1, expert=2, tensor=4), (1, 1, 2, 4)),
    ],
    ids=str,
)
def test_minus_one_takes_the_remaining_devices(config: MeshConfig | None, sizes: tuple[int, ...]):
    mesh = make_mesh(config)

    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))


def test_a_mesh_over_some_of_the_devices():
    mesh = make_mesh(MeshConfig(expert=2), jax.devices()[4:])

    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}
    assert set(mesh.devices.flat) == set(jax.devices()[4:])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MeshConfig(data=-1, fsdp=-1), "data=-1, fsdp=-1, .*at most one -1"),
        (MeshConfig(expert=0), "expert=0.*must be positive"),
        (MeshConfig(tensor=-2), "tensor=-2.*must be positive"),
        (MeshConfig(fsdp=16), r"fsdp=16.*needs 16 devices, there are 8; set fsdp to -1 or 8$"),
        (MeshConfig(fsdp=2, expert=2), r"needs 4 devices, there are 8; set fsdp to -1 or 4$"),
        (MeshConfig(expert=3), r"expert=3.*does not divide 8 devices"),
        (MeshConfig(expert=16), r"expert=16.*does not divide 8 devices"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_rejected(config: MeshConfig, reason: str):
    with pytest.raises(ValueError, match=reason) as raised:
        make_mesh(config)

    assert "\n" not in str(raised.value)


# Placement


@pytest.mark.parametrize(
    ("changes", "mesh", "reason"),
    [
        (
            {"hidden_size": 36, "num_attention_heads": 2},
            MeshConfig(fsdp=8),
            r"\w+: embed of size 36 does not divide over fsdp=8",
        ),
        (
            {"n_routed_experts": 6},
            MeshConfig(fsdp=2, expert=4),
            r"layers\.1\.moe\.experts\.\w+: experts of size 6 does not divide over expert=4",
        ),
        (
            {"moe_intermediate_size": 15, "n_shared_experts": 2},
            MeshConfig(fsdp=4, tensor=2),
            r"layers\.1\.moe\.experts\.\w+: expert_ffn of size 15 does not divide over tensor=2",
        ),
        ({"vocab_size": 63}, MeshConfig(fsdp=4, tensor=2), r"embed: vocab of size 63 does not divide over tensor=2"),
        (  # 4 heads of 8: their 32 outputs would divide
            {},
            MeshConfig(fsdp=1, tensor=8),
            r"^4 attention heads do not divide over tensor=8",
        ),
        (
            {},
            MeshConfig(fsdp=2, tensor=4),
            r"^2 key-value heads do not divide over tensor=4",
        ),
    ],
    ids=["embed", "experts", "expert_ffn", "vocab", "heads", "kv_heads"],
)
def test_a_size_that_does_not_divide_is_rejected(changes: dict, mesh: MeshConfig, reason: str):
    with pytest.raises(ValueError, match=reason):
        shardings(tiny(**changes), mesh)


@pytest.mark.parametrize(
    ("mesh", "ways"),
    [
        ("fsdp=8", "data=1 · fsdp=8 · expert=1"),
        ("expert=2,tensor=2,fsdp=2", "data=1 · fsdp=2 · expert=2"),
        ("data=2,expert=4", "data=2 · fsdp=1 · expert=4"),
    ],
)
def test_a_batch_that_does_not_divide_is_rejected(mesh: str, ways: str):
    with pytest.raises(ValueError, match=f"^batch: batch of size 6 does not divide over {ways}$"):
        place_batch(make_mesh(MESHES[mesh]), np.ones((6, 4), np.int32))


@every_mesh
def test_a_batch_is_sharded_over_all_axes_but_tensor(mesh: str):
    ids, mask = np.arange(8 * 3).reshape(8, 3), np.ones((8, 3))

    placed = place_batch(make_mesh(MESHES[mesh]), ids, mask)

    rows = 8 * MESHES[mesh].tensor // 8
    for array, want in zip(placed, (ids, mask), strict=True):
        np.testing.assert_array_equal(array, want)
        assert {shard.data.shape for shard in array.addressable_shards} == {(rows, 3)}


@every_mesh
def test_an_import_shards_every_parameter(tmp_path: Path, mesh: str):
    params = random_params(tiny())

    model = load(write_hf(tmp_path, tiny(), params), mesh=MESHES[mesh])

    check_parts(model, mesh)
    for name, array in split(model)[1].items():
        np.testing.assert_array_equal(array, params[name])


@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=2,tensor=2,fsdp=2"])
def test_initial_weights_are_the_same_on_every_mesh(mesh: str):
    # Few shapes: each compiles a program.
    config = tiny(
        vocab_size=32, moe_intermediate_size=32, num_key_value_heads=4, first_k_dense_replace=0, n_shared_experts=None
    )
    want = split(DeepSeekMoE.init(config, seed=3))[1]

    model = DeepSeekMoE.init(config, seed=3, mesh=MESHES[mesh])

    check_placement(model, mesh)
    for name, array in split(model)[1].items():
        np.testing.assert_allclose(array, want[name], rtol=DRAWN, atol=0, err_msg=name)


# Results


class Step(NamedTuple):
    loss: Any
    logits: Any
    grads: dict[str, Any]
    overflow_passes: list[int]


CONFIG = tiny(num_experts_per_tok=3, aux_loss_alpha=0.1)
IDS = np.random.default_rng(0).integers(2, CONFIG.vocab_size, (8, 6)).astype(np.int32)


def model_on(mesh: str | None, config: DispatchConfig = DispatchConfig()) -> DeepSeekMoE:  # noqa: B008 (immutable)
    """The same model, on a mesh or one device."""
    model = random_model(CONFIG)
    if mesh is not None:
        places = shardings(CONFIG, MESHES[mesh])
        model = assemble(CONFIG, {name: jax.device_put(array, places[name]) for name, array in split(model)[1].items()})
    model.set_attributes(dispatch=config)
    return model


def step(mesh: str | None, config: DispatchConfig = DispatchConfig()) -> Step:  # noqa: B008 (immutable)
    """Cross-entropy, balance losses and the gradient of every parameter."""
    graph, params = split(model_on(mesh, config))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss_of(params: dict[str, Any], ids: Any):
        model = merge(graph, params)
        hidden = model.hidden(ids)
        logits = model.logits(hidden.last_hidden_state)
        balance = sum(balance_loss(CONFIG, hidden.routing).values())
        overflow_passes = [routed.overflow_passes for routed in hidden.routing.values()]
        return cross_entropy(logits, ids) + balance, (logits, overflow_passes)

    (ids,) = place_batch(None if mesh is None else make_mesh(MESHES[mesh]), IDS)
    with on_mesh(mesh):
        (loss, (logits, overflow_passes)), grads = jax.jit(loss_of)(params, ids)
    return Step(loss, logits, grads, [int(extra) for extra in overflow_passes])


@functools.cache
def step_on_one_device() -> Step:
    return step(None)


LAYOUTS = [("expert=4,fsdp=2", "gather", 0.5)]  # test_token_dispatcher.py has more pairs that are not slow


@pytest.mark.parametrize(
    ("mesh", "strategy", "factor"),
    [
        *LAYOUTS,
        *(
            pytest.param(*layout, marks=pytest.mark.slow)
            for layout in itertools.product(MESHES, STRATEGIES, (None, 0.5, 2.0))
            if layout not in LAYOUTS
        ),
    ],
)
def test_loss_and_all_gradients_equal_one_device(mesh: str, strategy: Strategy, factor: float | None):
    want = step_on_one_device()

    got = step(mesh, DispatchConfig(strategy, factor))

    np.testing.assert_allclose(got.loss, want.loss, rtol=0, atol=TRAINING)
    np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=LOGITS)
    assert got.grads.keys() == want.grads.keys()
    for name, place in shardings(CONFIG, MESHES[mesh]).items():
        grad = got.grads[name]
        np.testing.assert_allclose(grad, want.grads[name], rtol=0, atol=TRAINING, err_msg=name)
        if ".experts." in name:  # the compiler shards the others
            assert grad.sharding.is_equivalent_to(place, grad.ndim), name
    if factor != 2.0:  # depends on the routing
        assert (max(got.overflow_passes) > 0) == (factor == 0.5 and MESHES[mesh].expert > 1)


def test_every_gradient_is_nonzero():
    want = step_on_one_device()

    assert {name for name, grad in want.grads.items() if np.abs(grad).max() < 1e2 * TRAINING} == set()


@functools.cache
def completions_on_one_device(count: int) -> list[list[int]]:
    return completions(None, DispatchConfig(), count)


def completions(mesh: str | None, config: DispatchConfig, count: int) -> list[list[int]]:
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]][:count]
    outputs = Generator(model_on(mesh, config))(prompts, max_new_tokens=6, temperature=0.0, ignore_eos=True)
    return [output.token_ids for output in outputs]


QUICK = [("expert=4,fsdp=2", "all_to_all", 3)]  # the golden model tests a single prompt


def test_decoding_one_sequence_needs_no_resharding(capfd: pytest.CaptureFixture):
    model = DeepSeekMoE.init(tiny(), mesh=make_mesh(MeshConfig(expert=2), jax.devices()[:4]))

    Generator(model)([1, 2, 3], max_new_tokens=2, ignore_eos=True)

    assert "full rematerialization" not in capfd.readouterr().err  # a warning of XLA's partitioner


@pytest.mark.parametrize(
    ("mesh", "strategy", "count"),
    [
        *QUICK,
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(MESHES, STRATEGIES, (1, 3))
            if case not in QUICK
        ),
    ],
)
def test_uneven_prompts_complete_as_on_one_device(mesh: str, strategy: Strategy, count: int):
    got = completions(mesh, DispatchConfig(strategy, 0.5), count)

    assert got == completions_on_one_device(count)


@pytest.mark.parametrize(
    "mesh", ["expert=2,tensor=2,fsdp=2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in list(MESHES)[:3])]
)
def test_a_golden_model_generates_as_on_one_device(mesh: str):
    want, ids = golden.expected("a_baseline")["generation"], golden.tensors("a_baseline")["in.input_ids"]
    prompt = golden.tensors("a_baseline")["in.gen.prompt0"][0]

    model = load(golden.folder("a_baseline"), mesh=MESHES[mesh])
    logits = model(ids).logits
    completion = Generator(model)([prompt], max_new_tokens=len(want["prompt0"]), ignore_eos=True)[0]

    np.testing.assert_allclose(logits, golden.model("a_baseline")(ids).logits, rtol=0, atol=LOGITS)
    assert completion.token_ids == want["prompt0"]


@pytest.mark.parametrize(
    "mesh",
    [
        "expert=4,fsdp=2",
        *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES if mesh != "expert=4,fsdp=2"),
    ],
)
def test_native_and_hf_checkpoints_load_onto_a_mesh(tmp_path: Path, mesh: str):
    model = model_on(None)
    params = {name: np.asarray(array) for name, array in split(model)[1].items()}
    save(model, tmp_path / "native")

    native = load(tmp_path / "native", mesh=MESHES[mesh])
    imported = load(write_hf(tmp_path / "hf", CONFIG, params), mesh=make_mesh(MESHES[mesh]))

    want = model(IDS[:3]).logits
    for loaded in (native, imported):
        check_placement(loaded, mesh)
        np.testing.assert_allclose(loaded(IDS[:3]).logits, want, rtol=0, atol=LOGITS)


def test_the_output_reports_overflow_passes():
    model = model_on("expert=4,fsdp=2", DispatchConfig("all_to_all", 1e-9))  # one slot per device

    routing = model(IDS).routing

    assert routing.keys() == {1}
    owner = np.asarray(routing[1].ids).reshape(8, -1) // 2  # one sequence per device; 2 experts each
    most = max(np.bincount(of_device).max() for of_device in owner)
    assert routing[1].overflow_passes == most - 1 > 0
