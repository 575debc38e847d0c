"""`python -m tests.benchmarks.plan_check` compares `dsmoe plan` with compiled steps on eight simulated devices.

With `--card`, for GPUs that are absent (see `plan.absent_gpu`).

Arguments must be equal, temporaries between 90 and 115 % of what XLA plans, bytes of each kind of collective within 2 %
(kinds below 0.3 % of all bytes are not compared). Prints a table in Markdown.
"""

import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.plan.absent_gpu import DESCRIPTIONS
from dsmoe_jax.plan.cards import card_of
from dsmoe_jax.plan.compiled import Compiled, compile_plan
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.train.recipes import FINETUNING, RECIPES

LEAST, MOST = 0.90, 1.15  # temporaries, of the compiled ones
TRAFFIC: Final = 0.02
_NEGLIGIBLE: Final = 0.003  # of all bytes communicated


class Case(NamedTuple):
    """A step to compile."""

    recipe: str
    model: str  # preset, whose layers are cut to `layers`
    mesh: tuple[int, int, int, int]
    length: int
    rows: int  # sequences per device and micro-batch
    layers: int = 3
    fields: Mapping[str, Any] = {}  # of the model
    step: Mapping[str, Any] = {}
    others: Mapping[str, Any] = {}  # dispatch, moments, quantize


