"""A checkpoint with an adapter multiplied into its weights: `merge_to`."""

import shutil
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.checkpoint import load, save
from dsmoe_jax.locks import lock_name
from dsmoe_jax.manifest import is_native
from dsmoe_jax.new_folder import refuse_existing, sibling

from .exporter import export_hf
from .importer import load_hf, travelling_files
from .peft import merge_adapter

LAYOUTS: Final = ("native", "hf")


def merge_to(
    checkpoint: str | Path, adapter: str | Path, out: str | Path, *, layout: str = "native", dtype: Any = None
) -> str:
    """Write the checkpoint with the adapter merged as the new folder `out`, tokenizer beside it; says what it did.

    `checkpoint` is native or in the Hugging Face layout; `layout` is that of `out`, "native" or "hf". `dtype` casts
    before merging; by default weights keep theirs. The whole model is held in memory. Raises `ValueError` as loading
    and `read_adapter` do, and if `out` exists.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    checkpoint, out = Path(checkpoint), refuse_existing(out)
    between = out.with_name(f".{out.name}.merging")
    with lock_name(out, "merging.lock"):  # `save` and `export_hf` take the other one
        for left in (between, sibling(between)):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        model = merge_adapter((load if is_native(checkpoint) else load_hf)(checkpoint, dtype=dtype), adapter)
        beside = travelling_files(checkpoint)
        if layout == "native":
            save(model, out, beside=beside)
        else:
            try:
                save(model, between, beside=beside)
                export_hf(between, out)
            finally:
                shutil.rmtree(between, ignore_errors=True)
    return f"{checkpoint} with {adapter} merged into it: {out}"
