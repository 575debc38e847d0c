"""Native checkpoints: `config.json`, tokenizer files, parameters and a manifest. Start at `save` and `load_params`.

Writes are atomic. The bytes do not depend on the mesh or the number of processes. The converter writes parameters with
`write_parameters`, then everything else with `finalize`.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsmoe_jax.checkpoint import zarr_io
from dsmoe_jax.checkpoint.manifest import PARAMETERS, Manifest, check_parameters, read_manifest, write_manifest
from dsmoe_jax.checkpoint.zarr_io import DTYPES, ArrayRecord, ArrayWriter
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.kernels.operand import LowRank, Quantized
from dsmoe_jax.model import DeepSeekMoE, abstract, assemble, count_tensors, shardings, split
from dsmoe_jax.progress import Advance
from dsmoe_jax.sharding import MeshConfig, as_mesh
from dsmoe_jax.storage.atomic_dir import StagingDir, atomic_dir, check_new_path, staging_path, sync_tree, write_json
from dsmoe_jax.storage.manifest import find_damage
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json
from dsmoe_jax.text.tokenizer import Tokenizer, tokenizer_files

_SKELETON_UNIT: Final = "frame"  # in journals
# Operands that a native checkpoint cannot hold.
_NOT_SAVED: Final[dict[type, str]] = {
    LowRank: "has an adapter: merge it with `dsmoe_jax.convert.merge_to`, which writes a checkpoint",
    Quantized: "is quantized: load the model without `quantize`",
}


def save(
    model: DeepSeekMoE,
    path: str | Path,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    extra_files: Sequence[str | Path] = (),
) -> None:
    """Save a model as a native checkpoint; atomic, and collective over all processes.

    Args:
        model: The model. Each process gathers, writes and hashes a share of its parameters.
        path: Folder to create, on a file system shared by all processes.
        tokenizer: Tokenizer, or a folder with one, whose files are copied into it.
        extra_files: Other files to copy into it, such as `generation_config.json`.

    Raises:
        DSMoEError: `path` exists, a file to copy does not exist, the model is quantized or has an adapter, or the disk
            is too full.
    """
    path = check_new_path(path)
    params = _dense_params(model)
    files = [*_tokenizer_files(tokenizer), *(user_path(file, "extra_files") for file in extra_files)]
    if missing := next((file for file in files if not file.is_file()), None):
        raise DSMoEError(f"extra_files: {missing} is not a file")
    index, folder = jax.process_index(), staging_path(path)
    records: dict[str, ArrayRecord] = {}
    record_files = [folder / f"records-{i}.json" for i in range(jax.process_count())]
    with collective_errors(), contextlib.ExitStack() as stack:
        with collective_errors():
            if index == 0:
                stack.enter_context(atomic_dir(path, needs=sum(value.nbytes for value in params.values())))
        with collective_errors():
            zarr_io.write_skeleton(folder / PARAMETERS, {name: value.dtype for name, value in params.items()})
        with collective_errors():
            if index == 0:
                zarr_io.strip_timestamps(folder / PARAMETERS)
        with collective_errors() as errors, ArrayWriter(folder / PARAMETERS, records.__setitem__) as writer:
            for i, (name, value) in enumerate(params.items()):
                array = gather_to_host(value)  # collective, so all processes call it even after an error
                if i % jax.process_count() == index and not errors:
                    try:
                        writer.write(name, array.shape, array.dtype, zarr_io.row_chunks(array))
                    except Exception as error:
                        errors.append(error)
        with collective_errors():
            write_json(record_files[index], {name: list(record) for name, record in records.items()})
        with collective_errors():
            if index == 0:
                for file in record_files:
                    records |= {name: ArrayRecord(*fields) for name, fields in read_json(file).items()}
                    file.unlink()
                finalize(folder, model.config, records, files)


def _dense_params(model: DeepSeekMoE) -> dict[str, jax.Array]:
    if not isinstance(model, DeepSeekMoE):
        raise DSMoEError(f"model must be a DeepSeekMoE, got {model!r:.80}")
    params = split(model)[1]
    for name, value in params.items():
        for kind, reason in _NOT_SAVED.items():
            if isinstance(value, kind):
                raise DSMoEError(f"model must have dense weights, but {name} {reason}")
    return params


def _tokenizer_files(tokenizer: Tokenizer | str | Path | None) -> tuple[Path, ...]:
    if tokenizer is None:
        return ()
    files = tokenizer.files if isinstance(tokenizer, Tokenizer) else tokenizer_files(tokenizer)
    if not files:
        raise DSMoEError(f"tokenizer: {tokenizer} has no tokenizer files")
    return files


def load(
    path: str | Path, *, dtype: Any = None, mesh: Mesh | MeshConfig | None = None, verify: bool = True
) -> DeepSeekMoE:
    """Load a native checkpoint, as `dsmoe_jax.load` does."""
    return assemble(
        *load_params(user_path(path, "checkpoint"), dtype=as_dtype(dtype), mesh=as_mesh(mesh), verify=verify)
    )


def load_params(
    path: Path, *, dtype: np.dtype | None, mesh: Mesh | None, verify: bool
) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """Load config and parameters of a native checkpoint, verified first: Orbax does not detect a flipped bit."""
    from orbax.checkpoint import v1 as ocp

    config, _ = open_checkpoint(path, verify=verify)
    parameters = str(path.absolute() / PARAMETERS)
    with _one_line_errors(path):
        stored = dict(ocp.metadata(parameters).metadata)
        shapes = {name: meta.shape for name, meta in stored.items()}
    check_names_and_shapes(path, {name: spec.shape for name, spec in abstract(config)[1].items()}, shapes)
    specs = {
        name: jax.ShapeDtypeStruct(stored[name].shape, dtype or stored[name].dtype, sharding=place)
        for name, place in shardings(config, mesh).items()
    }
    with _one_line_errors(path):
        return config, ocp.load(parameters, specs)


def open_checkpoint(path: Path, *, verify: bool = True) -> tuple[ModelConfig, Manifest]:
    """Read config and manifest of a native checkpoint and, with `verify`, verify all files; collective."""
    manifest = read_manifest(path, verify=verify)
    config = ModelConfig.from_file(path)
    check_tensor_count(path, config, len(manifest.tensors))
    if verify:
        with collective_errors():
            check_parameters(path, manifest, (jax.process_index(), jax.process_count()))
    return config, manifest


class ArraySource(NamedTuple):
    """An array to write: its values in consecutive `chunks` in C order; `note()` is called after the last one."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]
    note: Callable[[], Any] = lambda: None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_parameters(
    staging: StagingDir, parameters: Sequence[ArraySource], advance: Advance
) -> dict[str, ArrayRecord]:
    """Write the arrays that an interrupted run has not written; return their records by name."""
    folder = staging.folder / PARAMETERS
    if _SKELETON_UNIT not in staging.finished:
        for left in staging.folder.glob(f"{PARAMETERS}*"):  # of an interrupted run
            shutil.rmtree(left)
        zarr_io.write_skeleton(folder, {parameter.name: parameter.dtype for parameter in parameters})
        zarr_io.strip_timestamps(folder)
        sync_tree(folder)
        staging.finish(_SKELETON_UNIT, None)
    with ArrayWriter(folder, lambda name, record: staging.finish(name, list(record))) as writer:
        for parameter in parameters:
            if is_written(staging, parameter.name):
                advance(parameter.nbytes)
            else:
                name, shape, dtype, chunks, note = parameter
                writer.write(name, shape, dtype, _metered(chunks(), advance), note)
    return {parameter.name: ArrayRecord(*staging.finished[parameter.name]) for parameter in parameters}


