"""Native checkpoints: a folder with `config.json`, the tokenizer's files, the parameters and a manifest of all bytes.

Start at `save` and `load`. A checkpoint appears under its name only when it is complete, and does not depend on the
mesh or the number of processes that saved it. `write_parameters` and `finalize` are its writing in two steps, for those
whose parameters come from elsewhere.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsmoe_jax.checkpoint.manifest import PARAMETERS, Manifest, damage, read_manifest, write_manifest
from dsmoe_jax.checkpoint.zarr_io import (
    ArrayRecord,
    ArrayWriter,
    quiet_orbax,
    row_chunks,
    strip_timestamps,
    write_skeleton,
)
from dsmoe_jax.config import ModelConfig
from dsmoe_jax.errors import DSMoEError
from dsmoe_jax.model import DeepSeekMoE, abstract, assemble, count_tensors, shardings, split
from dsmoe_jax.progress import Advance
from dsmoe_jax.sharding import MeshConfig
from dsmoe_jax.storage.atomic_dir import StagingDir, atomic_dir, check_new_path, staging_path, sync_tree, write_json
from dsmoe_jax.storage.paths import user_path
from dsmoe_jax.storage.strict_json import read_json

DTYPES: Final[dict[str, Any]] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_FRAME_UNIT: Final = "frame"


def save(model: DeepSeekMoE, path: str | Path, *, extra_files: Sequence[Path] = ()) -> None:
    """Write `model` to the new folder `path`, with copies of the `extra_files` (tokenizer, generation config).

    Several processes save together: each takes its share of the parameters, writes them whole and hashes them; `path`
    must be on a file system that all of them see. Raises `ValueError` if `path` exists or the disk is too full.
    Nothing is left behind when it fails.
    """
    path = check_new_path(path)
    params = split(model)[1]
    index, folder = jax.process_index(), staging_path(path)
    records: dict[str, ArrayRecord] = {}
    with collective_errors(), contextlib.ExitStack() as stack:
        with collective_errors():
            if index == 0:
                stack.enter_context(atomic_dir(path, needs=sum(value.nbytes for value in params.values())))
        with collective_errors():
            write_skeleton(folder / PARAMETERS, {name: value.dtype for name, value in params.items()})
        with collective_errors():
            if index == 0:
                strip_timestamps(folder / PARAMETERS)
        with collective_errors() as errors, ArrayWriter(folder / PARAMETERS, records.__setitem__) as writer:
            for i, (name, value) in enumerate(params.items()):
                array = gather_to_host(value)  # by all processes, even where one has failed: the others wait for it
                if i % jax.process_count() == index and not errors:
                    try:
                        writer.write(name, array.shape, array.dtype, row_chunks(array))
                    except Exception as error:
                        errors.append(error)
        with collective_errors():
            write_json(_records_file(folder, index), {name: list(record) for name, record in records.items()})
        with collective_errors():
            if index == 0:
                for file in [_records_file(folder, i) for i in range(jax.process_count())]:
                    records |= {name: ArrayRecord(*fields) for name, fields in read_json(file).items()}
                    file.unlink()
                finalize(folder, model.config, records, extra_files)


def load(
    path: str | Path, *, dtype: Any = None, mesh: Mesh | MeshConfig | None = None, verify: bool = True
) -> DeepSeekMoE:
    """Restore a native checkpoint, each parameter straight onto the devices of `mesh` (None: the default device).

    `dtype` ("float32", "bfloat16" or "float16") casts as it reads; None keeps what is stored. `verify` compares every
    file of the manifest with its SHA-256 first, half a second a gigabyte and core: Orbax alone lets a flipped bit
    pass in silence. Several processes share that out. Raises `ValueError` for a folder that is no native checkpoint,
    or a damaged one.
    """
    from orbax.checkpoint import v1 as ocp

    path = user_path(path, "checkpoint")
    wanted_dtype = as_dtype(dtype)
    config, _ = open_checkpoint(path, verify=verify)
    parameters = str(path.absolute() / PARAMETERS)
    with _one_line_errors(path):
        stored = dict(ocp.metadata(parameters).metadata)
        shapes = {name: meta.shape for name, meta in stored.items()}
    check_names_and_shapes(path, {name: spec.shape for name, spec in abstract(config)[1].items()}, shapes)
    wanted = {
        name: jax.ShapeDtypeStruct(stored[name].shape, wanted_dtype or stored[name].dtype, sharding=place)
        for name, place in shardings(config, mesh).items()
    }
    with _one_line_errors(path):
        return assemble(config, ocp.load(parameters, wanted))


def open_checkpoint(path: Path, *, verify: bool = True) -> tuple[ModelConfig, Manifest]:
    """The config and the manifest of a native checkpoint, with the checks of `load`; no parameter is read but for them.

    Every process must call it.
    """
    manifest = read_manifest(path, verify=verify)
    config = ModelConfig.from_file(path)
    check_tensor_count(path, config, len(manifest.tensors))
    if verify:
        files = [name for name in manifest.files if name.startswith(f"{PARAMETERS}/")]
        with collective_errors():
            for found in damage(path, manifest, files[jax.process_index() :: jax.process_count()]):
                raise DSMoEError(f"{path}: damaged checkpoint: {found}")
    return config, manifest


# --- writing in two steps ---


class ArraySource(NamedTuple):
    """An array that is to be written: its runs of rows in order, and what there is to note of it after the last."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]
    note: Callable[[], Any] = lambda: None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_parameters(draft: StagingDir, parameters: Sequence[ArraySource], advance: Advance) -> dict[str, ArrayRecord]:
    """Write the arrays that `draft` does not hold yet, a few pieces in memory at a time."""
    folder = draft.folder / PARAMETERS
    if _FRAME_UNIT not in draft.finished:
        for left in draft.folder.glob(f"{PARAMETERS}*"):  # by a run that was killed here
            shutil.rmtree(left)
        write_skeleton(folder, {parameter.name: parameter.dtype for parameter in parameters})
        strip_timestamps(folder)
        sync_tree(folder)
        draft.finish(_FRAME_UNIT, None)
    with ArrayWriter(folder, lambda name, record: draft.finish(name, list(record))) as writer:
        for parameter in parameters:
            if is_written(draft, parameter.name):
                advance(parameter.nbytes)
            else:
                name, shape, dtype, pieces, note = parameter
                writer.write(name, shape, dtype, _metered(pieces(), advance), note)
    return {parameter.name: ArrayRecord(*draft.finished[parameter.name]) for parameter in parameters}


