"""`dsmoe demo`: a small model learns Python from Python's own sources, goes to the Hugging Face layout and back.

No network and no weights are needed. Start at `run`.
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
    """Train, export, import and generate, with a line for each step; all of it stays in `out` if it is given.

    Raises `ValueError` if `out` exists.
    """
    if out is None:
        with tempfile.TemporaryDirectory() as folder:
            _run(Path(folder), steps, kept=False)
        return
    out = user_path(out, "out")
    with lock_name(out):
        _run(check_new_path(out), steps, kept=True)


def _run(folder: Path, steps: int, kept: bool) -> None:
    from dsmoe_jax.convert import export_hf, import_hf
    from dsmoe_jax.generate import Generator
    from dsmoe_jax.info import count_parameters

    config = training_config(folder, steps)
    counts = count_parameters(config.model_config())
    print_status(f"{counts.total:,} parameters, {counts.activated:,} activated per token, random at first")
    native = _train(config, folder / "demo.png" if kept else Path("dsmoe_demo.png"))
    hf, again = folder / "hf", folder / "native"
    with _step("export to the Hugging Face layout"):
        export_hf(native, hf)
    with _step("import it again"):
        import_hf(hf, again)
    if _tensors(again) != _tensors(native):
        raise AssertionError("the round trip changed a tensor")
    print_status(f"  {len(_tensors(native))} tensors, every one with the SHA-256 it had")
    with _step("load"):
        generator = Generator.from_pretrained(again)
    pieces = generator.stream(_PROMPT, max_new_tokens=64, temperature=0.7, top_p=0.9)
    print_status(f"\n{_PROMPT}{next(pieces, '')}", end="")
    for piece in pieces:
        print_status(piece, end="")
    print_status("\n\nA minute of training shows the grammar, not yet the sense.")


def training_config(folder: Path, steps: int):
    """The recipe `tiny`, cut to `steps` steps at twice its learning rate; returns its `RunConfig`."""
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


def _train(config, picture: Path) -> Path:
    """Train; say how the loss fell and how the experts share the work; draw it where matplotlib is."""
    from dsmoe_jax.train.loop import run as train
    from dsmoe_jax.train.metrics import read_records

    started = time.perf_counter()
    result = train(config)
    records = [record for record in read_records(config.output_dir) if "loss" in record]
    first, last = records[0], records[-1]
    print_status(
        f"trained {result.steps} steps in {time.perf_counter() - started:.0f} s: loss {first['loss']:.2f} to "
        f"{last['loss']:.2f}, {result.eval_loss:.2f} on held-out files"
    )
    busiest, unused = last["load_imbalance"], last["unused_experts"]
    print_status(f"  the busiest expert has {busiest:.1f} times the mean load, {unused} are unused")
    if importlib.util.find_spec("matplotlib") is None:
        print_status("  no picture: pip install 'dsmoe_jax[demo]'")
    else:
        from dsmoe_jax.train.plotting import draw

        draw(Path(config.output_dir), picture)
        print_status(f"  loss and load of the experts: {picture}")
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
