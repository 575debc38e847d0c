"""The mesh and the table of axes: who gets which part of which array, and that it changes no result.

Start at `test_a_sharded_model_answers_as_on_one_device`.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from dsmoe_jax.convert import load_hf
from dsmoe_jax.generate import Generator
from dsmoe_jax.model import DeepSeekMoE, shardings, split
from dsmoe_jax.sharding import MeshConfig, make_mesh
from tests.helpers import golden
from tests.helpers.hf_folder import random_params, tiny, write_hf
from tests.helpers.meshes import MESHES, check_parts, check_placement

LOGITS = 1e-5  # absolute, sharded against whole: the same sums in another order, logits of rms 2

# Tests that compile for each mesh take fewer of them: between them, these split over every axis.
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
def test_minus_one_takes_the_rest_of_the_devices(config: MeshConfig | None, sizes: tuple[int, ...]):
    mesh = make_mesh(config)

    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "expert", "tensor"), sizes, strict=True))


def test_a_mesh_may_take_some_of_the_devices():
    mesh = make_mesh(MeshConfig(expert=2), jax.devices()[4:])

    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 1}
    assert set(mesh.devices.flat) == set(jax.devices()[4:])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MeshConfig(data=-1, fsdp=-1), "data=-1, fsdp=-1, .*at most one -1"),
        (MeshConfig(expert=0), "expert=0.*must be positive"),
        (MeshConfig(tensor=-2), "tensor=-2.*must be positive"),
        (MeshConfig(fsdp=16), r"fsdp=16.*needs 16 devices, there are 8"),
        (MeshConfig(fsdp=2, expert=2), r"needs 4 devices, there are 8"),
        (MeshConfig(expert=3), r"expert=3.*does not divide 8 devices"),
        (MeshConfig(expert=16), r"expert=16.*does not divide 8 devices"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused_with_its_numbers(config: MeshConfig, reason: str):
    with pytest.raises(ValueError, match=reason) as refused:
        make_mesh(config)

    assert "\n" not in str(refused.value)


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
    ],
    ids=["embed", "experts", "expert_ffn", "vocab"],
)
def test_a_size_that_does_not_divide_is_refused_by_the_name_of_its_array(changes: dict, mesh: MeshConfig, reason: str):
    with pytest.raises(ValueError, match=reason):
        shardings(tiny(**changes), mesh)


@every_mesh
def test_an_import_places_every_parameter(tmp_path: Path, mesh: str):
    params = random_params(tiny())

    model = load_hf(write_hf(tmp_path, tiny(), params), mesh=MESHES[mesh])

    check_parts(model, mesh)
    for name, array in split(model)[1].items():
        np.testing.assert_array_equal(array, params[name])


@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=2,tensor=2,fsdp=2"])
def test_fresh_weights_are_placed_and_the_same_on_every_mesh(mesh: str):
    # Few shapes, as each is a program to compile.
    config = tiny(
        vocab_size=32, moe_intermediate_size=32, num_key_value_heads=4, first_k_dense_replace=0, n_shared_experts=None
    )
    want = split(DeepSeekMoE.init(config, seed=3))[1]

    model = DeepSeekMoE.init(config, seed=3, mesh=MESHES[mesh])

    check_placement(model, mesh)
    for name, array in split(model)[1].items():
        np.testing.assert_array_equal(array, want[name])


# Results


@pytest.mark.parametrize("mesh", ["fsdp=8", "expert=4,fsdp=2", "expert=2,tensor=2,fsdp=2"])
def test_a_sharded_model_answers_as_on_one_device(mesh: str):
    want, ids = golden.expected("a_baseline")["generation"], golden.tensors("a_baseline")["in.input_ids"]
    prompt = golden.tensors("a_baseline")["in.gen.prompt0"][0]

    model = load_hf(golden.folder("a_baseline"), mesh=MESHES[mesh])
    logits = model(ids).logits
    answer = Generator(model)([prompt], max_new_tokens=len(want["prompt0"]), ignore_eos=True)[0]

    np.testing.assert_allclose(logits, golden.model("a_baseline")(ids).logits, rtol=0, atol=LOGITS)
    assert answer.tokens == want["prompt0"]