def is_written(draft: StagingDir, name: str) -> bool:
    """Whether an earlier run wrote this array, and its files are still there."""
    if name not in draft.finished:
        return False
    files = {draft.folder / PARAMETERS / file: sums for file, sums in ArrayRecord(*draft.finished[name]).files.items()}
    return all(file.is_file() and file.stat().st_size == sums["bytes"] for file, sums in files.items())


def finalize(
    folder: Path,
    config: ModelConfig,
    records: Mapping[str, ArrayRecord],
    extra_files: Iterable[Path] = (),
    source: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Write all that stands beside the parameters, the manifest last; returns the manifest's SHA-256."""
    for file in extra_files:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", config.to_dict())
    return write_manifest(folder, records, source)


def check_tensor_count(source: str | Path, config: ModelConfig, found: int, per_stack: int = 1) -> None:
    """Refuse a config whose model has far more tensors than `found`, before anything is made for each of them.

    `per_stack` is how many tensors of the checkpoint make up one of our stacks of experts.
    """
    wanted = count_tensors(config, per_stack)
    if wanted > 2 * found + 100:
        raise DSMoEError(f"{source}: config.json asks for {wanted:,} tensors, the checkpoint holds {found:,}")


def as_dtype(dtype: Any) -> Any:
    """The numpy dtype of weights called "float32", "bfloat16" or "float16" (or its type); None stays None."""
    for name, known in DTYPES.items():
        if dtype is not None and (dtype == name or (not isinstance(dtype, str) and np.dtype(dtype) == np.dtype(known))):
            return np.dtype(known)
    if dtype is not None:
        raise DSMoEError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return None


def check_names_and_shapes(
    source: str | Path, wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]
) -> None:
    """Refuse a checkpoint whose tensors are not exactly the wanted ones; names the first, and how many more."""
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    for what, names in (("is missing", missing), ("belongs to nothing that the config asks for", surplus)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise DSMoEError(f"{source}: tensor {names[0]} {what}{more}")
    for name, shape in wanted.items():
        if tuple(found[name]) != tuple(shape):
            raise DSMoEError(
                f"{source}: tensor {name} has shape {list(found[name])}, the config asks for {list(shape)}"
            )


@contextlib.contextmanager
def collective_errors() -> Iterator[list[Exception]]:
    """What all processes do before any goes on; it fails in all of them if it fails in one."""
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
        raise DSMoEError("another process failed; its own message says why")


def gather_to_host(value: jax.Array) -> np.ndarray:
    """All of a parameter in host memory, for as long as it is held; every process must ask."""
    if not value.is_fully_addressable and not value.is_fully_replicated:
        return multihost_utils.process_allgather(value, tiled=True)
    # A handle of its own: JAX keeps the host's copy with the handle that it was asked of.
    parts = [shard.data for shard in value.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(value.shape, value.sharding, parts))


def _records_file(folder: Path, process: int) -> Path:
    return folder / f"records-{process}.json"


def _metered(pieces: Iterable[np.ndarray], advance: Advance) -> Iterator[np.ndarray]:
    for piece in pieces:
        yield piece
        advance(piece.nbytes)


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Orbax and tensorstore report damage in many types and many lines; a user needs one."""
    try:
        with quiet_orbax():
            yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DSMoEError(f"{path}: damaged checkpoint: {reason[:300]}") from error
