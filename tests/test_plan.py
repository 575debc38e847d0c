"""Plans of runs, from configs alone, against compiled steps; `tests/benchmarks/plan_check.py` has more cases."""

import dataclasses
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import abstract, layers_of, short
from dsmoe_jax.plan.cards import CARDS, card_of
from dsmoe_jax.plan.check import check_memory
from dsmoe_jax.plan.collectives import COMPILERS, Traffic
from dsmoe_jax.plan.compiled import compile_plan
from dsmoe_jax.plan.generation import GenerationPlan
from dsmoe_jax.plan.hlo import collectives
from dsmoe_jax.plan.roofline import split_by_network
from dsmoe_jax.plan.search import flags, search
from dsmoe_jax.plan.training import TrainingPlan
from dsmoe_jax.sharding import MeshConfig, make_mesh
from dsmoe_jax.train.config import DataConfig, RunConfig
from dsmoe_jax.train.recipes import FINETUNING, RECIPES
from dsmoe_jax.train.step import StepConfig
from tests.benchmarks import plan_check
from tests.helpers.command import run

pytestmark = pytest.mark.heavy

REPORT = Path(plan_check.__file__).with_name("reports") / "2026-11-29-plan.md"


def recipe(name: str, *, batch: int | None = None, length: int | None = None, **mesh: int) -> Any:
    """A recipe on a mesh, with two micro-batches."""
    config: Any = (FINETUNING.get(name) or RECIPES[name])()
    step = dataclasses.replace(config.step, gradient_accumulation_steps=2)
    data = dataclasses.replace(config.data, batch_size=batch, sequence_length=length or config.data.sequence_length)
    return dataclasses.replace(config, step=step, data=data, mesh=MeshConfig(**mesh))


# --- against compiled steps ---


QUICK = {
    "one device": plan_check.Case("tiny", "tiny", (1, 1, 1, 1), 256, 8, 2),
    "fsdp 2, expert 2": plan_check.Case("tiny", "tiny", (1, 2, 2, 1), 64, 8, 2, step=plan_check.FULL),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "one device")) for name in QUICK],
)
def compared(request: pytest.FixtureRequest) -> plan_check.Comparison:
    return plan_check.compare(QUICK[request.param])


def test_arguments_are_exactly_those_of_the_step(compared: plan_check.Comparison):
    planned, compiled = compared.arguments

    assert planned == compiled


def test_collectives_are_those_of_the_step(compared: plan_check.Comparison):
    assert {"all-reduce"} <= set(compared.traffic) or compared.plan.work.mesh.size == 1
    for kind, (planned, compiled) in compared.traffic.items():
        assert planned == pytest.approx(compiled, rel=plan_check.TRAFFIC), kind


