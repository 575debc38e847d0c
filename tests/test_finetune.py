"""Fine-tuning runs of a very small model: training, output, resuming, invalid requests.

Start at `test_a_run_trains_an_adapter_and_not_the_base`.
"""

import dataclasses
import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsmoe_jax
from dsmoe_jax import Generator, lora
from dsmoe_jax.cli import main
from dsmoe_jax.convert import export_hf, import_hf, merge_to
from dsmoe_jax.convert.peft import WEIGHTS, read_adapter, write_adapter
from dsmoe_jax.convert.peft_matching import make_plan
from dsmoe_jax.lora import LoraConfig
from dsmoe_jax.model import DeepSeekMoE, abstract, split
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.text.tokenizer import tokenizer_files
from dsmoe_jax.text.train_tokenizer import train_tokenizer
from dsmoe_jax.train import loop
from dsmoe_jax.train.batch import Batch
from dsmoe_jax.train.config import CheckpointConfig
from dsmoe_jax.train.finetune import ExamplesConfig, FinetuneConfig, finetuning
from dsmoe_jax.train.flags import parse_finetuning
from dsmoe_jax.train.loop import run
from dsmoe_jax.train.loss import chunked_cross_entropy
from dsmoe_jax.train.optimizer import OptimizerConfig
from dsmoe_jax.train.recipes import FINETUNING
from dsmoe_jax.train.sft import ExamplePacking, Examples, write_examples
from tests.helpers.hf_folder import flip_bit, tiny
from tests.helpers.runs import losses

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("on_one_device")]

VOCABULARY = 300
MODEL = tiny(vocab_size=VOCABULARY, initializer_range=0.2)
LORA = LoraConfig(r=4, lora_alpha=8)
PACKED = 1e-6  # relative


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its tokenizer, and examples."""
    home, rng = tmp_path_factory.mktemp("finetune"), random.Random(0)
    rows = []
    for _ in range(120):
        digits = rng.choices("0123456789", k=rng.randint(2, 6))
        rows.append({"instruction": "Reverse: " + " ".join(digits), "output": " ".join(reversed(digits))})
    (home / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"User: {row['instruction']}\n\nAssistant: {row['output']}" for row in rows]
    train_tokenizer(texts * 3, home / "tokenizer", VOCABULARY)
    # Logits as large as those of a trained model: adapters do not change the head.
    model = DeepSeekMoE.init(MODEL, seed=1)
    dsmoe_jax.save(model, home / "base", extra_files=tokenizer_files(home / "tokenizer"))
    return home


def config(home: Path, out: Path, **changes: Any) -> FinetuneConfig:
    fields: dict[str, Any] = {
        "output_dir": str(out),
        "init_from": str(home / "base"),
        "steps": 12,
        "data": ExamplesConfig(
            files=(str(home / "examples.jsonl"),), sequence_length=64, batch_size=8, val_fraction=0.1
        ),
        "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2, weight_decay=0.0),
        "checkpoint": CheckpointConfig(interval=100),
        "eval_interval": 6,
        "eval_batches": 2,
        "trackers": ("jsonl",),
        "lora": LORA,
    }
    return FinetuneConfig(**(fields | changes))


def stop_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Simulate a signal during the step: shorter runs, of other `steps`, would compile another schedule."""
    patch.setattr(loop, "_should_stop", lambda stop, n, every: n == step)


def weights(adapter: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(adapter / WEIGHTS)


# --- stop conditions of the result ---


@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "model"])
def test_a_result_stops_where_its_template_ends(home: Path, tmp_path: Path, adapted: bool):
    changes = {"lora": LORA if adapted else None}
    made = config(home, tmp_path / "out", **changes)
    data = dataclasses.replace(made.data, template="deepseek-instruct", sequence_length=512)
    job = finetuning(dataclasses.replace(made, data=data), tmp_path / "out")
    job.save(tmp_path / "result", job.init_params(None, job.load_frozen(None)))

    if adapted:
        merge_to(home / "base", tmp_path / "result", tmp_path / "merged")
        merge_to(home / "base", tmp_path / "result", tmp_path / "exported", layout="hf")
        found = [Generator.from_pretrained(home / "base", adapter=tmp_path / "result")]
    else:
        export_hf(tmp_path / "result", tmp_path / "exported")
        import_hf(tmp_path / "exported", tmp_path / "merged")
        found = [Generator.from_pretrained(tmp_path / "result")]
    found += [Generator.from_pretrained(tmp_path / name) for name in ("merged", "exported")]

    assert [generator.stop_strings for generator in found] == [("<|EOT|>",)] * 3
    assert [generator.eos_token_ids for generator in found] == [{MODEL.eos_token_id}] * 3


