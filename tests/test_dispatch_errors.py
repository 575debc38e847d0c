"""Operands that cannot be dispatched are refused in one line."""

from typing import Any

import jax
import pytest

from dsmoe_jax.kernels.operand import Experts
from dsmoe_jax.layers.token_dispatcher import STRATEGIES, DispatchConfig, Strategy
from tests.helpers.meshes import on_mesh
from tests.test_token_dispatcher import DENSE, Kinds, arrays, ids_of, routed


def error(mesh: str | None, config: DispatchConfig, experts: Any = None, kinds: Kinds = DENSE) -> str:
    """The message, on one line."""
    inputs, _ = arrays(kinds)
    inputs = inputs if experts is None else inputs._replace(experts=experts)
    with on_mesh(mesh), pytest.raises(ValueError, match=r"\w") as raised:
        jax.eval_shape(lambda inputs: routed(inputs, ids_of("balanced"), config), inputs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_experts_that_do_not_divide_are_rejected(strategy: Strategy | None):
    experts = Experts(*(operand[:6] for operand in arrays()[0].experts))

    message = error("expert=4,fsdp=2", DispatchConfig(strategy), experts)

    assert message == "gate of the routed experts: experts of size 6 does not divide over expert=4"


def test_a_width_that_does_not_divide_is_rejected():
    gate, up, down = arrays()[0].experts

    message = error("expert=2,tensor=2,fsdp=2", DispatchConfig(), Experts(gate[:, :7], up[:, :7], down[:, :, :7]))

    assert message == "gate of the routed experts: expert_ffn of size 7 does not divide over tensor=2"


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        (("int8", "int8", "int8"), "gate"),
        (("dense", "dense", "4-bit"), "down"),
        (("dense", "low-rank over double", "dense"), "up"),
    ],
    ids=["gate", "down", "up"],
)
def test_quantized_operands_over_tensor_are_rejected(kinds: Kinds, name: str):
    """Each device of the axis would have all of them and add the full sum."""
    message = error("expert=2,tensor=2,fsdp=2", DispatchConfig(), kinds=kinds)

    assert message == f"{name} of the routed experts is quantized and cannot be sharded over tensor=2"