def rows_of_report() -> list[list[str]]:
    return [line.split("|") for line in REPORT.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def report() -> dict[str, float]:
    """Planned over compiled temporaries, of the steps in the report, which are of jax 0.10."""
    rows = rows_of_report()
    compiled = {row[1].strip(): float(row[4]) * 1e9 for row in rows if row[1].strip() in plan_check.CASES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMPILERS, "cpu", COMPILERS["cpu"]._replace(barriers=False))
        plans = {name: plan_check.planned(plan_check.CASES[name]) for name in compiled}
    return {name: plans[name].temporaries / size for name, size in compiled.items()}


def test_nine_in_ten_temporaries_are_within_15_percent(report: dict[str, float]):
    for some in (report, {name: ratio for name, ratio in report.items() if name.startswith("new: ")}):
        within = [name for name, ratio in some.items() if 0.85 <= ratio <= 1.15]
        assert len(within) >= 0.9 * len(some) >= 9


def test_no_temporaries_are_underestimated(report: dict[str, float]):
    assert report.keys() == plan_check.CASES.keys()
    assert not {name for name, ratio in report.items() if ratio < plan_check.LEAST}


@pytest.mark.slow
@pytest.mark.parametrize("name", plan_check.CASES)
def test_other_steps_hold_and_send_what_is_planned(name: str):
    found = plan_check.compare(plan_check.CASES[name])

    assert set(found.misses()) <= {"temporaries"}


@pytest.mark.parametrize(
    # From train/README.md, in GB: two micro-batches of one sequence of 1,024 tokens. Extrapolated from few layers.
    ("name", "devices", "arguments", "temporaries"),
    [("qlora_1x80gb", 1, 10.9, 3.74), ("lora_1x80gb", 1, 34.6, 3.4), ("full_8x40gb", 8, 8.3, 10.5)],
)
def test_recipes_on_gpus_are_within_15_percent(name: str, devices: int, arguments: float, temporaries: float):
    config = recipe(name, batch=2 * devices, length=1024, fsdp=-1)

    plan = TrainingPlan.of(config, ModelConfig.preset("deepseek_moe_16b"), devices, CARDS["h100"])

    assert plan.arguments / 1e9 == pytest.approx(arguments, rel=0.01)
    assert plan.temporaries / 1e9 == pytest.approx(temporaries, rel=0.15)


@pytest.mark.parametrize("name", plan_check.GPU_CASES)
def test_steps_compiled_for_the_h100_are_within_15_percent(name: str):
    compiled = {row[1].strip(): float(row[2]) for row in rows_of_report() if row[1].strip() in plan_check.GPU_CASES}

    plan = plan_check.planned(plan_check.GPU_CASES[name], "h100")

    assert plan_check.LEAST <= plan.temporaries / 1e9 / compiled[name] <= plan_check.MOST


# --- arithmetic ---


@pytest.mark.parametrize("preset", ["bench", "deepseek_moe_2b"])
def test_the_short_model_has_the_layers_of_the_model(preset: str):
    config = ModelConfig.preset(preset)
    whole = abstract(config)[1]

    specs = abstract(short(config))[1]

    elements = sum(layers_of(config, name) * math.prod(spec.shape) for name, spec in specs.items())
    assert elements == sum(math.prod(spec.shape) for spec in whole.values())


def test_planning_uses_no_device(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise AssertionError("a device was used")

    for name in ("devices", "local_devices", "device_put"):
        monkeypatch.setattr(jax, name, fail)

    plan = TrainingPlan.of(recipe("bench", batch=32, fsdp=8), ModelConfig.preset("bench"), 8, CARDS["h100"])

    assert plan.fits


def test_the_145b_on_4096_devices_is_planned_in_seconds():
    config = recipe("deepseek_moe_145b", batch=8192, data=4, fsdp=128, expert=8)
    started = time.perf_counter()

    plan = TrainingPlan.of(config, config.model_config(), 4096, CARDS["h100"])

    assert time.perf_counter() - started < 3
    assert plan.fits


def test_frozen_weights_are_quantized():
    model, sizes = ModelConfig.preset("bench"), {}
    for scheme in (None, "int8", "nf4"):
        config = dataclasses.replace(recipe("lora_1x80gb", batch=2, fsdp=1), quantize=scheme)
        sizes[scheme] = TrainingPlan.of(config, model, 1, CARDS["h100"]).held["frozen weights"]

    assert sizes["nf4"] < 0.6 * sizes["int8"] < 0.4 * sizes[None]


def test_factored_moments_are_smaller():
    config, model = recipe("bench", batch=16, fsdp=8), ModelConfig.preset("bench")
    factored = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, moments="factored"))

    sizes = [TrainingPlan.of(one, model, 8, CARDS["h100"]).held["optimizer state"] for one in (config, factored)]

    assert sizes[1] < sizes[0] / 8


def test_communication_is_split_between_links_and_network():
    config = recipe("bench", batch=64, data=2, fsdp=16)
    work = TrainingPlan.of(config, ModelConfig.preset("bench"), 32, CARDS["h100"]).work
    traffic = [Traffic("all-gather", ("fsdp",), 16, ""), Traffic("all-reduce", ("data",), 8, "")]

    node, network = split_by_network(work.mesh, CARDS["h100"], traffic)

    assert node == 16 * 7 / 8  # 8 of the 16 devices are in a node
    assert network == 16 / 8 * 8 / 16 + 2 * 8 / 2  # nodes share the gather; the other copy is on another node


# --- collectives in HLO ---

# replica_groups | axes on a mesh of fsdp 2 × expert 2 × tensor 2, devices
GROUPS = {
    "{{0,4},{1,5},{2,6},{3,7}}": (("fsdp",), 2),
    "[4,2]<=[8]": (("tensor",), 2),
    "[4,2]<=[2,2,2]T(2,1,0)": (("fsdp",), 2),
    "[4,2]<=[4,2]T(1,0)": (("expert",), 2),
    "mesh['a'=4,'b'=1,'c'=2] {'a'}": (("fsdp", "expert"), 4),
    "mesh['a'=2,'b'=2,'c'=2] {'b','c'}": (("expert", "tensor"), 4),
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": (("tensor",), 2),
    "mesh['a'=8] {'a':(1)2}": (("fsdp",), 2),
}
HLO = """
%body (p: f32[8]) -> f32[8] {{
  %r = f32[8]{{0}} all-reduce(%p), replica_groups={0}, to_apply=%add
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %w = f32[8]{{0}} while(%p), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %v = f32[8]{{0}} while(%p), condition=%c, body=%body
  %g = ((bf16[4,2]{{1,0}}), bf16[8,2]{{1,0}}) all-gather-start(%p), replica_groups={0}, dimensions={{0}}
  ROOT %s = (f32[4]{{0}}, /*index=1*/f32[2]{{0}}) reduce-scatter(%p), replica_groups={0}, dimensions={{0}}
}}
"""