def test_an_eos_template_adds_no_generation_config(home: Path, tmp_path: Path):
    job = finetuning(config(home, tmp_path / "out"), tmp_path / "out")

    job.save(tmp_path / "result", job.init_params(None, job.load_frozen(None)))

    assert not (tmp_path / "result" / "generation_config.json").exists()


# --- runs ---


@pytest.mark.parametrize(
    "quantize", ["int8", *(pytest.param(other, marks=pytest.mark.slow) for other in (None, "nf4"))]
)
def test_a_run_trains_an_adapter_and_not_the_base(home: Path, tmp_path: Path, quantize: str | None):
    before = split(dsmoe_jax.load(home / "base"))[1]
    settings = config(home, tmp_path / "out", quantize=quantize)
    data = dataclasses.replace(settings.data, val_fraction=0.0)  # validation is a second program to compile

    result = run(dataclasses.replace(settings, data=data))

    found = losses(tmp_path / "out")
    assert found[12] < 0.8 * found[1]
    assert result.model == tmp_path / "out" / "adapter"
    adapter = read_adapter(tmp_path / "out" / "adapter", MODEL)
    assert adapter.config == dataclasses.replace(LORA, target_modules=adapter.config.target_modules)
    assert all(np.abs(value).max() > 0 for name, value in adapter.params.items() if name.endswith(lora.LORA_B))
    after = split(dsmoe_jax.load(home / "base"))[1]
    assert all((before[name] == after[name]).all() for name in before)