def is_written(staging: StagingDir, name: str) -> bool:
    """Return whether an interrupted run wrote this array completely."""
    if name not in staging.finished:
        return False
    files = ArrayRecord(*staging.finished[name]).files
    return not any(find_damage(staging.folder / PARAMETERS, files, verify=False))


def finalize(
    folder: Path,
    config: ModelConfig,
    records: Mapping[str, ArrayRecord],
    extra_files: Iterable[Path] = (),
    source: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Write all files except for the parameters, the manifest last; return its SHA-256."""
    for file in extra_files:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", config.to_dict())
    return write_manifest(folder, records, source)


def check_tensor_count(source: str | Path, config: ModelConfig, found: int, per_stack: int = 1) -> None:
    """Reject a config with many more tensors than `found`, before allocating per tensor; experts count `per_stack`."""
    expected = count_tensors(config, per_stack)
    if expected > 2 * found + 100:
        raise DSMoEError(f"{source}: config.json asks for {expected:,} tensors, the checkpoint holds {found:,}")


def as_dtype(dtype: Any) -> Any:
    """Return the numpy dtype of a name or type; None stays None."""
    if dtype is None:
        return None
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise DSMoEError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[name]


def check_names_and_shapes(
    source: str | Path, expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]
) -> None:
    """Raise `DSMoEError` unless names and shapes match; the message names the first mismatch and counts the others."""
    missing, surplus = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for what, names in (("is missing", missing), ("is unexpected under this config", surplus)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise DSMoEError(f"{source}: tensor {names[0]} {what}{more}")
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            got = list(found[name])
            raise DSMoEError(f"{source}: tensor {name} has shape {got}, the config asks for {list(shape)}")


@contextlib.contextmanager
def collective_errors() -> Iterator[list[Exception]]:
    """Raise an error of one process, thrown in the block or added to the list, on all processes."""
    errors: list[Exception] = []
    try:
        yield errors
    except Exception as error:
        errors.append(error)
    failed = bool(errors)
    if jax.process_count() > 1:
        failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
    if errors:
        raise errors[0]
    if failed:
        raise DSMoEError("another process failed; see its log")


def gather_to_host(value: jax.Array) -> np.ndarray:
    """Gather an array into host memory; collective."""
    if not value.is_fully_addressable and not value.is_fully_replicated:
        return multihost_utils.process_allgather(value, tiled=True)
    # A new handle: JAX caches the host copy in the handle it was requested from.
    shards = [shard.data for shard in value.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(value.shape, value.sharding, shards))


def _metered(chunks: Iterable[np.ndarray], advance: Advance) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield chunk
        advance(chunk.nbytes)


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Convert errors of Orbax and tensorstore to a one-line `DSMoEError`."""
    try:
        with zarr_io.quiet_orbax():
            yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DSMoEError(f"{path}: damaged: {reason[:300]}") from error