@pytest.mark.parametrize("groups", GROUPS)
def test_replica_groups_are_mapped_to_mesh_axes(groups: str):
    found = collectives(HLO.format(groups), {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})

    assert {(one.axes, one.ways) for one in found} == {GROUPS[groups]}


def test_loops_count_and_those_of_unknown_length_do_not():
    found = {one.kind: one for one in collectives(HLO.format("[4,2]<=[8]"), {"fsdp": 4, "tensor": 2})}

    assert {kind: (one.bytes, one.count) for kind, one in found.items()} == {
        "all-reduce": (32, 3),
        "all-gather": (32, 1),
        "reduce-scatter": (48, 1),
    }


# --- search ---


def test_search_ranks_what_fits_by_estimated_time():
    config, model = recipe("deepseek_moe_2b", batch=512), ModelConfig.preset("deepseek_moe_2b")

    found = search(config, model, 8, CARDS["a100_40gb"])

    times = [math.prod(plan.speed.step) for plan in found.fitting]
    assert times == sorted(times)
    assert all(plan.fits for plan in found.fitting)
    assert len({flags(plan) for plan in found.fitting}) == len(times) > 3


# --- cards, compiled steps, generation ---


def test_own_figures_replace_those_of_a_card():
    card = card_of("h100", memory=64, tflops=500, bandwidth=None, link=100)

    assert (card.memory, card.flops, card.link) == (64e9, 500e12, 100e9)
    assert card.bandwidth == CARDS["h100"].bandwidth


def test_a_step_is_compiled_beside_its_plan():
    with pytest.raises(DSMoEError, match="16 simulated devices need"):
        compile_plan(TrainingPlan.of(recipe("tiny", batch=32), ModelConfig.preset("tiny"), 16, CARDS["cpu"]), "cpu")


def test_generation_on_a_mesh_needs_less_of_a_device():
    model = ModelConfig.preset("deepseek_moe_16b")

    one = GenerationPlan.of(model, MeshConfig(), 1, CARDS["h100"], batch_size=8)
    eight = GenerationPlan.of(model, MeshConfig(fsdp=1, expert=8), 8, CARDS["h100"], batch_size=8)

    assert eight.memory.weights < one.memory.weights / 4
    assert eight.longest > one.longest > 0
    assert (one.bounds, one.traffic) == (("memory",), ())


def test_decoding_over_fsdp_of_several_nodes_is_bound_by_the_network():
    plan = GenerationPlan.of(ModelConfig.preset("deepseek_moe_16b"), MeshConfig(fsdp=64, expert=1), 64, CARDS["h100"])

    assert plan.bounds == ("network",)
    assert plan.traffic[0].bytes == pytest.approx(32.7e9, rel=0.03)  # all weights, in every step


# --- runs ---


def config_of(batch: int) -> RunConfig:
    data = DataConfig(sequence_length=256, batch_size=batch)
    return RunConfig(output_dir="runs/x", model="tiny", data=data, step=StepConfig(remat="full"))


def test_a_run_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr("dsmoe_jax.plan.check.available_bytes", lambda mesh: int(50e6))

    with pytest.raises(DSMoEError, match=r"the run needs .* per device .*, 50 MB are available: `dsmoe plan … --dev"):
        check_memory(config_of(8), None)

    check_memory(config_of(8), make_mesh(MeshConfig(), jax.devices()[:1]), force=True)
    assert "Starting although the run needs" in caplog.text


def test_a_run_logs_its_plan(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr("dsmoe_jax.plan.check.available_bytes", lambda mesh: None)
    caplog.set_level("INFO")

    check_memory(config_of(8), None)

    assert "Memory plan: " in caplog.text
    assert "(parameters 18 MB, optimizer state 36 MB, temporaries about " in caplog.text


def test_the_command_refuses_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
):
    monkeypatch.setattr("dsmoe_jax.plan.check.available_bytes", lambda mesh: int(1e6))

    flags = ["tiny", "--mesh.fsdp", -1, "--data.batch-size", 64, "--output-dir", tmp_path / "run"]
    assert run("pretrain", *flags) == 2

    error = capsys.readouterr().err
    assert "looks for settings that fit; --force starts regardless" in error
    assert not (tmp_path / "run").exists()
    search = re.search(r"`dsmoe (plan pretrain tiny .+ --device cpu --device-memory 0.001 --search)`", error)
    assert search
    assert run(*search[1].split()) == 1