def test_only_adapters_have_state_and_moments(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []
    original = loop.make_step

    def noting(*arguments: Any, **options: Any):
        step = original(*arguments, **options)

        def noted(state: Any, *others: Any):
            seen.append(jax.tree.map(jnp.shape, state))
            return step(state, *others)

        return noted

    monkeypatch.setattr(loop, "make_step", noting)

    run(config(home, tmp_path / "out"))

    state = seen[0]
    plan = read_adapter(tmp_path / "out" / "adapter", MODEL).plan
    wanted = set(lora.specs(plan, MODEL))
    assert set(state.params) == wanted
    is_shape = lambda leaf: isinstance(leaf, tuple) and all(isinstance(size, int) for size in leaf)  # noqa: E731
    moments = sum(math.prod(shape) for shape in jax.tree.leaves(state.opt_state, is_leaf=is_shape) if shape)
    trained = sum(math.prod(shape) for shape in state.params.values())
    assert moments == 2 * trained


def test_a_full_run_leaves_a_checkpoint_that_generates(home: Path, tmp_path: Path):
    result = run(config(home, tmp_path / "out", lora=None))

    assert losses(tmp_path / "out")[12] < 0.8 * losses(tmp_path / "out")[1]
    assert result.model == tmp_path / "out" / "model"
    answer = Generator.from_pretrained(tmp_path / "out" / "model")(
        ["User: Reverse: 1 2\n\nAssistant:"], max_new_tokens=4
    )[0]
    assert len(answer.token_ids) >= 1
    assert not (tmp_path / "out" / "best").exists()


@pytest.mark.slow
def test_epochs_decide_how_many_steps_there_are(home: Path, tmp_path: Path):
    data = config(home, tmp_path).data
    alone = dataclasses.replace(data, packing="none", batch_size=16)

    result = run(config(home, tmp_path / "out", steps=0, epochs=1.5, data=alone))

    (folder,) = (tmp_path / "out" / "examples").iterdir()
    rows = len(Examples.open(folder))
    assert result.steps == result.total_steps == -(-int(np.ceil(1.5 * rows)) // 16)


def test_the_best_adapter_is_kept(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    eval_losses = iter([5.0, 3.0, 2.0, 4.0, 2.5])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *_: (next(eval_losses), 1))

    with monkeypatch.context() as patch:
        stop_at(9, patch)
        run(config(home, tmp_path / "out", eval_interval=3))  # 5 at step 1, then 3, 2, 4
    best = weights(tmp_path / "out" / "best")
    run(config(home, tmp_path / "out", eval_interval=3))  # 2.5 after a restart

    last = weights(tmp_path / "out" / "adapter")
    record = json.loads((tmp_path / "out" / "best" / "evaluation.json").read_text())
    assert (record["step"], record["loss"]) == (6, 2.0)
    assert WEIGHTS in record["files"]
    assert all((best[name] == value).all() for name, value in weights(tmp_path / "out" / "best").items())
    assert any((best[name] != value).any() for name, value in last.items())
    assert read_adapter(tmp_path / "out" / "best", MODEL).config.r == 4


@pytest.mark.slow
def test_a_damaged_best_is_named_and_replaced(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    eval_losses = iter([5.0, 2.0, 3.0])
    monkeypatch.setattr(loop, "evaluation_loss", lambda *_: (next(eval_losses), 1))
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        run(config(home, tmp_path / "out"))
    flip_bit(tmp_path / "out" / "best" / WEIGHTS, -1)
    with pytest.raises(ValueError, match=f"best: damaged: {WEIGHTS!r} does not match its SHA-256"):
        read_adapter(tmp_path / "out" / "best", MODEL)

    run(config(home, tmp_path / "out"))

    best, last = weights(tmp_path / "out" / "best"), weights(tmp_path / "out" / "adapter")
    assert f"best: damaged: {WEIGHTS!r} does not match its SHA-256; it will be replaced at" in caplog.text
    assert json.loads((tmp_path / "out" / "best" / "evaluation.json").read_text())["loss"] == 3.0
    assert best.keys() == last.keys()


@pytest.mark.slow
def test_a_run_stopped_ten_times_equals_an_undisturbed_one(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dropping = dataclasses.replace(LORA, lora_dropout=0.2)
    run(config(home, tmp_path / "uninterrupted", lora=dropping))
    place = loop.place

    def stopping(batch: Batch, mesh: Any) -> Batch:
        os.kill(os.getpid(), signal.SIGTERM)
        return place(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "place", stopping)
        for n in range(1, 11):
            result = run(config(home, tmp_path / "out", lora=dropping, eval_interval=100))
            assert (result.steps, result.stopped) == (n, True)
    run(config(home, tmp_path / "out", lora=dropping))

    assert losses(tmp_path / "out") == losses(tmp_path / "uninterrupted")
    one, other = (weights(tmp_path / name / "adapter") for name in ("uninterrupted", "out"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.slow
def test_adapters_on_a_mesh_learn_as_on_one_device(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(config(home, tmp_path / "one", steps=4))
    monkeypatch.undo()
    run(config(home, tmp_path / "mesh", steps=4, mesh=MeshConfig(fsdp=2, expert=4)))

    one, mesh = losses(tmp_path / "one"), losses(tmp_path / "mesh")
    assert one == pytest.approx(mesh, rel=1e-4)


@pytest.mark.slow
def test_modules_to_save_are_trained(home: Path, tmp_path: Path):
    adapter = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))

    run(config(home, tmp_path / "out", lora=adapter, steps=3))

    adapter = read_adapter(tmp_path / "out" / "adapter", MODEL)
    base = split(dsmoe_jax.load(home / "base"))[1]
    assert adapter.plan.saved == ("embed", "head.weight")
    assert all(np.abs(adapter.params[name] - base[name]).max() > 1e-4 for name in adapter.plan.saved)


def test_a_non_finite_loss_stops_the_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        run(config(home, tmp_path / "out"))
    kept = weights(tmp_path / "out" / "best")
    broken = loop.make_step

    def poisoned(*arguments: Any, **options: Any):
        step = broken(*arguments, **options)
        return lambda state, batch, frozen: step(state, batch, jax.tree.map(lambda leaf: leaf * jnp.nan, frozen))

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", poisoned)
        line = r"^4 consecutive updates skipped at step 10: loss nan, .* are intact$"
        with pytest.raises(ValueError, match=line):
            run(config(home, tmp_path / "out", max_consecutive_skips=3))

    again = weights(tmp_path / "out" / "best")
    assert all((kept[name] == again[name]).all() for name in kept)
    assert run(config(home, tmp_path / "out")).steps == 12


@pytest.mark.slow
def test_a_zero_loss_stops_the_run(home: Path, tmp_path: Path):
    (tmp_path / "same.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    data = dataclasses.replace(config(home, tmp_path).data, files=(str(tmp_path / "same.jsonl"),), val_fraction=0.0)
    fast = OptimizerConfig(learning_rate=0.3, schedule="constant", warmup_steps=0, weight_decay=0.0)

    with pytest.raises(ValueError, match=r"^loss 0 for 4 steps at step \d+: "):
        run(config(home, tmp_path / "out", data=data, lora=None, optimizer=fast, steps=200, max_consecutive_skips=3))


def test_only_equal_runs_share_a_compiled_step(home: Path, tmp_path: Path):
    def step(adapter: LoraConfig) -> Any:
        settings = config(home, tmp_path / "out", lora=adapter)
        job, (optimizer, schedule) = finetuning(settings, tmp_path / "out"), loop.make_optimizer(settings.optimizer, 12)
        graph = abstract(job.model)[0]
        return loop.make_step(job.model, graph, optimizer, schedule, settings.step, trainable=job.trainable)

    first = step(LORA)

    assert step(LORA) is first
    for change in ({"lora_alpha": 16}, {"use_rslora": True}, {"lora_dropout": 0.1}, {"target_modules": ("q_proj",)}):
        assert step(dataclasses.replace(LORA, **change)) is not first


# --- losses ---


@pytest.mark.slow
def test_packed_examples_have_the_losses_they_have_alone(home: Path, tmp_path: Path):
    write_examples(home / "examples.jsonl", home / "base", tmp_path / "examples", sequence_length=64)
    examples = Examples.open(tmp_path / "examples")
    model = dsmoe_jax.load(home / "base")

    def total(mode: str) -> tuple[float, int]:
        packing = ExamplePacking(examples, sequence_length=64, seed=0, packing=mode)
        batch = Batch(*map(jnp.asarray, np.stack([packing.sequence(n) for n in packing.sequences_of(0)], axis=1)))
        hidden = model.hidden(batch.token_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids)
        head = split(model)[1]["head.weight"]
        return float(chunked_cross_entropy(hidden.last_hidden_state, head, batch.labels).cross_entropy), len(
            batch.labels
        )

    (packed, rows), (alone, examples_alone) = total("best_fit"), total("none")

    assert rows < examples_alone / 2
    assert packed == pytest.approx(alone, rel=PACKED)


def test_masked_tokens_give_no_gradient(home: Path, tmp_path: Path):
    write_examples(home / "examples.jsonl", home / "base", tmp_path / "examples", sequence_length=64)
    row = ExamplePacking(Examples.open(tmp_path / "examples"), sequence_length=64, seed=0).sequence(0)
    labels = jnp.asarray(row[1][None])
    states = jax.random.normal(jax.random.key(0), (1, 64, 32))
    head = jax.random.normal(jax.random.key(1), (VOCABULARY, 32))

    grads = jax.grad(lambda states: chunked_cross_entropy(states, head, labels).total)(states)

    learnt = jnp.abs(grads[0]).max(axis=-1) > 0
    assert (learnt == (labels[0] != -100)).all()
    assert 0 < learnt.sum() < 64


# --- command line ---


@pytest.mark.slow
def test_finetune_merge_and_generate_from_the_command_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base, out = str(home / "base"), str(tmp_path / "run")
    flags = [
        "--data",
        str(home / "examples.jsonl"),
        "--recipe",
        "tiny",
        "--lora.r",
        "4",
        "--steps",
        "2",
        "--output-dir",
        out,
    ]
    small = ["--data.sequence-length", "64", "--data.batch-size", "8", "--trackers", "jsonl"]

    assert main(["finetune", base, *flags, *small]) == 0
    assert main(["merge", base, f"{out}/adapter", str(tmp_path / "merged")]) == 0
    assert main(["merge", base, f"{out}/adapter", str(tmp_path / "hf"), "--layout", "hf"]) == 0
    capsys.readouterr()
    printed = []
    for path, adapter in ((base, ["--adapter", f"{out}/adapter"]), (tmp_path / "merged", []), (tmp_path / "hf", [])):
        assert main(["generate", str(path), *adapter, "--prompt", "User: Reverse", "--max-new-tokens", "8"]) == 0
        printed.append(capsys.readouterr().out)

    assert printed[0] == printed[1] == printed[2]


def test_show_prints_examples_and_trains_nothing(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"

    assert (
        main(
            [
                "finetune",
                str(home / "base"),
                "--data",
                str(home / "examples.jsonl"),
                "--show",
                "3",
                "--output-dir",
                str(out),
            ]
        )
        == 0
    )

    printed = capsys.readouterr().out
    assert printed.count("Reverse: ") == 3
    assert not out.exists()


def test_every_recipe_is_a_run_and_its_flags_change_it():
    for name in FINETUNING:
        recipe, shown = parse_finetuning(["base", "--recipe", name, "--data", "a.jsonl", "b.jsonl", "--show", "2"])
        assert recipe.data.files == ("a.jsonl", "b.jsonl")
        assert (recipe.init_from, shown) == ("base", 2)
        assert recipe == dataclasses.replace(FINETUNING[name](), recipe=name, init_from="base", data=recipe.data)
    assert parse_finetuning(["base", "--lora"])[0].lora == LoraConfig()
    flags = ["--lora.target-modules", "q_proj", "down_proj", "--lora.rank-pattern", "q_proj", "3", "--quantize", "nf4"]
    recipe = parse_finetuning(["base", *flags])[0]
    assert recipe.lora == LoraConfig(target_modules=("q_proj", "down_proj"), rank_pattern={"q_proj": 3})
    assert recipe.quantize == "nf4"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "data.files is empty: pass --data FILE"),
        (["--quantize", "nf4"], "quantize nf4 requires --lora: quantized weights cannot be trained"),
        (["--lora.r", "4", "--step.scan-layers"], "--step.scan-layers cannot be used with --lora: it would copy the"),
        (["--lora", "--quantize", "int3"], "--quantize"),
        (["--recipe", "huge"], "recipe must be one of full, full_8x40gb, lora_1x80gb, qlora_1x80gb, tiny, got 'huge'"),
        (["--lora.r", "0"], "r must be an integer of at least 1, got 0"),
        (["--lora.target-modules", "qproj"], "'qproj' matches no module of this model"),
        (["--lora.target-modules", "gate"], "down_proj, got model.layers.1.mlp.gate"),
        (["--epochs", "0"], "epochs must be more than 0, got 0.0"),
        (["--show", "x"], "--show must be an integer, got 'x'"),
        (["--ranks", "3"], "unknown flag --ranks"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_invalid_requests_are_one_line(
    home: Path, tmp_path: Path, flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    data = [] if line.startswith("data.files") else ["--data", str(home / "examples.jsonl")]
    base = ["finetune", str(home / "base"), "--output-dir", str(tmp_path / "out")]

    assert main([*base, *data, *flags]) == 2

    printed = capsys.readouterr().err
    assert line in printed.splitlines()[-1]
    assert "Traceback" not in printed


def test_resuming_with_another_adapter_or_base_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        run(config(home, tmp_path / "out"))
    other = dataclasses.replace(LORA, lora_alpha=16)

    with pytest.raises(
        ValueError, match=r"from step 1: lora.lora_alpha is 8 in the checkpoint, 16 in this run; choose"
    ):
        run(config(home, tmp_path / "out", lora=other))
    with pytest.raises(
        ValueError, match=r"from step 1: quantize is None in the checkpoint, 'int8' in this run; choose"
    ):
        run(config(home, tmp_path / "out", quantize="int8"))


def test_an_adapter_of_another_base_is_refused(home: Path, tmp_path: Path):
    other = dataclasses.replace(MODEL, hidden_size=64)
    config = LoraConfig(r=2, target_modules=("q_proj",))
    plan = make_plan(config, other)
    params = {name: np.zeros(spec.shape, np.float32) for name, spec in lora.specs(plan, other).items()}
    write_adapter(tmp_path / "adapter", config, other, params)

    with pytest.raises(ValueError, match=r"must have shape \[2, 32\], got \[2, 64\]$"):
        Generator.from_pretrained(home / "base", adapter=tmp_path / "adapter")
