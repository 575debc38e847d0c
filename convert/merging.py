"""A checkpoint with an adapter multiplied into its weights: `merge_to`."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.checkpoint.manifest import is_native
from dsmoe_jax.checkpoint.native import load, save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.storage.atomic_dir import check_new_path, staging_path
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.text.generation_config import (
    GENERATION_CONFIG,
    merge_stop_conditions,
    read_generation_config,
    temporary_generation_config,
    with_default_eos,
)

from .exporter import export_hf
from .importer import load_hf, travelling_files
from .peft import merge_adapter

LAYOUTS: Final = ("native", "hf")


def merge_to(
    checkpoint: str | Path, adapter: str | Path, out: str | Path, *, layout: str = "native", dtype: Any = None
) -> str:
    """Write the checkpoint with the adapter merged as the new folder `out`, tokenizer beside it; says what it did.

    The adapter's EOS ids and stop strings are added to those of the generation config.

    `checkpoint` is native or in the Hugging Face layout; `layout` is that of `out`, "native" or "hf". `dtype` casts
    before merging; by default weights keep theirs. The whole model is held in memory. Raises `ValueError` as loading
    and `read_adapter` do, and if `out` exists.
    """
    if layout not in LAYOUTS:
        raise DSMoEError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    checkpoint, out = user_path(checkpoint, "checkpoint"), check_new_path(out)
    between = out.with_name(f".{out.name}.merging")
    with lock_name(out, "merging.lock"):  # `save` and `export_hf` take the other one
        for left in (between, staging_path(between)):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        model = merge_adapter((load if is_native(checkpoint) else load_hf)(checkpoint, dtype=dtype), adapter)
        with _beside(checkpoint, adapter, model.config) as beside:
            if layout == "native":
                save(model, out, extra_files=beside)
                return f"{checkpoint} with {adapter} merged into it: {out}"
            try:
                save(model, between, extra_files=beside)
                export_hf(between, out)
            finally:
                shutil.rmtree(between, ignore_errors=True)
    return f"{checkpoint} with {adapter} merged into it: {out}"


@contextlib.contextmanager
def _beside(checkpoint: Path, adapter: str | Path, config: ModelConfig) -> Iterator[tuple[Path, ...]]:
    """What stands beside the checkpoint's weights, its generation config with the adapter's endings added."""
    files = travelling_files(checkpoint)
    fields = with_default_eos(read_generation_config(checkpoint), config)
    if (endings := merge_stop_conditions(fields, read_generation_config(adapter))) == fields:
        yield files
        return
    with temporary_generation_config(endings) as file:
        yield (*(path for path in files if path.name != GENERATION_CONFIG), *file)