MID: Final = {
    **{"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "moe_intermediate_size": 704},
    **{"num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 32},
}
GROUPED: Final = MID | {"num_key_value_heads": 4}


def _step(remat: str, parts: int = 1) -> dict[str, Any]:
    return {"remat": remat, "gradient_accumulation_steps": parts}


FULL, NONE, DOTS = map(_step, ("full", "none", "dots"))
TWO, PARTS = _step("full", 2), _step("full", 4)  # micro-batches
LORA, QLORA = "lora_1x80gb", "qlora_1x80gb"
M2, M16, M145 = (f"deepseek_moe_{size}" for size in ("2b", "16b", "145b"))
A2A, NF4, INT8 = {"strategy": "all_to_all"}, {"quantize": "nf4"}, {"quantize": "int8"}
BF16: Final = {"moments": "bfloat16"}
# fmt: off
CASES: Final[dict[str, Case]] = {
    "tiny, dots":                    Case("tiny", "tiny", (1, 1, 1, 1), 128, 16, 4, step=DOTS),
    "tiny, data 8, remat":           Case("tiny", "tiny", (8, 1, 1, 1), 256, 8, 4, step=FULL),
    "tiny, expert 4":                Case("tiny", "tiny", (1, 1, 4, 1), 256, 8, 4),
    "bench, data 2":                 Case("bench", "bench", (2, 1, 1, 1), 512, 4),
    "bench, fsdp 4":                 Case("bench", "bench", (1, 4, 1, 1), 1024, 2, step=FULL),
    "2B, fsdp 8":                    Case(M2, M2, (1, 8, 1, 1), 1024, 2, step=NONE),
    "2B, expert 7":                  Case(M2, M2, (1, 1, 7, 1), 512, 2, step=FULL),
    "2B, data 2, fsdp 4":            Case(M2, M2, (2, 4, 1, 1), 512, 2, 4, step=PARTS),
    "16B, fsdp 8":                   Case(M16, M16, (1, 8, 1, 1), 1024, 1, step=FULL),
    "16B, fsdp 4, expert 2":         Case(M16, M16, (1, 4, 2, 1), 1024, 1, step=FULL),
    "16B, fsdp 2, expert 4":         Case(M16, M16, (1, 2, 4, 1), 512, 4, step=NONE),
    "16B, data 2, expert 4":         Case(M16, M16, (2, 1, 4, 1), 512, 2, step=DOTS),
    "16B, fsdp 4, tensor 2":         Case(M16, M16, (1, 4, 1, 2), 1024, 1, step=NONE),
    "16B, 4 micro-batches":          Case(M16, M16, (1, 8, 1, 1), 512, 2, step=PARTS),
    "16B, 5 layers":                 Case(M16, M16, (1, 8, 1, 1), 512, 2, 5, step=FULL),
    "145B, fsdp 8":                  Case(M145, M145, (1, 8, 1, 1), 512, 1, 2, step=FULL),
    "145B, expert 8":                Case(M145, M145, (1, 1, 8, 1), 512, 1, 2, step=FULL),
    "145B, 2 × 2 × 2":               Case(M145, M145, (1, 2, 2, 2), 512, 2, 2, step=FULL),
    "all-to-all, expert 8":          Case(M16, M16, (1, 1, 8, 1), 512, 4, fields=MID, step=FULL, others=A2A),
    "grouped queries":               Case(M16, M16, (1, 2, 1, 2), 512, 4, fields=GROUPED, step=FULL),
    "bf16 moments":                  Case(M16, M16, (1, 8, 1, 1), 512, 2, fields=MID, step=FULL, others=BF16),
    "factored moments":              Case("full_8x40gb", M16, (1, 8, 1, 1), 512, 2, fields=MID),
    "LoRA":                          Case(LORA, M16, (1, 1, 1, 1), 1024, 2, fields=MID, step=PARTS),
    "LoRA, fsdp 4":                  Case(LORA, M16, (1, 4, 1, 1), 512, 2, step=PARTS),
    "LoRA, data 4":                  Case(LORA, M16, (4, 1, 1, 1), 512, 2, fields=MID, step=PARTS),
    "LoRA, fsdp 2, expert 4":        Case(LORA, M16, (1, 2, 4, 1), 512, 2, step=PARTS),
    "QLoRA, int8":                   Case(QLORA, M16, (1, 1, 1, 1), 1024, 2, fields=MID, step=PARTS, others=INT8),
    "QLoRA, expert 4":               Case(QLORA, M16, (1, 1, 4, 1), 512, 2, step=PARTS, others=NF4),
    "tiny, fsdp 8":                  Case("tiny", "tiny", (1, 8, 1, 1), 256, 4, 4, step=PARTS),
    "bench, expert 8":               Case("bench", "bench", (1, 1, 8, 1), 512, 2, step=FULL),
    "2B, 2 × 3":                     Case(M2, M2, (1, 2, 3, 1), 512, 4, step=FULL),
    "16B, 2 × 4 tensor":             Case(M16, M16, (1, 2, 1, 4), 512, 2, step=FULL),
    "145B, data 2":                  Case(M145, M145, (2, 4, 1, 1), 512, 1, step=FULL),
    "16B, dots":                     Case(M16, M16, (1, 4, 2, 1), 512, 2, 4, step=DOTS),
    "LoRA, data 2, fsdp 2":          Case(LORA, M16, (2, 2, 1, 1), 512, 2, fields=MID, step=PARTS),
    "QLoRA, data 2":                 Case(QLORA, M16, (2, 1, 1, 1), 512, 2, fields=MID, step=PARTS, others=NF4),
    "bench, fsdp 8, no remat":       Case("bench", "bench", (1, 8, 1, 1), 512, 2, 4, step=NONE),
    "bench, data 4, parts 4":        Case("bench", "bench", (4, 1, 1, 1), 256, 2, step=PARTS),
    "mid, 2 × 4, parts 4":           Case(M16, M16, (1, 2, 4, 1), 512, 2, 4, fields=MID, step=PARTS),
    "LoRA, data 8":                  Case(LORA, M16, (8, 1, 1, 1), 512, 1, fields=MID, step=FULL),
    "LoRA, expert 4":                Case(LORA, M16, (1, 1, 4, 1), 512, 2, fields=MID, step=TWO),
    "mid, expert 8, 1,024":          Case(M16, M16, (1, 1, 8, 1), 1024, 2, fields=MID, step=NONE),
    "tiny, parts 8":                 Case("tiny", "tiny", (1, 1, 1, 1), 256, 4, 4, step=_step("full", 8)),
    "bench, 1,024, no remat":        Case("bench", "bench", (1, 1, 1, 1), 1024, 2, 4, step=NONE),
    "2B, data 4, parts 2":           Case(M2, M2, (4, 1, 1, 1), 512, 2, step=TWO),
    "QLoRA, fsdp 4":                 Case(QLORA, M16, (1, 4, 1, 1), 512, 2, fields=MID, step=TWO, others=INT8),
    "16B, fsdp 2, tensor 4, dots":   Case(M16, M16, (1, 2, 1, 4), 512, 2, step=_step("dots", 2)),
    "16B, one device":               Case(M16, M16, (1, 1, 1, 1), 1024, 1, step=FULL),
    "mid, 2 × 2 × 2, no remat":      Case(M16, M16, (2, 1, 2, 2), 512, 2, fields=MID, step=NONE),
    "bench, 4 × 2, parts 16":        Case("bench", "bench", (1, 4, 2, 1), 256, 2, 4, step=_step("dots", 16)),
    "mid, 2 × 2 tensor, parts 2":    Case(M16, M16, (1, 2, 1, 2), 512, 1, fields=MID, step=TWO),
    "mid, 2 × 2 tensor, no remat":   Case(M16, M16, (1, 2, 1, 2), 512, 1, fields=MID, step=_step("none", 2)),
    "LoRA, tensor 2":                Case(LORA, M16, (1, 1, 1, 2), 512, 1, fields=MID, step=NONE),
    "mid, tensor 2, dots":           Case(M16, M16, (1, 1, 1, 2), 512, 1, fields=MID, step=DOTS),
    # Compiled after the fit.
    "new: tiny, fsdp 4, parts 16":   Case("tiny", "tiny", (1, 4, 1, 1), 256, 2, 4, step=_step("full", 16)),
    "new: bench, data 8, 1,024":     Case("bench", "bench", (8, 1, 1, 1), 1024, 1, step=DOTS),
    "new: 2B, 2 × 3, no remat":      Case(M2, M2, (1, 2, 3, 1), 1024, 1, step=_step("none", 2)),
    "new: 16B, 2 × 2 × 2":           Case(M16, M16, (1, 2, 2, 2), 512, 2, step=FULL),
    "new: 145B, fsdp 4, tensor 2":   Case(M145, M145, (1, 4, 1, 2), 1024, 1, 2, step=DOTS),
    "new: LoRA, fsdp 8, parts 8":    Case(LORA, M16, (1, 8, 1, 1), 1024, 1, step=_step("full", 8)),
    "new: QLoRA, data 4":            Case(QLORA, M16, (4, 1, 1, 1), 256, 4, fields=MID, step=TWO, others=NF4),
    "new: LoRA, data 2, tensor 2":   Case(LORA, M16, (2, 1, 1, 2), 512, 2, fields=MID, step=_step("none", 2)),
    "new: mid, data 2, expert 4":    Case(M16, M16, (2, 1, 4, 1), 512, 2, fields=MID, step=PARTS, others=BF16),
    "new: 2B, factored":             Case("full_8x40gb", M2, (1, 2, 1, 1), 512, 2, step=NONE),
    "new: bench, all-to-all":        Case("bench", "bench", (1, 1, 8, 1), 256, 4, step=NONE, others=A2A),
    "new: grouped, fsdp 8":          Case(M16, M16, (1, 8, 1, 1), 1024, 1, 4, fields=GROUPED, step=NONE),
    "new: tiny, 2 × 2 × 2":          Case("tiny", "tiny", (2, 1, 2, 2), 256, 4, 4, step=NONE),
    "new: 16B, data 8":              Case(M16, M16, (8, 1, 1, 1), 512, 1, step=FULL),
}
# For GPUs, by themselves.
GPU_CASES: Final[dict[str, Case]] = {
    "fsdp 8, 2 micro-batches":       Case(M16, M16, (1, 8, 1, 1), 512, 2, step=TWO),
    "fsdp 8, 4,096 tokens":          Case(M16, M16, (1, 8, 1, 1), 4096, 1, step=TWO),
    "fsdp 8, four layers":           Case(M16, M16, (1, 8, 1, 1), 512, 2, 4, step=FULL),
    "fsdp 8, dots":                  Case(M16, M16, (1, 8, 1, 1), 512, 2, step=DOTS),
    "fsdp 8, no remat":              Case(M16, M16, (1, 8, 1, 1), 512, 2, step=NONE),
    "fsdp 8, layers in a loop":      Case(M16, M16, (1, 8, 1, 1), 512, 2, 4, step=FULL | {"scan_layers": True}),
    "fsdp 2, expert 4":              Case(M16, M16, (1, 2, 4, 1), 512, 2, step=FULL),
    "full_8x40gb":                   Case("full_8x40gb", M16, (1, 8, 1, 1), 1024, 1, step=TWO),
    "LoRA on one GPU":               Case(LORA, M16, (1, 1, 1, 1), 1024, 1, step=TWO),
    "LoRA on four GPUs":             Case(LORA, M16, (1, 4, 1, 1), 512, 2, step=TWO),
    "QLoRA on one GPU":              Case(QLORA, M16, (1, 1, 1, 1), 1024, 1, step=TWO),
    "LoRA, five layers":             Case(LORA, M16, (1, 1, 1, 1), 1024, 1, 5, step=TWO),
    "QLoRA, five layers":            Case(QLORA, M16, (1, 1, 1, 1), 1024, 1, 5, step=TWO),
    "fsdp 2, expert 4, long":        Case(M16, M16, (1, 2, 4, 1), 4096, 1, step=TWO),
    "fsdp 2, expert 4, five layers": Case(M16, M16, (1, 2, 4, 1), 512, 2, 5, step=TWO),
    "fsdp 2, expert 4, nine layers": Case(M16, M16, (1, 2, 4, 1), 512, 2, 9, step=TWO),
    "fsdp 8, 4 × 4,096 tokens":      Case(M16, M16, (1, 8, 1, 1), 4096, 4, 2, step=DOTS),
    # Not used in the fit.
    "new: full_8x40gb, two layers":  Case("full_8x40gb", M16, (1, 8, 1, 1), 1024, 1, 2, step=TWO),
    "new: loop, 2 micro-batches":    Case(M16, M16, (1, 8, 1, 1), 512, 2, 4, step=TWO | {"scan_layers": True}),
    "new: no remat, 2 × 2,048":      Case(M16, M16, (1, 8, 1, 1), 2048, 1, step=_step("none", 2)),
    "new: 2B, data 8":               Case(M2, M2, (8, 1, 1, 1), 2048, 4, step=_step("dots", 2)),
}
# fmt: on


class Comparison(NamedTuple):
    """The plan beside the compiled step."""

    plan: TrainingPlan
    compiled: Compiled

    @property
    def arguments(self) -> tuple[int, int]:
        """Bytes, planned and compiled."""
        return self.plan.arguments, self.compiled.arguments

    @property
    def temporaries(self) -> float:
        """Planned over compiled bytes."""
        return self.plan.temporaries / self.compiled.temporaries

    @property
    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes of each kind of collective, planned and compiled, but for negligible ones."""
        mine, its = collections.Counter(), collections.Counter()
        for one in self.plan.traffic:
            mine[one.kind] += one.bytes
        for one in self.compiled.collectives:
            its[one.kind] += one.bytes * one.count
        least = _NEGLIGIBLE * its.total()
        return {kind: (mine[kind], its[kind]) for kind in {*mine, *its} if max(mine[kind], its[kind]) > least}

    def misses(self) -> list[str]:
        """Return what is outside its bar."""
        found = [] if self.arguments[0] == self.arguments[1] else ["arguments"]
        found += [] if LEAST <= self.temporaries <= MOST else ["temporaries"]
        return found + [kind for kind, (mine, its) in self.traffic.items() if abs(mine - its) > TRAFFIC * its]


def planned(case: Case, card: str = "cpu") -> TrainingPlan:
    """Return the plan of a case."""
    config: Any = (RECIPES.get(case.recipe) or FINETUNING[case.recipe])()
    model = dataclasses.replace(ModelConfig.preset(case.model), num_hidden_layers=case.layers, **case.fields)
    step = dataclasses.replace(config.step, **case.step)
    devices = math.prod(case.mesh)
    batch = case.rows * step.gradient_accumulation_steps * devices // case.mesh[3]
    data = dataclasses.replace(config.data, sequence_length=case.length, batch_size=batch)
    config = dataclasses.replace(config, step=step, data=data, mesh=MeshConfig(*case.mesh))
    for name, value in case.others.items():
        match name:
            case "strategy":
                config = dataclasses.replace(config, dispatch=dataclasses.replace(config.dispatch, strategy=value))
            case "moments":
                config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, moments=value))
            case _:
                config = dataclasses.replace(config, **{name: value})
    return TrainingPlan.of(config, model, devices, card_of(card))


def compare(case: Case, card: str = "cpu") -> Comparison:
    """Plan and compile a case."""
    plan = planned(case, card)
    return Comparison(plan, compile_plan(plan, card))


def main() -> None:
    """Print one row per case, and how many are within the bars."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.plan_check", description=(__doc__ or "").strip())
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default all")
    parser.add_argument("--card", choices=DESCRIPTIONS, help="compile for GPUs of this kind")
    args = parser.parse_args()
    cases = GPU_CASES if args.card else CASES
    print("| case | arguments, GB | equal | temporaries, GB | planned | collectives, GB | difference | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    misses, compared = collections.Counter(), 0
    for name in args.cases or cases:
        one = compare(cases[name], args.card or "cpu")
        mine, its = one.arguments
        worst = max((abs(a - b) / b for a, b in one.traffic.values() if b), default=0.0)
        total = sum(b for _, b in one.traffic.values())
        print(
            f"| {name} | {its / 1e9:.3f} | {'yes' if mine == its else mine - its} "
            f"| {one.compiled.temporaries / 1e9:.3f} | {one.temporaries:.2f} | {total / 1e9:.3f} | {worst:.2%} "
            f"| {one.compiled.seconds:.0f} |",
            flush=True,
        )
        compared += 1
        misses.update(one.misses())
    print(f"\n{compared} cases; outside the bars: {dict(misses) or 'none'}")


if __name__ == "__main__":
    main()
