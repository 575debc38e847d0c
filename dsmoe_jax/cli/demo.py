"""`dsmoe demo`: train a small model on Python's standard library, export, import and generate.

Needs no network and no weights. Start at `run`.
"""

import contextlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dsmoe_jax.cli.streams import print_status
from dsmoe_jax.storage.atomic_dir import check_new_path
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.storage.paths import user_path

_PROMPT: Final = "def __init__(self, "


def run(out: str | Path | None = None, *, steps: int = 150) -> None:
    """Train, export, import and generate, printing a line per step.

    Args:
        out: New folder for checkpoints and plot; default: a temporary one.
        steps: Training steps.

    Raises:
        DSMoEError: `out` exists.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            _run(Path(folder), steps, plot=Path("dsmoe_demo.png"))
        return
    out = user_path(out, "out")
    with lock_name(out):
        _run(check_new_path(out), steps, plot=out / "demo.png")


def _run(folder: Path, steps: int, plot: Path) -> None:
    from dsmoe_jax.convert import export_hf, import_hf
    from dsmoe_jax.generate import Generator
    from dsmoe_jax.info import count_parameters

    config = training_config(folder, steps)
    counts = count_parameters(config.model_config())
    print_status(f"{counts.total:,} parameters, {counts.activated:,} activated per token")
    native = _train(config, plot)
    hf, imported = folder / "hf", folder / "native"
    with _step("Exporting to the Hugging Face layout"):
        export_hf(native, hf)
    with _step("Importing"):
        import_hf(hf, imported)
    assert _tensors(imported) == _tensors(native), "the round trip changed a tensor"
    print_status(f"  {len(_tensors(native))} tensors, SHA-256 unchanged")
    with _step("Loading"):
        generator = Generator.from_pretrained(imported)
    pieces = generator.stream(_PROMPT, max_new_tokens=64, temperature=0.7, top_p=0.9)
    print_status(f"\n{_PROMPT}{next(pieces, '')}", end="")
    for piece in pieces:
        print_status(piece, end="")
    print_status("\n\nA minute of training teaches syntax, not meaning.")


def training_config(folder: Path, steps: int):
    """Return the `RunConfig` of recipe `tiny` with `steps` steps and twice the learning rate."""
    import dataclasses

    from dsmoe_jax.train.recipes import tiny

    recipe = tiny()
    return dataclasses.replace(
        recipe,
        output_dir=str(folder / "run"),
        steps=steps,
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=2e-3, warmup_steps=min(20, steps)),
        log_interval=max(1, steps // 10),
        eval_interval=steps,
        trackers=("console", "jsonl"),
    )


def _train(config, plot: Path) -> Path:
    """Train and report loss and expert load; plot them if matplotlib is installed. Returns the model."""
    from dsmoe_jax.train.loop import run as train
    from dsmoe_jax.train.metrics import read_records

    started = time.perf_counter()
    result = train(config)
    records = [record for record in read_records(config.output_dir) if "loss" in record]
    first, last = records[0], records[-1]
    validation = "" if result.eval_loss is None else f", eval/loss {result.eval_loss:.2f}"
    print_status(
        f"Trained {result.steps} steps in {time.perf_counter() - started:.0f} s: loss {first['loss']:.2f} to "
        f"{last['loss']:.2f}{validation}"
    )
    busiest, unused = last["load_imbalance"], last["unused_experts"]
    print_status(f"  Expert load: max/mean {busiest:.1f}, {unused} unused")
    if importlib.util.find_spec("matplotlib") is None:
        print_status("  No plot: pip install 'dsmoe_jax[demo]'")
    else:
        from dsmoe_jax.train.plotting import draw

        draw(Path(config.output_dir), plot)
        print_status(f"  Saved plot: {plot}")
    assert result.model is not None
    return result.model


def _tensors(native: Path) -> dict[str, dict]:
    return json.loads((native / "dsmoe_jax.json").read_text())["tensors"]


@contextlib.contextmanager
def _step(what: str) -> Iterator[None]:
    print_status(f"{what} …", end="")
    started = time.perf_counter()
    yield
    print_status(f" {time.perf_counter() - started:.1f} s")
