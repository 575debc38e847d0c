"""The measurements, in order of priority, and their time budgets. Start at `PARTS`, then `allotment`."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple


class Part(NamedTuple):
    """A part, run in a separate process; `cases` is MODULE.FUNCTION of this package."""

    cases: str
    least: int  # minimum seconds
    wants: int  # seconds on a large GPU, most of them compilation; estimated
    what: str
    share: str = "of roofline"  # title of the share of the floor in the report
    flags: str = ""  # added to XLA_FLAGS, which jax reads at startup


_FUSION: Final = "--xla_gpu_experimental_use_ragged_dot_fusion"
_ROOF: Final = "of roofline"
_MFU: Final = "of measured matmul"  # the bars use the data sheet
CEILINGS: Final = "ceilings"  # always run: the floors derive from it

# fmt: off
PARTS: Final[dict[str, Part]] = {
    # name               cases                         least wants what
    CEILINGS:       Part("ceilings.cases",              10,  40, "bandwidth and bf16 matmul of this GPU"),
    "decode":       Part("generation.decode",           45, 150, "a decode step of the 16B in bf16"),
    "experts":      Part("experts.main_size",           20, 110, "the routed experts, 16K tokens, by backend and leg"),
    "train":        Part("training.widths_of_16b",      45, 130, "the train step, 16B widths, up to 8 layers", _MFU),
    "block":        Part("block.cases",                 20,  90, "one block of the 16B and its pieces"),
    "transformers": Part("peers.transformers",          40, 100, "transformers' Qwen2-MoE in the 16B's sizes"),
    "torch_experts": Part("peers.torch_experts",        10,  30, "the routed experts by torch's grouped matmul"),
    "prefill":      Part("generation.prefill_bf16",     40,  80, "a prompt of 2K through the 16B in bf16"),
    "int8":         Part("generation.int8",             60, 160, "decode and prefill of the 16B in int8"),
    "matmuls":      Part("experts.matmuls",             15,  60, "each grouped matmul kernel, each leg"),
    "finetune":     Part("training.adapters",           60, 140, "LoRA and QLoRA steps of the 16B", _MFU),
    "train_whole":  Part("training.largest_preset",     45,  90, "the train step of the largest preset", _MFU),
    "experts_more": Part("experts.more_sizes",          20, 120, "the routed experts, 4K and 64K tokens, and skewed"),
    "ragged_fused": Part("experts.ragged",              15,  40, "ragged_dot, XLA's fusion", _ROOF, _FUSION + "=true"),
    "ragged_plain": Part("experts.ragged",              15,  40, "ragged_dot without it", _ROOF, _FUSION + "=false"),
}
# fmt: on


def chosen(only: Sequence[str] | None) -> list[str]:
    """Return the parts to run, in order; default all."""
    for name in only or ():
        if name not in PARTS:
            raise ValueError(f"--only must be one of {', '.join(PARTS)}, got {name!r}")
    return [name for name in PARTS if not only or name in (CEILINGS, *only)]


def allotment(name: str, left: float, names: Sequence[str], budget: float) -> float | None:
    """Return the seconds for a part of the `left` ones; None if it does not fit.

    Earlier parts have priority. A budget above the sum of all parts is distributed in proportion.
    """
    if left < PARTS[name].least:
        return None
    factor = max(1.0, budget / sum(PARTS[one].wants for one in names))
    return min(PARTS[name].wants * factor, left)


def environment(name: str, given: Mapping[str, str], *, small: bool) -> dict[str, str]:
    """Return the environment of a part's process: `given` takes precedence, the part's flags are appended."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    own |= {"JAX_PLATFORMS": "cpu"} if small else {}
    flags = (given.get("XLA_FLAGS", ""), PARTS[name].flags)
    return own | dict(given) | {"XLA_FLAGS": " ".join(flag for flag in flags if flag)}
