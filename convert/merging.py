"""Merge an adapter into a checkpoint's weights: `merge_to`."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from dsmoe_jax.checkpoint.native import save
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import check_choice
from dsmoe_jax.model import assemble
from dsmoe_jax.storage.atomic_dir import check_new_path, check_outside, staging_path
from dsmoe_jax.storage.locks import lock_name
from dsmoe_jax.text import generation_config

from .exporter import export_hf
from .hub import resolve
from .importer import extra_files
from .peft import merge_adapter
from .sources import load_params

LAYOUTS: Final = ("native", "hf")


def merge_to(
    checkpoint: str | Path,
    adapter: str | Path,
    output_dir: str | Path,
    *,
    layout: str = "native",
    dtype: Any = None,
    revision: str | None = None,
) -> str:
    """Write a checkpoint with an adapter merged into its weights.

    The model must fit in memory. The adapter's EOS ids and stop strings are added to the generation config.

    Args:
        checkpoint: Native checkpoint, Hugging Face folder or hub id.
        adapter: Folder of a PEFT adapter.
        output_dir: New checkpoint.
        layout: Layout of `output_dir`, "native" or "hf".
        dtype: "float32", "bfloat16" or "float16" to cast before merging; default: the stored dtypes.
        revision: Branch, tag or commit of a hub id; default: `main`.

    Returns:
        A one-line summary.

    Raises:
        DSMoEError: `output_dir` exists, or the checkpoint or adapter is invalid.
    """
    check_choice("layout", layout, LAYOUTS)
    output_dir, folder = check_new_path(output_dir), resolve(checkpoint, revision, name="checkpoint")
    check_outside(output_dir, folder)
    scratch = output_dir.with_name(f".{output_dir.name}.merging")
    native = output_dir if layout == "native" else scratch
    with lock_name(output_dir, "merging.lock"):  # `save` and `export_hf` take the other lock
        for leftover in (scratch, staging_path(scratch)):  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        model = merge_adapter(assemble(*load_params(folder, dtype=dtype)), adapter)
        try:
            with _merged_files(folder, adapter, model.config) as files:
                save(model, native, extra_files=files)
            if layout == "hf":
                export_hf(native, output_dir)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return f"Merged {adapter} into {checkpoint}: {output_dir}"


@contextlib.contextmanager
def _merged_files(checkpoint: Path, adapter: str | Path, config: ModelConfig) -> Iterator[tuple[Path, ...]]:
    """Yield the checkpoint's extra files with the adapter's stop conditions in the generation config."""
    files = extra_files(checkpoint)
    fields, added = map(generation_config.read_generation_config, (checkpoint, adapter))
    fields = generation_config.with_default_eos(fields, config)
    if (merged := generation_config.merge_stop_conditions(fields, added)) == fields:
        yield files
        return
    with generation_config.temporary_generation_config(merged) as file:
        yield (*(path for path in files if path.name != generation_config.GENERATION_CONFIG), *file)
