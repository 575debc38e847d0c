"""Native checkpoints: a folder with `config.json`, the tokenizer's files and the parameters, written by Orbax.

Start at `save` and `load`. A checkpoint appears under its name only when it is complete.
"""

import contextlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsmoe_jax.config import ModelConfig
from dsmoe_jax.json_file import read_json
from dsmoe_jax.model import DeepSeekMoE, abstract, assemble, shardings, split
from dsmoe_jax.sharding import MeshConfig

PARAMETERS: Final = "parameters"  # the Orbax folder inside a checkpoint
_HEADER: Final = "dsmoe_jax.json"  # marks a native checkpoint
_FORMAT: Final = 1
DTYPES: Final[dict[str, Any]] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def save(model: DeepSeekMoE, path: str | Path, *, beside: Sequence[Path] = ()) -> None:
    """Write `model` to the new folder `path`, with copies of the files `beside` (tokenizer, generation config).

    Raises `ValueError` if `path` exists. Nothing is left behind when it fails.
    """
    from orbax.checkpoint import v1 as ocp

    with new_folder(path) as folder:
        for file in beside:
            shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", model.config.to_dict())
        ocp.save(str(folder / PARAMETERS), split(model)[1])
        files = [file for file in (folder / PARAMETERS).rglob("*") if file.is_file()]
        names = [file.relative_to(folder).as_posix() for file in files]
        write_json(folder / _HEADER, {"format": _FORMAT, "files": dict(zip(names, _sums(files), strict=True))})


def load(path: str | Path, *, dtype: Any = None, mesh: Mesh | MeshConfig | None = None) -> DeepSeekMoE:
    """Restore a native checkpoint, each parameter straight onto the devices of `mesh` (None: the default device).

    `dtype` ("float32", "bfloat16" or "float16") casts as it reads; None keeps what is stored.
    Raises `ValueError` for a folder that is no native checkpoint, or a damaged one.
    """
    from orbax.checkpoint import v1 as ocp

    path = Path(path)
    if not is_native(path):
        raise ValueError(f"{path}: not a native checkpoint (no {_HEADER})")
    header = read_json(path / _HEADER)
    if (version := header.get("format")) != _FORMAT:
        raise ValueError(f"{path}: checkpoint format {version!r}, this version reads {_FORMAT}")
    config = ModelConfig.from_file(path)
    wanted_dtype = as_dtype(dtype)
    _check_files(path, header.get("files"))
    with _one_line_errors(path):
        stored = dict(ocp.metadata(str(path.absolute() / PARAMETERS)).metadata)
        found = {name: meta.shape for name, meta in stored.items()}
    check_names_and_shapes(path, {name: spec.shape for name, spec in abstract(config)[1].items()}, found)
    wanted = {
        name: jax.ShapeDtypeStruct(stored[name].shape, wanted_dtype or stored[name].dtype, sharding=place)
        for name, place in shardings(config, mesh).items()
    }
    with _one_line_errors(path):
        return assemble(config, ocp.load(str(path.absolute() / PARAMETERS), wanted))


def is_native(path: str | Path) -> bool:
    """Whether the folder is a native checkpoint (and not, say, one in the Hugging Face layout)."""
    return (Path(path) / _HEADER).is_file()


def as_dtype(dtype: Any) -> Any:
    """The numpy dtype of weights called "float32", "bfloat16" or "float16" (or its type); None stays None."""
    for name, known in DTYPES.items():
        if dtype is not None and (dtype == name or (not isinstance(dtype, str) and np.dtype(dtype) == np.dtype(known))):
            return np.dtype(known)
    if dtype is not None:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return None


def check_names_and_shapes(
    source: str | Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    """Refuse a checkpoint whose tensors are not exactly the wanted ones; names the first, and how many more."""
    missing, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    for what, names in (("is missing", missing), ("belongs to no part of this model", surplus)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{source}: tensor {names[0]} {what}{more}")
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{source}: tensor {name} has shape {list(found[name])}, the config asks for {list(shape)}"
            )


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` that becomes `path` when the block ends well and vanishes when it does not."""
    path = Path(path).absolute()
    if path.exists():
        raise ValueError(f"{path} exists; nothing is overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".incomplete", dir=path.parent))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a small JSON file the way Hugging Face does: sorted, two spaces."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_files(folder: Path, written: Any) -> None:
    """Refuse a checkpoint whose files are not those that were written.

    Orbax alone lets a flipped bit in a weight pass, and answers a file cut short with pages of tracebacks.
    """
    if not isinstance(written, dict) or not written:
        raise ValueError(f"{folder / _HEADER}: `files` must list the files of {PARAMETERS}")
    for name in written:
        if ".." in Path(name).parts or not (folder / name).is_file():
            raise ValueError(f"{folder}: damaged checkpoint: {name[:200]!r} is missing")
    for name, found in zip(written, _sums([folder / name for name in written]), strict=True):
        if found != written[name]:
            raise ValueError(f"{folder}: damaged checkpoint: {name!r} has {found}, not {str(written[name])[:80]!r}")


def _sums(files: Sequence[Path]) -> list[str]:
    """Each file's size and CRC-32; at a second a gigabyte or faster, and side by side."""

    def sum_of(path: Path) -> str:
        size, crc = 0, 0
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                size, crc = size + len(piece), zlib.crc32(piece, crc)
        return f"{size} bytes, CRC-32 {crc:08x}"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(sum_of, files))


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Orbax and tensorstore report damage in many types and many lines; a user needs one."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: damaged checkpoint: {reason[:300]}") from error
