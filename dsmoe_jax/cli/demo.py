"""`dsmoe demo`: train a small model on Python's standard library, export, import, generate. Start at `run`."""

import contextlib
import dataclasses
import importlib.util
import json
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.cli.streams import print_status
from dsmoe_jax.storage.atomic_dir import check_new_path, write_json
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.storage.paths import user_path

_PROMPTS: Final = ("def get_", "class ", "def __repr__(self):")
_SAMPLING: Final = {"max_new_tokens": 96, "temperature": 0.5, "top_p": 0.95}
# Of preset `tiny`, a size that reads more text in the same time.
_MODEL: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.06,
}
_EVALUATIONS: Final = 6
_TEMPORARY: Final = ("dsmoe demo --out demo", "dsmoe pretrain tiny", "dsmoe info deepseek_moe_16b")
_KEPT: Final = (
    "dsmoe generate {out}/native --prompt 'class ' --temperature 0.5 --max-new-tokens 100 --seed 1",
    "dsmoe plot {out}/run",
    "dsmoe pretrain tiny",
)


def run(out: str | Path | None = None, *, steps: int) -> None:
    """Train, export, import and generate.

    Args:
        out: New folder for checkpoints and plot; None: a temporary one, and the plot in the current folder.
        steps: Training steps.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            _run(Path(folder), steps, plot=Path("dsmoe_demo.png"))
        _suggest(_TEMPORARY)
        return
    out = user_path(out, "out")
    with lock_name(out):
        _run(check_new_path(out), steps, plot=out / "demo.png")
    _suggest([command.format(out=shlex.quote(str(out))) for command in _KEPT])


def _run(folder: Path, steps: int, plot: Path) -> None:
    from dsmoe_jax.convert import export_hf, import_hf
    from dsmoe_jax.generate import Generator
    from dsmoe_jax.info import count_parameters

    config = training_config(folder, steps)
    counts = count_parameters(config.model_config())
    print_status(f"DeepSeekMoE with {counts.total:,} parameters, {counts.activated:,} activated per token")
    native = _train(config, plot)
    hf, imported = folder / "hf", folder / "native"
    with _step("Exporting to the Hugging Face layout"):
        export_hf(native, hf, with_modeling=True)
    with _step("Importing"):
        import_hf(hf, imported)
    before, after = (json.loads((path / "dsmoe_jax.json").read_text())["tensors"] for path in (native, imported))
    assert before == after, "the round trip changed a tensor"
    print_status(f"  {len(after)} tensors, SHA-256 unchanged")
    with _step("Loading and generating"):
        outputs = Generator.from_pretrained(imported)(list(_PROMPTS), **_SAMPLING)
    for prompt, output in zip(_PROMPTS, outputs, strict=True):
        whole_lines = output.text.rpartition("\n")[0] or output.text
        print_status(f"\n--- completion of {prompt!r}\n{prompt}{whole_lines.rstrip()}")
    tokens = config.steps * config.data.batch_size * config.data.sequence_length
    trained = f"{counts.total / 1e6:.1f}M parameters trained on {tokens / 1e6:.1f}M tokens"
    print_status(f"\n{trained}, temperature {_SAMPLING['temperature']}: expect Python's syntax and style, not meaning.")


def training_config(folder: Path, steps: int) -> Any:
    """Return the `RunConfig` of a run of `steps` steps in `folder`; the model's config is written there."""
    from dsmoe_jax.config import PRESETS, ModelConfig
    from dsmoe_jax.train.config import CheckpointConfig, DataConfig
    from dsmoe_jax.train.recipes import tiny

    recipe, model = dataclasses.replace(tiny(), steps=steps), folder / "model.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(model, ModelConfig(**PRESETS["tiny"] | _MODEL).to_dict())
    return dataclasses.replace(
        recipe,
        output_dir=str(folder / "run"),
        model=str(model),
        data=DataConfig(sequence_length=128, batch_size=8, val_fraction=0.03),
        optimizer=dataclasses.replace(
            recipe.optimizer, learning_rate=5e-3, warmup_steps=min(100, steps), min_lr_ratio=0.0
        ),
        checkpoint=CheckpointConfig(interval=steps),
        log_interval=max(1, steps // 10),
        eval_interval=-(-steps // _EVALUATIONS),
        eval_batches=16,
        trackers=("console", "jsonl"),
    )


def _train(config: Any, plot: Path) -> Path:
    """Train, report loss and expert load, plot them if matplotlib is installed, and return the checkpoint."""
    from dsmoe_jax.train.loop import run as train
    from dsmoe_jax.train.metrics import read_records

    started = time.perf_counter()
    result = train(config)
    last = [record for record in read_records(config.output_dir) if "loss" in record][-1]
    validation = "" if result.eval_loss is None else f", eval/loss {result.eval_loss:.4f}"
    seconds = time.perf_counter() - started
    print_status(f"Trained {result.steps} steps in {seconds:.0f} s: loss {result.loss:.4f}{validation}")
    print_status(f"  Expert load: max/mean {last['load_imbalance']:.1f}, {last['unused_experts']} unused")
    if importlib.util.find_spec("matplotlib") is None:
        print_status("  No plot: pip install 'dsmoe_jax[demo]'")
    else:
        from dsmoe_jax.train.plotting import draw

        draw(config.output_dir, plot)
        print_status(f"  Saved plot: {plot}")
    assert result.model is not None
    return result.model


def _suggest(commands: Sequence[str]) -> None:
    print_status("\nTry next:")
    for command in commands:
        print_status(f"  {command}")


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    print_status(f"{what} …", end="")
    started = time.perf_counter()
    yield
    print_status(f" {time.perf_counter() - started:.1f} s")
